"""`SaverParts`: what a saver is made of, in one process or in several."""

import functools
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flaxckpt._checkpoints.series_writer import SeriesWriter
from flaxckpt._copies.ahead import Ahead
from flaxckpt._copies.held import Copies
from flaxckpt._copies.on_device import fill
from flaxckpt._copies.on_host import fits_on_device
from flaxckpt._copies.plan import Plans
from flaxckpt._runtime.forks import use_threads
from flaxckpt._saving.best_kept import BestKept
from flaxckpt._saving.call import Call
from flaxckpt._saving.contents import Contents
from flaxckpt._saving.describe import Describer
from flaxckpt._saving.hooks import Hooks
from flaxckpt._saving.job import Job, nothing
from flaxckpt._saving.lines import Lines
from flaxckpt._saving.paths import Paths
from flaxckpt._saving.publish import Publisher
from flaxckpt._saving.queue import JobQueue
from flaxckpt._saving.report import Report
from flaxckpt._settings import Settings
from flaxckpt.errors import CheckpointError, HookError


class SaverParts:
    """The parts of a saver, and the steps of a job, which all savers share.

    Attributes:
        disk: Writes the series to save in.
        series: The series.
        paths: Where the checkpoint of a call goes.
        report: Counts the saves, and prints.
        queue: Has the jobs, and the thread that runs them.
        publisher: Writes what the jobs hold.
        describer: Describes trees.
        lines: Tells which saves may supersede which.
        plans: Tells how to copy leaves.
        ahead: Prepares the copies: programs, and memory.
        snapshot: Where to copy to.
        max_in_flight: How many saves may be under way; None to go by their size.
    """

    def __init__(self, settings: Settings, disk: SeriesWriter) -> None:
        """Start nothing yet."""
        best_only, overwrite = bool(settings.save_best_only), bool(settings.overwrite)
        self.disk, self.series = disk, disk.series
        self.snapshot, self.max_in_flight = settings.snapshot, settings.max_in_flight
        self.queue, self.plans = JobQueue(), Plans()
        self.ahead = Ahead(self.plans, is_used=self.snapshot in ("auto", "device"))
        self.report = Report(self.series, self.queue, settings.tell)
        self.paths, best_kept = Paths(settings.template, self.series), None
        if best_only:
            best_kept = BestKept(disk, self.report, overwrite=overwrite)
        self.publisher = Publisher(
            disk,
            self.paths,
            self.report,
            best_kept,
            bool(settings.save_weights_only),
            Hooks(settings.hooks),
        )
        self.describer = Describer(settings, disk.way, self.ahead)
        self.lines = Lines(best_only=best_only, overwrite=overwrite)
        weakref.finalize(self, self.queue.abandon)

    def check_parent(self) -> None:
        """Check that this process was not forked from one that saves.

        Raises:
            CheckpointLockedError: If it was forked from the one that made this object.
            CheckpointError: If it was forked from another one that used JAX, or if a
                function of `on_saved` makes the call.
        """
        self.queue.refuse_hooks()
        if self.queue.is_inherited:
            raise self.series.area.claim.inherited_error()
        use_threads()

    def lost_best(self) -> bool:
        """Tell, once, that a save has failed, so a state's best may not be on disk.

        Return False while a save is under way, because it may write that best. Return
        False in several processes, because they would have to agree.
        """
        is_one = jax.process_count() == 1
        if not (self.report.has_failed and is_one) or self.queue.is_working():
            return False
        self.report.has_failed = False
        return True

    def is_on_device(self, leaves: list[Any]) -> bool:
        """Tell whether leaves are to be copied on their devices."""
        return self.snapshot == "device" or (
            self.snapshot == "auto" and fits_on_device(leaves)
        )

    def fill(
        self,
        copies: Copies,
        leaves: list[Any],
        memory: Copies | None,
        is_wanted: Any = np.True_,
    ) -> Callable[[], None]:
        """Fill copies on devices.

        Args:
            copies: Copies that have a plan.
            leaves: What to copy.
            memory: Earlier copies, whose memory is used; None for new memory.
            is_wanted: As for `Program.refill`.

        Returns:
            A function to call later: it has a thread compile the programs of the next
            save, or does nothing if they are known.
        """
        assert copies.plan is not None
        self.ahead.keep_to(copies.plan)
        fill(copies, leaves, memory, is_wanted)
        # Blank memory is filled without asking a device, by another program.
        if memory is None or (memory.is_blank and is_wanted is not np.True_):
            return functools.partial(self.ahead.compile_next, copies.plan, is_wanted)
        return nothing

    # ---- the steps of a job ----------------------------------------------------------

    def begin(
        self, contents: Contents, call: Call, *, waits: bool = True
    ) -> Job | None:
        """Claim a job for contents, and note which of their leaves are frozen.

        Args:
            contents: What to save.
            call: The call.
            waits: Whether to wait if too many saves are under way.

        Returns:
            The job; None if the call does not wait and no job is free.
        """
        limit = self.max_in_flight or contents.limit()
        job = self.queue.claim(contents.key(call), limit, wait=waits)
        if job is None:
            return None
        try:
            self.report.count_delay(job.waited)
            if job.waited:
                self.report.say(call, f"waited {job.waited:.2f} s for the saves before")
            may_stay = self.queue.has_one_job() and self.disk.way.writes_directly
            self.describer.take_up_frozen(contents, call, may_stay=may_stay)
        except BaseException:
            self.queue.give_back(job)
            raise
        return job

    def prepare(
        self,
        job: Job,
        contents: Contents,
        call: Call,
        where: Path | None,
        *,
        memory: Copies | None = None,
        write: Callable[[Contents], None] | None = None,
    ) -> None:
        """Set what a job becomes once the call's copies are filled.

        Args:
            job: The job, which this thread has claimed.
            contents: What it writes.
            call: The call, which has its copies.
            where: The path that errors name; None for the root.
            memory: What the next job may copy to; None for these copies.
            write: Writes the contents; None for the publisher.
        """
        for tree in contents.trees:
            tree.leaves = []  # the copies take their place
        earlier: Contents | None = job.content
        calls = [call] if earlier is None else [*earlier.calls, call]
        content, copies = replace(earlier or contents, calls=calls), call.copies
        assert copies is not None
        if memory is None and self.snapshot != "none":
            memory = copies.memory()
        job.then = Job(
            job.key,
            self.report.shown(where),
            functools.partial(self._run, write or self.publisher.write, content),
            self.series.area.sweep,
            content,
            memory,
            is_filled=lambda: copies.is_filled,
            tell=self.publisher.hooks.call,
        )

    def submit(self, job: Job) -> None:
        """Put a job into the queue, and drop the copies that it supersedes."""
        content: Contents = job.then.content if job.then is not None else job.content
        *earlier, call = content.calls
        is_sure = call.saves or call.skips
        self.queue.submit(job)
        for superseded in earlier if is_sure else ():
            superseded.copies = None

    def _run(self, write: Callable[[Contents], None], content: Contents) -> None:
        try:
            write(content)
        except HookError:  # all is saved
            raise
        except BaseException:
            self.report.counts.failed += 1
            self.report.has_failed = True
            raise


def refuse_processes() -> None:
    """Refuse to save if there are several processes."""
    if jax.process_count() > 1:
        raise CheckpointError(
            f"This is one of {jax.process_count()} processes, which was not known when "
            "the ModelCheckpoint was made. Make it after jax.distributed.initialize()."
        )
