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

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxckpt._checkpoints.series import Page
from flaxckpt._checkpoints.write import learn_form, write_share
from flaxckpt._copies.held import Copies
from flaxckpt._copies.on_device import copy_on_device, unfilled
from flaxckpt._copies.on_host import copied_to_host
from flaxckpt._copies.plan import planned
from flaxckpt._decision.scalars import monitored
from flaxckpt._direct.form import Share
from flaxckpt._direct.forms import has_form
from flaxckpt._disk.alias import is_plain
from flaxckpt._pods.agreement import (
    ALLOWED,
    SEVERAL,
    agree,
    in_process,
    nothing,
    placed,
    summary,
    translated_for_all,
)
from flaxckpt._pods.learning import exchanged_with_all, one_path
from flaxckpt._processes.messages import Channel, Round, is_leader, process_count
from flaxckpt._runtime.failures import space_told
from flaxckpt._saving.call import Entry
from flaxckpt._saving.contents import Parts, Save
from flaxckpt._saving.job import Job
from flaxckpt._saving.saves import Saves
from flaxckpt._trees.leaf import without_keys
from flaxckpt._trees.ties import PyTree
from flaxckpt.errors import CheckpointError, SettingError


class PodSaves(Saves):
    """The saves of one series by several processes."""

    def __init__(self, *args: Any, timeout: float, **settings: Any) -> None:
        """Start nothing yet.

        Args:
            *args: As for `Saves`.
            timeout: How long to wait for another process, in seconds.
            **settings: As for `Saves`.

        Raises:
            SettingError: If a setting works in one process only.
        """
        for name, allowed in ALLOWED.items():
            if settings[name] not in allowed:
                raise SettingError(
                    name, settings[name], f"{SEVERAL} pass one of {allowed}."
                )
        if not is_leader():
            settings["tell"] = None
        super().__init__(*args, **settings)
        self._channel = Channel(self._series.name, timeout)
        self._round: Round | None = None
        self.check = nothing  # `start` checks, at the same call in all processes

    def decide(self, entry: Entry, *, now: bool) -> None:
        """Decide a due check, or leave it to the device that has the metric."""
        state = entry.state
        assert state is not None
        value = None
        if state.save_best_only:
            value = monitored(entry.metric, entry.logs.get(entry.metric, 0))
        # Whether the metric is computed yet does not count: processes would differ.
        can_wait = self._snapshot != "none" and not (now or entry.save)
        if isinstance(value, jax.Array) and can_wait:
            entry.save = None
        else:
            entry.judge()
            self.tell_decided(entry)

    def start(self, tree: PyTree, entry: Entry, *, lasts: bool) -> Path | None:
        """Copy the tree, and have a job agree with the other processes and write.

        The call first waits until the save before is on disk, in all processes.

        Args:
            tree: What to save.
            entry: The call.
            lasts: Whether to save the whole tree in the slot unless the series gets it.

        Returns:
            The path in the series; None if it is not known or the series gets nothing.

        Raises:
            CheckpointError: As `ModelCheckpoint.update` does; also the error of another
                process in the save before.
        """
        path = None if entry.save is False else self._path(entry)
        save = self._described(tree, entry, lasts=lasts, path=None)
        for part in save.parts:
            # Unwrapping PRNG keys runs a program, which the background must not.
            part.leaves = list(map(without_keys, part.leaves))
        job, _ = self._claim(save, entry)  # waits for the save before
        try:
            self._writer.check()  # raises the error of any process in that save
            for part in save.parts:
                if not has_form(part.layout, part.leaves):
                    self._learn(part.layout, part.leaves)
            self._copy(save, entry, job, lasts=lasts)
        except BaseException:
            self._writer.give_back(job)
            raise
        self._prepare(job, save, entry, path)
        self._submit(job)
        if self._snapshot == "none":
            self._writer.wait()
        return path

    def plan(self, *_: Any, **__: Any) -> Parts:
        """Refuse a traced call."""
        raise CheckpointError(
            "update was called in a running JAX trace (jit, scan...), in one of "
            f"{process_count()} processes: there, programs do not hand over what "
            "they save. Carry a flaxckpt.Snapshot through the program and save it "
            "afterwards, or call update between the parts of flaxckpt.scan_in_chunks."
        )

    # ---- on the loop's thread --------------------------------------------------------

    def _key(self, save: Save, entry: Entry) -> Any:
        """Return None: processes would differ in which save supersedes which."""

    def _limit(self, save: Save) -> int:
        return 1

    def _take_up_scalars(self, save: Save, entry: Entry) -> None:
        arrays = [leaf for leaf in save.part.leaves if isinstance(leaf, jax.Array)]
        for name, value in entry.scalars().items():
            if arrays and value.sharding.device_set == arrays[0].sharding.device_set:
                save.scalars.append(name)
            else:  # a process in which it is not computed yet waits for it
                entry.keep(name, np.asarray(value)[()])

    def _check(self, path: Path) -> None:
        """Check nothing here: process 0 checks the paths when it writes."""

    def _learn(self, layout: Any, leaves: list[Any]) -> None:
        """Have Orbax write a tree once, to learn the form of its files."""
        exchange, area = self._channel.round(), self._series.area
        with contextlib.ExitStack() as stack:
            exchanged = None
            if area.is_mirror:
                directory = stack.enter_context(one_path(exchange, None))
                exchanged = functools.partial(exchanged_with_all, exchange)
            else:
                directory = self._shared_directory(exchange, stack)
                if not is_plain(directory):
                    directory = stack.enter_context(one_path(exchange, directory))
            try:
                learn_form(directory / "learnt", layout, leaves, exchanged)
                exchange.tell("learnt", None)
            except Exception as error:
                failure = self._translated(error)
                for subject in ("files", "learnt"):
                    exchange.tell(subject, failure, again=True)
                raise failure from error
            exchange.hear_all("learnt")  # before the directory is deleted
        if is_leader() and not area.is_mirror:
            area.sweep()

    def _shared_directory(self, exchange: Round, stack: contextlib.ExitStack) -> Path:
        """Return a directory that process 0 makes and all processes see.

        Raises:
            CheckpointError: If process 0 cannot make it, or another does not see it.
        """
        if is_leader():
            try:
                self._open(None)
                staging = self._series.area.staging()
                directory = str(stack.enter_context(staging))
            except (OSError, CheckpointError) as error:
                exchange.tell("where", self._translated(error))
            else:
                exchange.tell("where", directory)
        directory = Path(exchange.hear("where"))
        exchange.tell("seen", directory.is_dir())
        seen = exchange.hear_all("seen")
        if not all(seen):
            blind = [str(index) for index, is_seen in enumerate(seen) if not is_seen]
            raise CheckpointError(
                f"{str(self._series.root)!r} is not the same directory in all "
                f"processes: what process 0 has made there is not there in process "
                f"{', '.join(blind)}. Save on a file system that all of them share, or "
                "in an object store."
            )
        return directory

    def _translated(
        self, error: BaseException, path: Path | None = None
    ) -> CheckpointError:
        return translated_for_all(error, self._shown(path or self._series.root))

    def _copy(self, save: Save, entry: Entry, job: Job, *, lasts: bool) -> None:
        """Copy to where this process has room; processes may differ in that."""
        state, memory = entry.state, job.memory
        if entry.save is None and state is not None:  # the loop may donate the metric
            entry.logs[entry.metric] = jnp.copy(entry.logs[entry.metric])
        if entry.save is False and not lasts:
            entry.copies = memory or Copies(None, [], [])
            return
        leaves = save.leaves(entry)
        if self._snapshot == "none":
            entry.copies = Copies(None, [], leaves)
            return
        plan = planned(leaves)
        has_memory = memory is not None and memory.plan is plan
        is_on_device = has_memory or self._is_on_device(leaves)
        if is_on_device and not has_memory:
            job.memory = memory = None  # freed before new memory is allocated
        if entry.save is None and state is not None:
            value = entry.logs[entry.metric]
            best = state.best_value, state.has_best
            if is_on_device and plan.is_on_one_mesh(value, *best):
                always = save.whole is not None
                entry.copies = unfilled(leaves, plan)
                entry.decide_on_device(state, value, leaves, memory, always=always)
                return
            entry.judge()  # each process waits for its own value
            self.tell_decided(entry)
        if not (entry.save or lasts):
            entry.copies = memory or Copies(None, [], [])
        elif is_on_device:
            entry.copies = copy_on_device(leaves, memory, plan)
        else:
            entry.copies = self._on_host(save, entry, leaves, memory)

    def _on_host(
        self, save: Save, entry: Entry, leaves: list[Any], memory: Copies | None
    ) -> Copies:
        number = len(leaves) - len(save.scalars)
        for name, value in zip(save.scalars, leaves[number:], strict=True):
            entry.keep(name, np.asarray(value)[()])
        save.scalars, leaves = [], leaves[:number]
        copies = copied_to_host(leaves, memory)
        copies.beside = list(map(placed, copies.beside, leaves))
        return copies

    # ---- in the background -----------------------------------------------------------

    def _write(self, save: Save) -> None:
        """Agree with the other processes, and write this process's part."""
        exchange, earlier = self._channel.round(), self._round
        self._round, pages = exchange, list[Page]()
        settled: tuple[Entry, list[Page]] | None = None
        try:
            settled = self._settled(save)
            pages = [] if settled is None else settled[1]
            paths = ["the last" if p.in_slot else self._shown(p.path) for p in pages]
            exchange.tell("check", summary(save.entries[-1], paths))
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
        settled: tuple[Entry, list[Page]] | None,
    ) -> None:
        index = 0

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
                entry, pages = settled
                self._open(pages[0].path)
                self._targets(entry, lasts=any(page.in_slot for page in pages))
                with self._series.area.turn:
                    self._put(entry, pages, together)
        except BaseException as error:
            failure = self._translated(error)
            for subject in (f"where {index}", f"where {index + 1}", "done"):
                exchange.tell(subject, failure, again=True)
            raise failure from failure.__cause__
        exchange.tell("done", None)

    def _follow(self, exchange: Round, pages: Sequence[Page]) -> None:
        for index, page in enumerate(pages):
            place, area = exchange.hear(f"where {index}"), self._series.area
            try:
                with area.share(place) as directory, self._space_told(page, directory):
                    share = write_share(
                        directory, page.layout, page.leaves, sync=area.sync
                    )
                exchange.tell(f"share {index}", share)
            except BaseException as error:
                exchange.tell(f"share {index}", self._translated(error, page.path))
        exchange.hear("done")
        if pages:
            self.counts.saved += 1
            self.counts.direct += 1

    def _space_told(
        self, page: Page, directory: Path
    ) -> contextlib.AbstractContextManager[None]:
        shown, here = self._shown(page.path), in_process()
        return space_told(shown, page.layout.nbytes, directory, here)
