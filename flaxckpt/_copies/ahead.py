"""Programs that copy a tree, compiled in the background before they are needed.

The first two calls that save would compile them otherwise: a program that copies into
new memory, and one that copies into the memory of an earlier save. Before the first
save, only a large tree is worth a thread: one with few arrays has one program of each.
"""

import contextlib
import functools
import itertools
import threading
from collections.abc import Sequence
from typing import Any

import jax
from jax.core import Tracer

from flaxckpt._copies.plan import MOST_TOGETHER, Plan
from flaxckpt._copies.programs import Kind
from flaxckpt._processes.messages import are_several
from flaxckpt._runtime.forks import use_threads
from flaxckpt._runtime.unchecked import unchecked_pool


class Ahead:
    """Compiles the programs of the tree that it was told of last.

    If no thread can be started, nothing happens: a save compiles what is missing.
    """

    def __init__(self, *, is_used: bool = True) -> None:
        """Start nothing yet, and never anything unless `is_used`."""
        self._is_used, self._kinds = is_used, list[Kind]()

    def compile(self, leaves: Sequence[Any]) -> None:
        """Have the programs compiled that copy the JAX arrays among `leaves`.

        Nothing happens if they are few, or were compiled by the last call, or in
        several processes. The thread ends when it is done, when a call names another
        tree, or after one more program when the interpreter ends.

        Args:
            leaves: Leaves of a tree; a `jax.ShapeDtypeStruct` with a sharding stands
                for an array.
        """
        kinds = [
            (leaf.shape, leaf.dtype, leaf.sharding)
            for leaf in leaves
            if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
            and not isinstance(leaf, Tracer)
            and leaf.sharding is not None
        ]
        if len(kinds) > MOST_TOGETHER:
            self._start(kinds)

    def compile_next(self, plan: Plan) -> None:
        """Have the programs compiled that copy into the memory of a plan's copies.

        Args:
            plan: The plan of copies that were made in new memory.
        """
        self._start([kind for kind in plan.kinds if kind is not None], plan)

    def _start(self, kinds: list[Kind], plan: Plan | None = None) -> None:
        """Start the thread, which plans the copies itself if there is no plan yet."""
        if not (kinds and self._is_used) or kinds == self._kinds or are_several():
            return
        with contextlib.suppress(Exception):
            use_threads()
            ending, self._kinds = _ending(), kinds
            pool = unchecked_pool(1, "flaxckpt-compile")
            pool.submit(self._compile, kinds, plan, ending)
            pool.shutdown(wait=False)  # the thread ends after this one task

    def _compile(
        self, kinds: list[Kind], plan: Plan | None, ending: threading.Event
    ) -> None:
        for which, batch in itertools.product((0, 1), (plan or Plan([*kinds])).batches):
            if ending.is_set() or self._kinds is not kinds:
                return
            batch.program.compile(which)


@functools.cache
def _ending() -> threading.Event:
    """Return the event that is set when the interpreter begins to end.

    Then Python waits for the threads of pools, before any function of `atexit`.
    """
    ending = threading.Event()
    threading._register_atexit(ending.set)  # pyright: ignore  # as at_exit does
    return ending
