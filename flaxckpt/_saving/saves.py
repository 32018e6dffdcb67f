"""`Saver`: a save on its way to the disk, copied on one thread and written on another.

A call becomes `Contents`, the trees that it saves, described. They get a `Job` of the
queue. The call is decided: `Save`, `Skip`, or `OnDevice`. The trees are copied, and the
job is submitted.

By default the training loop does not wait for a device, and waits for the disk only
when `max_in_flight` saves are already under way. If a due check depends on a value that
a device still computes, the device decides, and copies only if there is something to
save. The writing thread learns the decision later.
"""

import functools
from pathlib import Path
from typing import Any

import jax

from flaxckpt._copies.held import Copies
from flaxckpt._copies.on_device import fill, unfilled
from flaxckpt._copies.on_host import copied_to_host
from flaxckpt._copies.plan import Plan, planned
from flaxckpt._decision.state import CheckpointState
from flaxckpt._saving.arriving import Receiver
from flaxckpt._saving.call import Call, OnDevice, Undecided
from flaxckpt._saving.contents import Contents
from flaxckpt._saving.job import Job
from flaxckpt._saving.parts import SaverParts, refuse_processes
from flaxckpt._trees.ties import PyTree


class Claimed:
    """A job that this thread has claimed for some contents.

    Attributes:
        job: The job.
    """

    def __init__(self, job: Job, contents: Contents, call: Call) -> None:
        """Copy nothing yet."""
        self.job = job
        self._contents, self._call = contents, call

    @functools.cached_property
    def leaves(self) -> list[Any]:
        """The leaves to copy."""
        return self._contents.leaves(self._call)

    @functools.cached_property
    def plan(self) -> Plan:
        """How programs copy them."""
        return planned(self.leaves)

    @property
    def memory(self) -> Copies | None:
        """The memory of earlier copies, if it fits the plan."""
        memory: Copies | None = self.job.memory
        return memory if memory is not None and memory.plan is self.plan else None

    @property
    def is_torn(self) -> bool:
        """Whether an interrupt between two programs would tear the save that waits."""
        return self.job.content is not None and len(self.plan.batches) > 1


class Saver:
    """Saves the trees of one series, in one process.

    Attributes:
        counts: What became of the saves.
        queue: The queue of jobs.
        report: Counts and prints.
        receiver: Saves trees that come from within a running program.
    """

    def __init__(self, parts: SaverParts) -> None:
        """Start nothing yet."""
        self._parts, self.receiver = parts, Receiver(parts)
        self.queue, self.report = parts.queue, parts.report
        self.counts, self.check_parent = parts.report.counts, parts.check_parent
        self.check, self.wait = parts.queue.check, parts.queue.wait
        self.close = parts.queue.close

    @property
    def has_failed(self) -> bool:
        """Whether a save has failed since `lost_best` last said so."""
        return self.report.has_failed

    @property
    def tells(self) -> bool:
        """Whether decisions are printed."""
        return self.report.tell is not None

    def lost_best(self) -> bool:
        """Tell, once, that a save has failed, so a state's best may not be on disk.

        False while a save is under way, which may write that best; and in several
        processes, which would have to agree.
        """
        is_one = jax.process_count() == 1
        if not (self.has_failed and is_one) or self.queue.is_working():
            return False
        self.report.has_failed = False
        return True

    def decide(self, call: Call, *, now: bool) -> None:
        """Decide a due check, or leave it to the device that computes the metric.

        Args:
            call: The call; it is decided already if it saves in any case.
            now: Whether to decide now in any case.
        """
        may_wait = self._parts.snapshot in ("auto", "device")
        if may_wait and not (now or call.saves) and call.unknown is not None:
            call.decision = Undecided()
        else:
            call.judge()
            self.report.decided(call)

    def start(self, tree: PyTree, call: Call, *, lasts: bool) -> Path | None:
        """Check the call, copy the tree, and have a job write the copies.

        Args:
            tree: What to save.
            call: The call.
            lasts: Whether to save the whole tree in the slot unless the series gets it.

        Returns:
            The path to be written; None if it is not known yet or nothing is saved.

        Raises:
            CheckpointError: As `ModelCheckpoint.update` does.
        """
        parts = self._parts
        parts.lines.number(call)
        if call.skips and not lasts:
            return None
        refuse_processes()
        path, slot = parts.paths.checked(call, lasts=lasts)
        contents = parts.describer.describe(tree, path, skips=call.skips, lasts=lasts)
        contents.take_up_scalars(call)
        parts.paths.open(slot if call.skips else path)
        claimed = self._claimed_for_device(contents, call)
        if isinstance(call.decision, Undecided):
            call.judge()
            self.report.decided(call)
            if call.skips and not lasts:
                return None
            contents = contents.decided(call)
        where = slot if call.skips else path
        if claimed is None:
            if where is not None:
                self.report.saving(call, where)
            job = parts.begin(contents, call)
            assert job is not None
            claimed = Claimed(job, contents, call)
        try:
            self._copy(claimed, contents, call, where)
        except BaseException:
            self.queue.give_back(claimed.job)
            raise
        parts.lines.move_head(call)
        parts.submit(claimed.job)
        if parts.snapshot == "none":
            self.wait()
        return where

    def _claimed_for_device(self, contents: Contents, call: Call) -> Claimed | None:
        """Claim a job and let the device decide, if that needs no waiting.

        Returns:
            The job; None if the call is decided, if no job is free, or if one program
            cannot take all arrays.
        """
        if not isinstance(call.decision, Undecided):
            return None
        state, value = call.state, call.unknown
        if state is None or value is None:  # the metric is computed by now
            return None
        job = self._parts.begin(contents, call, waits=False)
        if job is None:
            return None
        claimed = Claimed(job, contents, call)
        try:
            if self._is_for_device(claimed, state, value):
                call.judge_on_device(value)
                return claimed
        finally:
            if isinstance(call.decision, Undecided):
                self.queue.give_back(job)
        return None

    def _is_for_device(
        self, claimed: Claimed, state: CheckpointState, value: jax.Array
    ) -> bool:
        """Tell whether one program can decide and copy, into memory that is free."""
        bests = state.best_value, state.has_best
        if not claimed.plan.is_on_one_mesh(value, *bests) or claimed.is_torn:
            return False
        has_room = claimed.job.content is None
        return claimed.memory is not None or (
            has_room and self._parts.is_on_device(claimed.leaves)
        )

    def _copy(
        self, claimed: Claimed, contents: Contents, call: Call, where: Path | None
    ) -> None:
        """Copy, and prepare the job before the copies overwrite what it would write."""
        job, leaves, memory = claimed.job, claimed.leaves, None
        if self._parts.snapshot == "none":
            call.copies = Copies(None, [], leaves)
        elif (
            claimed.memory is not None
            or isinstance(call.decision, OnDevice)
            or self._parts.is_on_device(leaves)
        ):
            memory = None if claimed.is_torn else claimed.memory
            if memory is None:
                job.memory = None  # freed before new memory is allocated
            call.copies = unfilled(leaves, claimed.plan)
        else:
            # Not into the memory of a waiting save, which an error half-way would tear.
            into = None if job.content else job.memory
            call.copies = copied_to_host(leaves, into)
        self._parts.prepare(job, contents, call, where)
        if call.copies.plan is not None:
            fill(call.copies, leaves, memory, contents.wanted(call))
