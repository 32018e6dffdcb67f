"""`Saver`: a save on its way to the disk, copied on one thread and written on another.

A call is decided, unless a device still computes its metric: it is then `Undecided`. It
becomes `Contents`, the trees that it saves, described, which get a `Job` of the queue.
An undecided call is decided by a device (`OnDevice`), or waits for the metric. The
trees are copied, and the job is submitted.

By default the training loop waits for a device only if the devices have no room for
another copy, and for the disk only if `max_in_flight` saves are already under way. If a
due check depends on a value that a device still computes, the device decides, and
copies only if there is something to save. The writing thread learns the decision later.
"""

import contextlib
from contextlib import AbstractContextManager
from pathlib import Path

from flaxckpt._copies.held import Copies, fits
from flaxckpt._copies.on_device import unfilled
from flaxckpt._copies.on_host import copied_to_host
from flaxckpt._copies.plan import Plan
from flaxckpt._saving.call import Call, Undecided
from flaxckpt._saving.contents import Contents
from flaxckpt._saving.job import Job
from flaxckpt._saving.parts import SaverParts, refuse_processes
from flaxckpt._saving.receiver import Receiver
from flaxckpt._trees.ties import PyTree


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
        self.check = parts.queue.check
        self.wait = self.join = parts.queue.wait
        self.close, self.lost_best = parts.queue.close, parts.lost_best
        self.prepare = parts.describer.prepare

    def meet(self) -> None:
        """Do nothing: there is nobody to meet."""

    def raise_earlier(self) -> None:
        """Do nothing: `check` has raised the errors of earlier saves."""

    def add_earlier(self, error: BaseException) -> None:
        """Do nothing: there are no errors of earlier saves to raise; see `check`."""

    def telling_others(self) -> AbstractContextManager[None]:
        """Do nothing: there is nobody to tell of an error."""
        return contextlib.nullcontext()

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

    def start(self, tree: PyTree, call: Call, *, to_slot: bool) -> Path | None:
        """Check the call, copy the tree, and have a job write the copies.

        Args:
            tree: What to save.
            call: The call.
            to_slot: Whether the slot gets the whole tree, unless the series does.

        Returns:
            The path to be written; None if it is not known yet or nothing is saved.

        Raises:
            CheckpointError: As `ModelCheckpoint.update` does.
        """
        parts = self._parts
        parts.lines.number(call)
        if call.skips and not to_slot:
            return None
        refuse_processes()
        path, slot = parts.paths.checked(call, to_slot=to_slot)
        contents = parts.describer.describe(
            tree, path, skips=call.skips, to_slot=to_slot
        )
        contents.take_up_scalars(call)
        parts.paths.take_lock(slot if call.skips else path)
        job = self._claimed_for_device(contents, call)
        if isinstance(call.decision, Undecided):
            call.judge()
            self.report.decided(call)
            if call.skips and not to_slot:
                return None
            contents = contents.decided(call)
        where = slot if call.skips else path
        if job is None:
            if where is not None:
                self.report.saving(call, where)
            job = parts.begin(contents, call)
            assert job is not None
        try:
            self._copy(job, contents, call, where)
        except BaseException:
            self.queue.give_back(job)
            raise
        parts.lines.move_head(call)
        parts.submit(job)
        if parts.snapshot == "none":
            self.wait()
        return where

    def _claimed_for_device(self, contents: Contents, call: Call) -> Job | None:
        """Claim a job and let the device decide, if that needs no waiting.

        Returns:
            The job; None if the call is decided already, if no job is free, if the
            devices lack room, if an interrupt could tear the save that waits, or if the
            arrays and the metric are on different devices.
        """
        state = call.state
        value = call.unknown if isinstance(call.decision, Undecided) else None
        if state is None or value is None:  # the metric may be computed by now
            return None
        job = self._parts.begin(contents, call, waits=False)
        if job is None:
            return None
        try:
            leaves, kinds = contents.leaves(call)
            plan = self._parts.plans.plan(kinds)
            compared = value, state.best_value, state.has_best
            has_room = fits(job.memory, plan) or (
                job.content is None and self._parts.is_on_device(leaves)
            )
            if has_room and not _is_torn(job, plan) and plan.is_on_one_mesh(*compared):
                call.copies = unfilled(leaves, plan)
                call.judge_on_device(value)
                return job
        finally:
            if isinstance(call.decision, Undecided):
                self.queue.give_back(job)
        return None

    def _copy(
        self, job: Job, contents: Contents, call: Call, where: Path | None
    ) -> None:
        """Copy, and prepare the job before the copies overwrite what it would write."""
        leaves, kinds = contents.leaves(call)
        if self._parts.snapshot == "none":
            call.copies = Copies(None, [], leaves)
        elif call.copies is None:  # otherwise a device decides
            plan = self._parts.plans.plan(kinds)
            if fits(job.memory, plan) or self._parts.is_on_device(leaves):
                call.copies = unfilled(leaves, plan)
            else:
                # Not into the memory of a waiting save, which an error half-way would
                # tear.
                into = None if job.content else job.memory
                call.copies = copied_to_host(leaves, into)
        self._parts.prepare(job, contents, call, where)
        used = call.copies.plan
        if used is not None:
            if not fits(job.memory, used) or _is_torn(job, used):
                job.memory = None  # freed before new memory is allocated
            wanted = contents.wanted(call)
            self._parts.fill(call.copies, leaves, job.memory, wanted)()


def _is_torn(job: Job, plan: Plan) -> bool:
    """Tell whether an interrupt between two programs would tear the save that waits."""
    return job.content is not None and len(plan.batches) > 1
