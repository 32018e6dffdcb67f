"""What copies a tree: programs and memory, made in the background before a save.

Without this module, the first two calls that save compile them: a program that copies
into new memory, and one that copies into the memory of an earlier save. In one process,
a thread starts before the first save only for a tree of more than `MOST_TOGETHER`
arrays, since a smaller one has one program that fills and one that refills. In several
processes a thread always starts, because all would wait for the slowest compiler. On
CPU the thread also claims memory for the first copies there (see `blank`), so it
compiles only the program that refills memory, and calls each of these programs once.
After the first save, a thread compiles the programs that the next one needs.
"""

import contextlib
import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from flaxckpt._copies.blank import Blank, blank_copies, is_on_cpu
from flaxckpt._copies.plan import MOST_TOGETHER, Plan, Plans, is_array, kind_of
from flaxckpt._copies.programs import Kind
from flaxckpt._processes.messages import are_several
from flaxckpt._runtime.forks import use_threads
from flaxckpt._runtime.unchecked import unchecked_pool


@dataclass(frozen=True, eq=False)
class _Task:
    """What the thread does.

    Attributes:
        plan: How a tree is copied.
        programs: Which programs of each batch to compile; see `Program.compile`.
        is_wanted: As for `Program.compile`.
        claims_memory: Whether to claim memory, and to try the programs out on it. The
            program that fills new memory is not needed then.
    """

    plan: Plan
    programs: frozenset[int]
    is_wanted: Any = np.True_
    claims_memory: bool = False

    def covers(self, other: "_Task") -> bool:
        """Tell whether another task has nothing to add."""
        is_enough = other.claims_memory <= self.claims_memory
        return other.plan is self.plan and other.programs <= self.programs and is_enough


class Ahead:
    """Prepares to copy the tree that it was told of last.

    If no thread can be started, nothing happens: a save compiles what is missing.

    Attributes:
        blank: Has the memory for the first save.
    """

    def __init__(self, plans: Plans, *, is_used: bool) -> None:
        """Start nothing yet.

        Args:
            plans: Tells how to copy leaves.
            is_used: Whether copies are made on devices; if not, nothing ever happens.
        """
        self._plans, self._is_used = plans, is_used
        self.blank = Blank()
        self._told: _Task | None = None

    def prepare(self, leaves: Sequence[Any], *, claims_memory: bool = False) -> None:
        """Have the programs compiled that copy the JAX arrays among `leaves`.

        Nothing happens if one process has few of them.

        Args:
            leaves: Leaves of a tree; a `jax.ShapeDtypeStruct` with a sharding stands
                for an array.
            claims_memory: Whether to claim memory for the first save, too, where that
                helps.
        """
        kinds: list[Kind | None] = [
            kind_of(leaf)
            for leaf in leaves
            if is_array(leaf)
            or (isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is not None)
        ]
        is_worthwhile = len(kinds) > MOST_TOGETHER or are_several()
        if self._is_used and is_worthwhile:
            plan = self._plans.plan(kinds)
            helps = are_several() and self.blank.is_open and is_on_cpu(plan)
            claims_memory = claims_memory and helps
            self._start(_Task(plan, frozenset((0, 1)), claims_memory=claims_memory))

    def compile_next(self, plan: Plan, is_wanted: Any = np.True_) -> None:
        """Have the programs compiled that copy into the memory of a plan's copies.

        Args:
            plan: How a tree is copied.
            is_wanted: As for `Program.refill`: an array if a device decides.
        """
        which = 1 if is_wanted is np.True_ else 2
        self._start(_Task(plan, frozenset((which,)), is_wanted))

    def _start(self, task: _Task) -> None:
        """Do what a task says, unless the task before does it, too.

        The thread ends when it is done, when there is another task, or after one more
        program when the interpreter ends.
        """
        if not task.plan.batches or (self._told and self._told.covers(task)):
            return
        with contextlib.suppress(Exception):
            use_threads()
            ending, self._told = _ending(), task
            pool = unchecked_pool(1, "flaxckpt-compile")
            pool.submit(self._do, task, ending)
            pool.shutdown(wait=False)  # the thread ends after this one task

    def stop(self) -> None:
        """Stop after the program that is being compiled, and drop claimed memory."""
        self._told = None
        self.blank.take()

    def keep_to(self, plan: Plan) -> None:
        """Compile nothing more for another plan: a save would compete with it."""
        if self._told and self._told.plan is not plan:
            self._told = None

    def _do(self, task: _Task, ending: threading.Event) -> None:
        def is_over() -> bool:
            return ending.is_set() or self._told is not task

        programs = set(task.programs)
        if is_over():
            return
        if task.claims_memory:
            with contextlib.suppress(Exception):  # then the save claims it
                copies = blank_copies(task.plan)
                if self._told is task:
                    self.blank.keep(copies)
                    programs -= {0}
        for which in sorted(programs):
            for batch in task.plan.batches:
                if is_over():
                    return
                batch.program.compile(which, task.is_wanted)
        if task.claims_memory and not is_over():
            with contextlib.suppress(Exception):  # then the first save takes longer
                self.blank.try_out()


@functools.cache
def _ending() -> threading.Event:
    """Return the event that is set when the interpreter begins to end.

    Then Python waits for the threads of pools, before any function of `atexit`.
    """
    ending = threading.Event()
    threading._register_atexit(ending.set)  # pyright: ignore  # as at_exit does
    return ending
