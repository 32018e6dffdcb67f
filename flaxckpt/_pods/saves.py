"""Saves of several processes: each writes its share, in the background.

All processes make the same calls. At a due check each process copies its shards, on its
devices or to its host, and goes on. Threads in the background then compare what they
have decided and what they save. If all agree, process 0 makes the directory, and each
process writes its share: a database, or in a store files. When all are there, process 0
merges the databases, writes the record and gives the checkpoint its name. A save enters
no collective, on the loop's thread or in the background, so it cannot wait for one that
another process does not enter. Each message has a time-out.

All processes raise an error in any of them at the same call: the next due check,
`save`, `wait` or `close`. That call begins its own save first, and raises the error at
its end. So the processes save together, though one may have raised the error before. A
process that could not copy raises its error at once instead.
"""

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxckpt._copies.blank import refitted
from flaxckpt._copies.held import Copies
from flaxckpt._copies.memory_kinds import copied_off_device
from flaxckpt._copies.on_device import unfilled
from flaxckpt._copies.plan import kinds_of
from flaxckpt._decision.scalars import monitored
from flaxckpt._pods.agreement import check_parts
from flaxckpt._pods.joint_saves import JointSaves
from flaxckpt._processes.messages import (
    is_leader,
    process_count,
)
from flaxckpt._runtime.failures import in_one_line
from flaxckpt._saving.call import Call, Undecided
from flaxckpt._saving.contents import Contents
from flaxckpt._saving.job import Job, nothing
from flaxckpt._saving.parts import SaverParts
from flaxckpt._saving.receiver import Receiver
from flaxckpt._trees.leaf import without_keys
from flaxckpt._trees.ties import PyTree
from flaxckpt.errors import CheckpointError


