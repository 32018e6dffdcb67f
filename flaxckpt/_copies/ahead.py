"""Programs that copy a tree, compiled in the background before they are needed.

Without this module, the first two calls that save compile them: a program that copies
into new memory, and one that copies into the memory of an earlier save. In one process,
a thread starts before the first save only for a tree of more than `MOST_TOGETHER`
arrays, since a smaller one needs only one program of each. In several processes a
thread always starts, because all would wait for the slowest compiler.
"""

import contextlib
import functools
import threading
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from flaxckpt._copies.plan import MOST_TOGETHER, Plan, Plans, is_array, kind_of
from flaxckpt._copies.programs import Kind
from flaxckpt._processes.messages import are_several
from flaxckpt._runtime.forks import use_threads
from flaxckpt._runtime.unchecked import unchecked_pool


class Ahead:
    """Compiles the programs of the tree that it was told of last.

    If no thread can be started, nothing happens: a save compiles what is missing.
    """

    def __init__(self, plans: Plans, *, is_used: bool) -> None:
        """Start nothing yet.

        Args:
            plans: Tells how to copy leaves.
            is_used: Whether copies are made on devices; if not, nothing ever happens.
        """
        self._plans, self._is_used = plans, is_used
        self._told: tuple[Plan, int] | None = None

    def compile(self, leaves: Sequence[Any]) -> None:
        """Have the programs compiled that copy the JAX arrays among `leaves`.

        Nothing happens if one process has few of them.

        Args:
            leaves: Leaves of a tree; a `jax.ShapeDtypeStruct` with a sharding stands
                for an array.
        """
        kinds: list[Kind | None] = [
            kind_of(leaf)
            for leaf in leaves
            if is_array(leaf)
            or (isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is not None)
        ]
        is_worthwhile = len(kinds) > MOST_TOGETHER or are_several()
        if self._is_used and is_worthwhile:
            self.compile_plan(self._plans.plan(kinds))

    def compile_plan(self, plan: Plan, is_wanted: Any = np.True_) -> None:
        """Have the programs of a plan compiled.

        Nothing happens if the last call had the same plan and kind of `is_wanted`. The
        thread ends when it is done, when a call names another plan, or after one more
        program when the interpreter ends.

        Args:
            plan: How a tree is copied.
            is_wanted: As for `Program.refill`: an array if a device decides.
        """
        told = plan, 1 if is_wanted is np.True_ else 2
        if told == self._told or not plan.batches:
            return
        with contextlib.suppress(Exception):
            use_threads()
            ending, self._told = _ending(), told
            pool = unchecked_pool(1, "flaxckpt-compile")
            pool.submit(self._compile, told, is_wanted, ending)
            pool.shutdown(wait=False)  # the thread ends after this one task

    def keep_to(self, plan: Plan) -> None:
        """Compile nothing more for another plan: a save would compete with it."""
        if self._told and self._told[0] is not plan:
            self._told = None

    def _compile(self, told: Any, is_wanted: Any, ending: threading.Event) -> None:
        for which in (0, told[1]):
            for batch in told[0].batches:
                if ending.is_set() or self._told is not told:
                    return
                batch.program.compile(which, is_wanted)


@functools.cache
def _ending() -> threading.Event:
    """Return the event that is set when the interpreter begins to end.

    Then Python waits for the threads of pools, before any function of `atexit`.
    """
    ending = threading.Event()
    threading._register_atexit(ending.set)  # pyright: ignore  # as at_exit does
    return ending
