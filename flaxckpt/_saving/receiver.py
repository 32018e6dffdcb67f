"""Trees that a running program hands over: `Receiver` claims memory, and saves them."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flaxckpt._copies.held import Copies
from flaxckpt._copies.on_host import memory_of_host
from flaxckpt._decision.logs import Logs
from flaxckpt._decision.moment import Moment
from flaxckpt._saving.call import Call
from flaxckpt._saving.contents import Contents, StoredTree
from flaxckpt._saving.job import Job
from flaxckpt._saving.parts import SaverParts, refuse_processes
from flaxckpt._trees.layout import Layout
from flaxckpt._trees.leaf import is_of_keys
from flaxckpt._trees.ties import PyTree


@dataclass(frozen=True)
class FromDevice:
    """Stands for a leaf that a program hands over.

    Attributes:
        index: The leaf's position in `TracedTrees.sent`.
    """

    index: int


class TracedTrees:
    """The trees that a traced call may save.

    Attributes:
        sent: The values of the trace that the program hands over, each once.
        kinds: Their shapes and dtypes, as the host gets them.
    """

    def __init__(self, contents: Contents) -> None:
        """Gather the leaves of what the call may save."""
        sent: dict[int, tuple[int, jax.Array]] = {}
        for tree in contents.trees:
            for leaf in tree.leaves:
                if isinstance(leaf, jax.Array):
                    sent.setdefault(id(leaf), (len(sent), leaf))
        self.sent = [leaf for _, leaf in sent.values()]
        self.kinds = [_kind_on_host(leaf) for leaf in self.sent]
        for tree in contents.trees:
            tree.leaves = [
                FromDevice(sent[id(leaf)][0]) if isinstance(leaf, jax.Array) else leaf
                for leaf in tree.leaves
            ]
        self._contents = contents

    def stacked(self, number: int) -> "TracedTrees":
        """Return the trees of all members of `vmap`, one above the other.

        Args:
            number: How many members there are.
        """
        made = copy.copy(self)
        made.sent, made.kinds = [], [((number, *s), dtype) for s, dtype in self.kinds]
        series, slot = (
            tree and _stacked(tree, number)
            for tree in (self._contents.series, self._contents.slot)
        )
        if self._contents.slot is self._contents.series:
            slot = series
        made._contents = replace(self._contents, series=series, slot=slot)
        return made

    def contents(self, call: Call, path: Path | None, *, to_slot: bool) -> Contents:
        """Return copies of the trees for one save, which empties them."""
        traced = self._contents
        series = _copied(traced.series) if call.saves else None
        slot = _copied(traced.slot) if to_slot else None
        if slot is not None and series is not None and traced.slot is traced.series:
            slot = series
        return Contents(series, slot, path)


@dataclass
class Arrival:
    """A save whose leaves a program is handing over.

    Attributes:
        job: The job that writes it.
        contents: The trees.
        call: The call.
        where: The path of the checkpoint or the slot; None if it is not known.
        memory: The arrays to copy the leaves to.
    """

    job: Job
    contents: Contents
    call: Call
    where: Path | None
    memory: list[np.ndarray[Any, Any]]


class Receiver:
    """Saves trees that come from within a running program.

    Attributes:
        tells: Whether decisions are printed.
    """

    def __init__(self, parts: SaverParts) -> None:
        """Receive nothing yet."""
        self._parts, self.tells = parts, parts.report.tell is not None
        self.tell_decided = parts.report.decided
        queue = parts.queue
        self.end_program, self.hold = queue.end_program, queue.hold
        self.give_back, self.take_back = queue.give_back, queue.take_back

    def plan(
        self, tree: PyTree, logs: Logs | None, at: Moment, *, to_slot: bool
    ) -> TracedTrees:
        """Check a traced call, and describe the trees that it may save.

        Args:
            tree: What to save; its arrays are traced.
            logs: The metrics; they may be traced.
            at: When the call is made; the values may be traced.
            to_slot: Whether the call may save in the slot.

        Raises:
            CheckpointError: As `ModelCheckpoint.update` does.
        """
        refuse_processes()
        sample = {
            name: np.zeros(value.shape, value.dtype)[()]
            if isinstance(value, jax.Array) and not is_of_keys(value.dtype)
            else value
            for name, value in (logs or {}).items()
        }
        # This raises if no values can fill it in.
        self.check_path(at.given(), sample)
        return TracedTrees(
            self._parts.describer.describe(tree, None, to_slot=to_slot, is_traced=True)
        )

    def check_path(self, names: Iterable[str], logs: Logs) -> None:
        """Check that the filepath can be filled in.

        Args:
            names: What the moment of the call has.
            logs: Metrics, with any values.

        Raises:
            TemplateError: If not.
        """
        self._parts.paths.template.render(Moment(**dict.fromkeys(names, 0)), logs)

    def expect(self, trees: TracedTrees, call: Call, *, to_slot: bool) -> Arrival:
        """Claim a job, and memory for the leaves that a program hands over.

        It calls no JAX. It may wait for earlier saves. Afterwards the caller must call
        `arrived`, or `give_back` with the job.

        Args:
            trees: The trees that the traced call may save.
            call: The call.
            to_slot: Whether the slot gets the whole tree, unless the series does.
        """
        parts = self._parts
        parts.check_parent()
        parts.lines.number(call)
        path, slot = parts.paths.checked(call, to_slot=to_slot)
        where = path if call.saves else slot
        parts.paths.take_lock(where)
        contents = trees.contents(call, path, to_slot=to_slot)
        if where is not None:
            parts.report.decided(call)
            parts.report.saving(call, where)
        job = parts.begin(contents, call)
        assert job is not None
        try:
            # Not the memory of a waiting save, which an error half-way would tear.
            reuse = None if job.content else job.memory
            memory = memory_of_host(trees.kinds, reuse)
        except BaseException:
            parts.queue.give_back(job)
            raise
        return Arrival(job, contents, call, where, memory)

    def arrived(self, arrival: Arrival) -> None:
        """Submit the job of a save whose memory is filled."""
        contents, memory = arrival.contents, arrival.memory
        leaves = [
            memory[leaf.index] if isinstance(leaf, FromDevice) else leaf
            for tree in contents.trees
            for leaf in tree.leaves
        ]
        arrival.call.copies = Copies(None, [], leaves)
        reuse = Copies(None, [], memory)
        self._parts.prepare(
            arrival.job, contents, arrival.call, arrival.where, memory=reuse
        )
        self._parts.submit(arrival.job)

    def fail(self, error: BaseException, *, ends: bool = False) -> None:
        """Count a failed save, and keep its error as `JobQueue.fail` does."""
        self._parts.report.counts.failed += 1
        self._parts.queue.fail(error, self._parts.report.shown(), ends=ends)


def _stacked(tree: StoredTree, number: int) -> StoredTree:
    leaves = [
        replace(leaf, shape=(number, *leaf.shape))
        if isinstance(value, FromDevice)
        else leaf
        for leaf, value in zip(tree.layout.leaves, tree.leaves, strict=True)
    ]
    return replace(tree, layout=Layout(tree.layout.skeleton, tuple(leaves)))


def _copied(tree: StoredTree | None) -> StoredTree:
    assert tree is not None
    return replace(tree, leaves=list(tree.leaves))


def _kind_on_host(leaf: jax.Array) -> tuple[tuple[int, ...], Any]:
    if is_of_keys(leaf.dtype):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return leaf.shape, np.dtype(leaf.dtype)