class PodSaver:
    """Saves the trees of one series, from several processes.

    Attributes:
        counts: What became of the saves.
        queue: The queue of jobs.
        report: Counts and prints.
    """

    def __init__(self, parts: SaverParts, *, timeout: float) -> None:
        """Start nothing yet.

        Args:
            parts: The parts, which a `Saver` has, too.
            timeout: How long to wait for another process, in seconds.
        """
        if not is_leader():
            parts.report.tell = None
        self._parts, self._series = parts, parts.series
        self.queue, self.report = parts.queue, parts.report
        self.counts = parts.report.counts
        self.check_parent, self.lost_best = parts.check_parent, parts.lost_best
        self._joint = JointSaves(parts, timeout)
        self._earlier: BaseException | None = None  # to raise once the call is done

    def meet(self) -> None:
        """Meet the other processes; see `JointSaves.meet`."""
        self.check_parent()
        try:
            self._joint.meet()
        except BaseException as error:
            if not self._joint.have_met:
                raise
            self._earlier = error  # an interrupt; the others go on with this call

    def prepare(self, tree: PyTree, *, will_save: bool = True) -> None:
        """Prepare the first save; see `Describer.prepare`."""
        self.raise_earlier()
        self._parts.describer.prepare(tree, will_save=will_save)
        if will_save:
            self.queue.stand_by()

    def check(self) -> None:
        """Do nothing: `raise_earlier` raises, once the call has done its part."""

    def raise_earlier(self) -> None:
        """Raise what this call has found of earlier saves, once."""
        error, self._earlier = self._earlier, None
        if error is not None:
            raise error

    def add_earlier(self, error: BaseException) -> None:
        """Add what this call has found of earlier saves to an error that it raises.

        An interrupt is not added: the next call raises it.
        """
        earlier = self._earlier
        if isinstance(earlier, Exception) and earlier is not error:
            error.add_note(f"And: {earlier}")
            self._earlier = None

    def join(self) -> None:
        """Wait for all saves, and leave what `raise_earlier` raises to it."""
        self._ending_by(self.queue.wait)

    def wait(self) -> None:
        """Wait for all saves; as `JobQueue.wait`."""
        self.join()
        self.raise_earlier()

    def _ending_by(self, end: Callable[[], None]) -> None:
        try:
            end()
        except BaseException as error:
            self.add_earlier(error)
            raise

    @property
    def receiver(self) -> Receiver:
        """The receiver of traced calls, which several processes do not have.

        Raises:
            CheckpointError: Always.
        """
        raise CheckpointError(
            "update was called in a running JAX trace (jit, scan...), in a run of "
            f"{process_count()} processes: there, programs do not hand over what "
            "they save. Carry a flaxckpt.Snapshot through the program and save it "
            "afterwards, or call update between the parts of flaxckpt.scan_in_chunks."
        )

    @contextlib.contextmanager
    def telling_others(self) -> Generator[None]:
        """Tell the other processes of an error in what comes before `start`.

        They make the same call, and wait for this process there.
        """
        try:
            yield
        except BaseException as error:
            self._refuse(error)
            raise

    def decide(self, call: Call, *, now: bool) -> None:
        """Decide a due check, or leave it to the device that has the metric."""
        state = call.state
        assert state is not None
        # Do not ask whether the metric is computed yet: the processes would get
        # different answers.
        value = monitored(call.metric, call.logs.get(call.metric, 0))
        can_wait = self._parts.snapshot != "none" and not (now or call.saves)
        if isinstance(value, jax.Array) and can_wait:
            call.decision = Undecided()
        else:
            call.judge()
            self.report.decided(call)

    def start(self, tree: PyTree, call: Call, *, to_slot: bool) -> Path | None:
        """Copy the tree, and have a job agree with the other processes and write.

        The call first waits until the save before is on disk, in all processes.

        Args:
            tree: What to save.
            call: The call.
            to_slot: Whether the slot gets the whole tree, unless the series does.

        Returns:
            The path in the series; None if it is not known or the series gets nothing.

        Raises:
            CheckpointError: As `ModelCheckpoint.update` does. `raise_earlier` raises
                the error of any process in the save before.
        """
        job: Job | None = None
        try:
            job = self._claimed()
            path = self._prepare(job, tree, call, to_slot=to_slot)
        except BaseException as error:
            self._refuse(error, job)
            raise
        self._parts.submit(job)
        if self._parts.snapshot == "none":
            self.join()
        return path

    def close(self) -> None:
        """Wait for all saves, drop the memory of copies, and stop compiling."""
        try:
            self._ending_by(self.queue.close)
        finally:
            self._parts.ahead.stop()  # the end of the first save may have started it
        self.raise_earlier()

    # ---- on the loop's thread --------------------------------------------------------

    def _claimed(self) -> Job:
        """Wait for the save before, and keep its error for `raise_earlier`."""
        # Without a key, no save supersedes another: processes would differ in which
        # does.
        job = self.queue.claim(None, 1)
        assert job is not None
        self.report.count_delay(job.waited)
        try:
            self.queue.check()
        except Exception as error:
            self._earlier = error
        return job

    def _prepare(
        self, job: Job, tree: PyTree, call: Call, *, to_slot: bool
    ) -> Path | None:
        """Describe and copy what a job writes; return the path, if it is known."""
        parts = self._parts
        path = None if call.skips else parts.paths.known(call)
        contents = parts.describer.describe(
            tree, None, skips=call.skips, to_slot=to_slot
        )
        # Whether a scalar is computed by now differs between processes.
        contents.take_up_scalars(call, waits=True)
        for stored in contents.trees:
            check_parts(stored.layout, stored.leaves)
            # Unwrapping PRNG keys runs a program, which the background must not.
            stored.leaves = list(map(without_keys, stored.leaves))
            stored.kinds = kinds_of(stored.leaves)
        compile_next = self._copy(contents, call, job, to_slot=to_slot)
        write = functools.partial(self._write, compile_next)
        parts.prepare(job, contents, call, path, write=write)
        assert job.then is not None
        if is_leader():  # the others have nothing to delete
            job.then.after = self._sweep
        return path

    def _write(self, compile_next: Callable[[], None], contents: Contents) -> None:
        """Write, then compile: at once, compiling would take cores from the writing."""
        try:
            self._joint.write(contents)
        finally:
            compile_next()

    def _sweep(self) -> None:
        """Delete what retention has dropped, on a thread of its own.

        The other processes wait for the next save meanwhile, and not for this. The next
        call warns of what could not be deleted.
        """

        def sweep() -> None:
            try:
                self._series.area.sweep()
            except Exception as error:
                self.report.warn(f"Not all could be deleted: {in_one_line(error)}.")

        with contextlib.suppress(RuntimeError):  # no thread can be started
            threading.Thread(target=sweep, name="flaxckpt-sweep").start()

    def _refuse(self, error: BaseException, job: Job | None = None) -> None:
        """Have a job tell the other processes, which will wait for this one.

        This process raises the error at once, and does not wait for the save before.

        Args:
            error: The error.
            job: The job, if one is claimed.
        """
        self.add_earlier(error)
        job = job or self.queue.claim(None, sys.maxsize)
        assert job is not None
        path, job.memory = self.report.shown(None), None
        job.then = Job(path=path, run=functools.partial(self._joint.refuse, error))
        self.queue.submit(job)

    def _copy(
        self, contents: Contents, call: Call, job: Job, *, to_slot: bool
    ) -> Callable[[], None]:
        """Copy to where this process has room; processes may differ in that.

        Returns:
            A function to call once the save is over; see `SaverParts.fill`.
        """
        memory = job.memory
        if isinstance(call.decision, Undecided):  # the loop may donate the metric
            call.logs[call.metric] = jnp.copy(call.logs[call.metric])
        if call.skips and not to_slot:
            call.copies = memory or Copies(None, [], [])
            return nothing
        leaves, kinds = contents.leaves(call)
        if self._parts.snapshot == "none":
            call.copies = Copies(None, [], leaves)
            return nothing
        plan = self._parts.plans.plan(kinds)
        # What does not fit is freed before new memory is allocated.
        job.memory = memory = refitted(memory, plan) or refitted(
            self._parts.ahead.blank.take(), plan
        )
        is_on_device = memory is not None or self._parts.is_on_device(leaves)
        if isinstance(call.decision, Undecided):
            assert call.state is not None
            value = call.logs[call.metric]
            best = call.state.best_value, call.state.has_best
            if is_on_device and plan.is_on_one_mesh(value, *best):
                call.judge_on_device(value)
            else:
                call.judge()  # each process waits for its own value
                self.report.decided(call)
        if call.skips and not to_slot:
            call.copies = memory or Copies(None, [], [])  # memory for the next save
            return nothing
        if not is_on_device:
            call.copies = _on_host(contents, call, leaves)
            return nothing
        call.copies = unfilled(leaves, plan)
        return self._parts.fill(call.copies, leaves, memory, contents.wanted(call))


def _on_host(contents: Contents, call: Call, leaves: list[Any]) -> Copies:
    """Copy to the host's memory, and wait for the copies."""
    number = len(leaves) - len(contents.scalars)
    for name, value in zip(contents.scalars, leaves[number:], strict=True):
        call.keep(name, np.asarray(value)[()])
    contents.scalars, leaves = [], leaves[:number]
    return Copies(None, [], list(map(copied_off_device, leaves)))
