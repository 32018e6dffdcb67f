"""Saves of several processes: each writes its shards, and process 0 writes the rest.

All processes make the same calls. At a due check each process copies its shards, on its
devices or to its host, and goes on. Threads in the background then compare what they
have decided. If all agree, process 0 makes the directory, and each process writes the
files of its shards. When all files are on disk, process 0 writes the record and gives
the checkpoint its name. A save enters no collective, on the loop's thread or in the
background, so it cannot wait for one that another process does not enter. Each message
has a time-out.

An error in any process is raised in all processes at the same call: the next due check,
`save`, `wait` or `close`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxckpt._checkpoints.series_writer import Page
from flaxckpt._checkpoints.together import write_share
from flaxckpt._copies.held import Copies, fits
from flaxckpt._copies.on_device import copy_on_device, fill, unfilled
from flaxckpt._copies.on_host import copied_to_host
from flaxckpt._copies.plan import kinds_of
from flaxckpt._decision.scalars import monitored
from flaxckpt._direct.shares import Share
from flaxckpt._pods.agreement import (
    agree,
    in_process,
    summary,
    translated_for_all,
    with_sharding,
)
from flaxckpt._pods.learning import learn
from flaxckpt._processes.messages import Channel, Round, is_leader, process_count
from flaxckpt._runtime.failures import space_told
from flaxckpt._saving.call import Call, Undecided
from flaxckpt._saving.contents import Contents
from flaxckpt._saving.job import Job
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
        self.wait, self.close = parts.queue.wait, parts.queue.close
        self.check_parent, self.lost_best = parts.check_parent, parts.lost_best
        self.compile_ahead = parts.describer.compile_ahead
        self._channel = Channel(self._series.name, timeout)
        self._round: Round | None = None

    def check(self) -> None:
        """Do nothing: `start` checks, at the same call in all processes."""

    @property
    def receiver(self) -> Receiver:
        """The receiver of traced calls, which several processes do not have.

        Raises:
            CheckpointError: Always.
        """
        raise CheckpointError(
            "update was called in a running JAX trace (jit, scan...), in one of "
            f"{process_count()} processes: there, programs do not hand over what "
            "they save. Carry a flaxckpt.Snapshot through the program and save it "
            "afterwards, or call update between the parts of flaxckpt.scan_in_chunks."
        )

    def decide(self, call: Call, *, now: bool) -> None:
        """Decide a due check, or leave it to the device that has the metric."""
        state = call.state
        assert state is not None
        value = None
        if state.save_best_only:
            value = monitored(call.metric, call.logs.get(call.metric, 0))
        # Do not ask whether the metric is computed yet: the processes would get
        # different answers.
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
            CheckpointError: As `ModelCheckpoint.update` does; also the error of another
                process in the save before.
        """
        parts = self._parts
        path = None if call.skips else parts.paths.known(call)
        contents = parts.describer.describe(
            tree, None, skips=call.skips, to_slot=to_slot
        )
        contents.take_up_scalars(call, waits=True)  # processes would differ in that
        for stored in contents.trees:
            # Unwrapping PRNG keys runs a program, which the background must not.
            stored.leaves = list(map(without_keys, stored.leaves))
            stored.kinds = kinds_of(stored.leaves)
        # This waits for the save before. Without a key, no save supersedes another:
        # processes would differ in which does.
        job = self.queue.claim(None, 1)
        assert job is not None
        self.report.count_delay(job.waited)
        try:
            self.queue.check()  # raises the error of any process in that save
            for stored in contents.trees:
                if not parts.disk.way.forms.has(stored.layout, stored.leaves):
                    learn(self._channel.round(), parts, stored.layout, stored.leaves)
            self._copy(contents, call, job, to_slot=to_slot)
        except BaseException:
            self.queue.give_back(job)
            raise
        parts.prepare(job, contents, call, path, write=self._write)
        parts.submit(job)
        if parts.snapshot == "none":
            self.wait()
        return path

    # ---- on the loop's thread --------------------------------------------------------

    def _translated(
        self, error: BaseException, path: Path | None = None
    ) -> CheckpointError:
        return translated_for_all(error, self.report.shown(path))

    def _copy(self, contents: Contents, call: Call, job: Job, *, to_slot: bool) -> None:
        """Copy to where this process has room; processes may differ in that."""
        state, memory = call.state, job.memory
        if isinstance(call.decision, Undecided):  # the loop may donate the metric
            call.logs[call.metric] = jnp.copy(call.logs[call.metric])
        if call.skips and not to_slot:
            call.copies = memory or Copies(None, [], [])
            return
        leaves, kinds = contents.leaves(call)
        if self._parts.snapshot == "none":
            call.copies = Copies(None, [], leaves)
            return
        plan = self._parts.plans.plan(kinds)
        has_memory = fits(memory, plan)
        is_on_device = has_memory or self._parts.is_on_device(leaves)
        if is_on_device and not has_memory:
            job.memory = memory = None  # freed before new memory is allocated
        if isinstance(call.decision, Undecided):
            assert state is not None
            value = call.logs[call.metric]
            best = state.best_value, state.has_best
            if is_on_device and plan.is_on_one_mesh(value, *best):
                call.judge_on_device(value)
                call.copies = unfilled(leaves, plan)
                fill(call.copies, leaves, memory, contents.wanted(call))
                return
            call.judge()  # each process waits for its own value
            self.report.decided(call)
        if call.skips and not to_slot:
            call.copies = memory or Copies(None, [], [])
        elif is_on_device:
            call.copies = copy_on_device(leaves, memory, plan)
        else:
            call.copies = _on_host(contents, call, leaves, memory)

    # ---- in the background -----------------------------------------------------------

    def _write(self, contents: Contents) -> None:
        """Agree with the other processes, and write this process's part."""
        exchange, earlier = self._channel.round(), self._round
        self._round, pages = exchange, list[Page]()
        shown = self.report.shown
        settled: tuple[Call, list[Page]] | None = None
        try:
            settled = self._parts.publisher.pages_to_write(contents, _no_check)
            pages = [] if settled is None else settled[1]
            paths = ["the last" if p.in_slot else shown(p.path) for p in pages]
            exchange.tell("check", summary(contents.calls[-1], paths))
        except BaseException as error:
            exchange.tell("check", self._translated(error))
        if is_leader():
            self._lead(exchange, earlier, settled)
        else:
            self._follow(exchange, pages)

    def _lead(
        self,
        exchange: Round,
        earlier: Round | None,
        settled: tuple[Call, list[Page]] | None,
    ) -> None:
        index, parts = 0, self._parts

        def together(
            written: Path, write: Callable[[], list[Share]]
        ) -> list[list[Share]]:
            nonlocal index
            assert settled is not None
            target = settled[1][index].path
            place = self._series.area.meeting_place(written, target)
            exchange.tell(f"where {index}", place)
            exchange.tell(f"share {index}", write())
            shares = exchange.hear_all(f"share {index}")
            index += 1
            return shares

        try:
            agree(exchange.hear_all("check"))
            if earlier is not None:
                earlier.forget()
            if settled is not None:
                call, pages = settled
                parts.paths.take_lock(pages[0].path)
                parts.paths.checked(call, to_slot=any(page.in_slot for page in pages))
                with self._series.area.claim.turn:
                    parts.publisher.put(call, pages, together)
        except BaseException as error:
            failure = self._translated(error)
            for subject in (f"where {index}", f"where {index + 1}", "done"):
                exchange.tell(subject, failure, again=True)
            raise failure from failure.__cause__
        exchange.tell("done", None)

    def _follow(self, exchange: Round, pages: Sequence[Page]) -> None:
        shown, area, who = self.report.shown, self._series.area, in_process()
        for index, page in enumerate(pages):
            place = exchange.hear(f"where {index}")
            try:
                with (
                    area.share(place) as here,
                    space_told(shown(page.path), page.layout.nbytes, here, who),
                ):
                    forms, what = self._parts.disk.way.forms, (page.layout, page.leaves)
                    share = write_share(forms, here, *what, sync=area.sync)
                exchange.tell(f"share {index}", share)
            except BaseException as error:
                exchange.tell(f"share {index}", self._translated(error, page.path))
        exchange.hear("done")
        if pages:
            self.counts.saved += 1
            self.counts.direct += 1


def _no_check(path: Path) -> None:
    """Check nothing: process 0 checks the paths when it writes."""


def _on_host(
    contents: Contents, call: Call, leaves: list[Any], memory: Copies | None
) -> Copies:
    number = len(leaves) - len(contents.scalars)
    for name, value in zip(contents.scalars, leaves[number:], strict=True):
        call.keep(name, np.asarray(value)[()])
    contents.scalars, leaves = [], leaves[:number]
    copies = copied_to_host(leaves, memory)
    copies.beside = list(map(with_sharding, copies.beside, leaves))
    return copies
