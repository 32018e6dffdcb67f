"""Saves on their way to the disk: copied on the loop's thread, written on another.

By default the training loop does not wait for a device, and waits for the disk only
when `max_in_flight` saves are already under way. If a due check depends on a value that
a device still computes, the device decides, and copies only if there is something to
save. The writing thread learns the decision later.
"""

import functools
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxckpt._checkpoints.series import Page, Series, Together
from flaxckpt._checkpoints.target import check_target
from flaxckpt._copies.held import Copies
from flaxckpt._copies.on_device import fill, unfilled
from flaxckpt._copies.on_host import copied_to_host, fits_on_device, memory_of_host
from flaxckpt._copies.plan import planned
from flaxckpt._decision.logs import Logs, find, plain_scalars
from flaxckpt._decision.state import CheckpointState, plain_state
from flaxckpt._decision.template import Template
from flaxckpt._direct.forms import has_form
from flaxckpt._direct.frozen_files import Frozen
from flaxckpt._orbax.engine import storable
from flaxckpt._runtime.failures import in_one_line
from flaxckpt._runtime.forks import use_threads
from flaxckpt._runtime.frames import outside
from flaxckpt._saving.call import Entry, fetched_value, is_unknown
from flaxckpt._saving.contents import (
    MAX_IN_FLIGHT,
    SMALL_BYTES,
    STRUCTURES,
    Incoming,
    Part,
    Parts,
    Save,
    Sent,
    refusal_of_nothing,
)
from flaxckpt._saving.job import Job
from flaxckpt._saving.queue import JobQueue
from flaxckpt._saving.report import SaveCounts
from flaxckpt._trees.describe import describe
from flaxckpt._trees.kinds_of_parts import Weights
from flaxckpt._trees.layout import Layout
from flaxckpt._trees.skeleton import Skeleton
from flaxckpt._trees.stored_weights import weights_skeleton
from flaxckpt._trees.ties import Flat, PyTree, flatten
from flaxckpt._trees.weights import are_unknown, default_weights
from flaxckpt.errors import CheckpointError, CheckpointPathError, CheckpointWriteError


class Saves:
    """The saves of one series.

    Attributes:
        counts: What became of them.
        has_failed: Whether a save has failed since `lost_best` last said so.
    """

    def __init__(
        self,
        template: Template,
        series: Series,
        *,
        weights: Weights,
        weights_only: bool,
        snapshot: str,
        max_in_flight: int | None,
        frozen: Frozen | None,
        best_only: bool,
        overwrite: bool,
        tell: Callable[[str], None] | None,
    ) -> None:
        """Start nothing yet.

        Args:
            template: The template of the paths.
            series: The series to save in.
            weights: Picks the weights from a tree.
            weights_only: Whether the series gets the weights alone.
            snapshot: Where to copy to: `"auto"`, `"device"`, `"host"` or `"none"`.
            max_in_flight: How many saves may be under way; None to go by their size.
            frozen: Which leaves are frozen; None if none are.
            best_only: Whether only improvements are saved, and no worse save replaces a
                better checkpoint.
            overwrite: Whether a worse save may replace a better one all the same.
            tell: Prints what is decided and saved; None to be silent.
        """
        self.counts = SaveCounts()
        self._template, self._series = template, series
        self._weights, self._weights_only = weights, weights_only
        self._snapshot, self._max_in_flight = snapshot, max_in_flight
        self._frozen, self._tell = frozen, tell
        self._best_only, self._overwrite = best_only, overwrite
        self._free: deque[Any] = deque(maxlen=STRUCTURES)
        self._located: deque[tuple[Layout, Skeleton]] = deque(maxlen=STRUCTURES)
        self._writer = JobQueue()
        self._is_new_to_weights = True
        self._has_saved = self._has_told_reason = False
        self.has_failed = False
        self._owes_place = False  # a warning has yet to say where this run saves aside
        weakref.finalize(self, self._writer.abandon)
        self._line = 0
        self._head: CheckpointState | None = None  # the state returned last
        self.check, self.wait = self._writer.check, self._writer.wait
        self.close, self.end_program = self._writer.close, self._writer.end_program

    def decide(self, entry: Entry, *, now: bool) -> None:
        """Decide a due check, or leave it to the device that computes the metric.

        Args:
            entry: The call; its `save` is True if it saves in any case.
            now: Whether to decide now in any case.
        """
        later = self._snapshot in ("auto", "device") and not (now or entry.save)
        if later and entry.unknown is not None:
            entry.save = None
        else:
            entry.judge()
            self.tell_decided(entry)

    def start(self, tree: PyTree, entry: Entry, *, lasts: bool) -> Path | None:
        """Check the call, copy the tree, and have a job write the copies.

        Args:
            tree: What to save.
            entry: The call.
            lasts: Whether to save the whole tree in the slot unless the series gets it.

        Returns:
            The path to be written; None if it is not known yet or nothing is saved.

        Raises:
            CheckpointError: As `ModelCheckpoint.update` does.
        """
        self._number(entry)
        if entry.save is False and not lasts:
            return None
        _refuse_processes()
        path, slot = self._targets(entry, lasts=lasts)
        save = self._described(tree, entry, lasts=lasts, path=path)
        self._open(slot if entry.save is False else path)
        if entry.save is None and self._start_later(save, entry):
            return path
        if entry.save is None:  # no job is free, or one program cannot take the arrays
            entry.judge()
            self.tell_decided(entry)
            if not (entry.save or lasts):
                return None
            save = self._described(tree, entry, lasts=lasts, path=path)
        where = path if entry.save else slot
        if where is not None:
            self._tell_saving(entry, where)
        job, waited = self._claim(save, entry)
        try:
            if waited:
                self._say(entry, f"waited {waited:.2f} s for the saves before")
            self._take_up_frozen(save, entry)
            self._copy_all(save, entry, job, where)
        except BaseException:
            self._writer.give_back(job)
            raise
        self._move_head(entry)
        self._submit(job)
        if self._snapshot == "none":
            self._writer.wait()
        return where

    # ---- from within a running program -----------------------------------------------

    def plan(
        self, tree: PyTree, logs: Logs | None, batch: Any, *, lasts: bool
    ) -> "Parts":
        """Check a traced call, and describe the trees that it may save.

        Args:
            tree: What to save; its arrays are traced.
            logs: The metrics; they may be traced.
            batch: Zero-based batch; None at the end of an epoch.
            lasts: Whether the call may save in the slot.

        Raises:
            CheckpointError: As `ModelCheckpoint.update` does.
        """
        _refuse_processes()
        sample = {
            name: np.zeros(value.shape, value.dtype)[()]
            if isinstance(value, jax.Array)
            and not jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
            else value
            for name, value in (logs or {}).items()
        }
        in_batch = None if batch is None else 0
        self._template.render(0, in_batch, sample)  # raises if no values can fill it in
        whole = None
        if lasts or not self._weights_only:
            whole = self._part(tree, is_traced=True)
        part = whole
        if self._weights_only or part is None:
            part = self._part(self._weights(tree), is_picked=True, is_traced=True)
            self._warn_of_unknown(tree)
        if self._frozen is not None and not (part.frozen or (whole and whole.frozen)):
            raise self._frozen.refuse_all(tree)
        return Parts(part, whole if lasts else None)

    def expect(self, parts: "Parts", entry: Entry, *, lasts: bool) -> "Incoming":
        """Claim a job, and memory for the leaves that a program hands over.

        It calls no JAX. It may wait for earlier saves. The caller must call `arrived`
        or `give_up` afterwards.

        Args:
            parts: The trees that the traced call may save.
            entry: The call.
            lasts: Whether to save the whole tree in the slot unless the series gets it.
        """
        self.check_parent()
        self._number(entry)
        path, slot = self._targets(entry, lasts=lasts)
        where = path if entry.save else slot
        self._open(where)
        part, whole = parts.copies()
        if entry.save:
            save = Save(part, whole if lasts else None, path)
        else:
            assert whole is not None
            save = Save(whole, whole, None)
        if where is not None:
            self.tell_decided(entry)
            self._tell_saving(entry, where)
        job, waited = self._claim(save, entry)
        try:
            if waited:
                self._say(entry, f"waited {waited:.2f} s for the saves before")
            self._take_up_frozen(save, entry)
            # Not the memory of a waiting save, which an error half-way would tear.
            reuse = None if job.content else job.memory
            memory = memory_of_host(parts.kinds, reuse)
        except BaseException:
            self._writer.give_back(job)
            raise
        return Incoming(job, save, entry, where, memory)

    def arrived(self, incoming: "Incoming") -> None:
        """Submit the job of a save whose memory is filled."""
        save, memory = incoming.save, incoming.memory
        leaves = [
            memory[leaf.index] if isinstance(leaf, Sent) else leaf
            for part in save.parts
            for leaf in part.leaves
        ]
        incoming.entry.copies = Copies(None, [], leaves)
        reuse = Copies(None, [], memory)
        self._prepare(incoming.job, save, incoming.entry, incoming.where, reuse)
        self._submit(incoming.job)

    def hold(self, incoming: "Incoming") -> None:
        """Keep the job of a save whose shards several threads hand over."""
        self._writer.hold(incoming.job)

    def give_up_all(self) -> None:
        """Give up the saves that this thread has begun and not submitted."""
        self._writer.take_back()

    def give_up(self, incoming: "Incoming") -> None:
        """Give up a save whose leaves have not come."""
        self._writer.give_back(incoming.job)

    def fail(self, error: BaseException, *, ends: bool = False) -> None:
        """Count a failed save, and keep its error as `JobQueue.fail` does."""
        self.counts.failed += 1
        self._writer.fail(error, self._shown(self._series.root), ends=ends)

    def check_parent(self) -> None:
        """Check that this process was not forked from one that saves.

        Raises:
            CheckpointLockedError: If it was forked from the one that made this object.
            CheckpointError: If it was forked from another one that used JAX.
        """
        if self._writer.is_inherited:
            raise self._series.area.inherited()
        use_threads()

    def lost_best(self) -> bool:
        """Tell, once, that a save has failed, so a state's best may not be on disk.

        False while a save is under way, which may write that best; and in several
        processes, which would have to agree.
        """
        is_one = jax.process_count() == 1
        if not (self.has_failed and is_one) or self._writer.is_working():
            return False
        self.has_failed = False
        return True

    @property
    def tells(self) -> bool:
        """Whether decisions are printed."""
        return self._tell is not None

    # ---- on the loop's thread --------------------------------------------------------

    def _targets(self, entry: Entry, *, lasts: bool) -> tuple[Path | None, Path | None]:
        """Return the checked paths of an entry: in the series, and in the slot."""
        path = None if entry.save is False else self._path(entry)
        slot = self._series.slot() if lasts else None
        if path is not None:
            self._check_path(path)
        if slot is not None:
            check_target(slot, self._series.root)
        return path, slot

    def _open(self, where: Path | None) -> None:
        try:
            self._series.area.open()
        except OSError as error:
            raise CheckpointWriteError(str(where), in_one_line(error)) from error

    def _path(self, entry: Entry) -> Path | None:
        """Fill in the template; return None if it shows a value still computed.

        Raises:
            TemplateError: If no values can fill it in.
        """
        logs, known = dict(entry.logs), True
        for name in [find(logs, each) for each in self._template.fields]:
            value = logs.get(name)
            if is_unknown(value):
                logs[name], known = np.zeros(value.shape, value.dtype), False
        path = self._template.render(entry.epoch, entry.batch, logs)
        return Path(path) if known else None

    def _described(
        self, tree: PyTree, entry: Entry, *, lasts: bool, path: Path | None
    ) -> Save:
        whole = None
        if lasts or not self._weights_only:
            whole = self._part(tree)
        part = whole
        if self._weights_only and (entry.save is not False or whole is None):
            part = self._part(self._weights(tree), is_picked=True)
            self._warn_of_unknown(tree)
        assert part is not None
        save = Save(part, whole if lasts else None, path)
        if self._frozen is not None and not any(part.frozen for part in save.parts):
            raise self._frozen.refuse_all(tree)
        self._take_up_scalars(save, entry)
        return save

    def _part(
        self,
        tree: PyTree,
        *,
        is_picked: bool = False,
        is_traced: bool = False,
    ) -> Part:
        """Describe a tree; if `is_picked`, all of it is weights."""
        flat = flatten(tree, self._free)
        if flat.is_free and flat.key not in self._free:
            self._free.append(flat.key)
        layout, leaves = describe(tree, storable, is_traced=is_traced, flat=flat)
        if all(leaf.is_from_like for leaf in layout.leaves):
            raise refusal_of_nothing(tree, is_picked=is_picked)
        skeleton = layout.skeleton if is_picked else self._locate(tree, layout, flat)
        frozen = [] if self._frozen is None else self._frozen.indices(tree)
        return Part(layout, leaves, skeleton, frozen)

    def _locate(self, tree: PyTree, layout: Layout, flat: Flat) -> Skeleton:
        """Return where in a tree the weights are.

        By default that depends on the layout only, so it is remembered. Layouts of one
        structure share one skeleton object.
        """
        if self._weights is not default_weights:
            return weights_skeleton(tree, self._weights, flat.leaves)
        for known, skeleton in self._located:
            if known.skeleton is layout.skeleton and known.leaves == layout.leaves:
                return skeleton
        skeleton = weights_skeleton(tree, self._weights, flat.leaves)
        self._located.appendleft((layout, skeleton))
        return skeleton

    def _warn_of_unknown(self, tree: PyTree) -> None:
        """Warn once if `default_weights` leaves nothing out of a tree."""
        if self._is_new_to_weights and self._weights is default_weights:
            self._is_new_to_weights = False
            if are_unknown(tree):
                warnings.warn(
                    "save_weights_only=True leaves nothing out of this "
                    f"{type(tree).__name__}: no optimizer's state, PRNG keys or "
                    "metrics are known in it. Pass weights=lambda tree: tree if the "
                    "whole tree is weights. Otherwise pass a function that picks the "
                    "weights.",
                    stacklevel=outside(),
                )

    def _take_up_frozen(self, save: Save, entry: Entry) -> None:
        """Note the frozen leaves of a save, once its job is claimed.

        A leaf that is stored already is not copied, unless another save is under way,
        which may change where it is stored.
        """
        if self._frozen is None:
            return
        entry.frozen, first = {}, 0
        is_alone = self._writer.is_idle()
        for part in save.parts:
            stays = (
                is_alone
                and self._series.may_write
                and has_form(part.layout, part.leaves)
            )
            for index in part.frozen:
                leaf = part.layout.leaves[index]
                if leaf.in_orbax and leaf.kind != "str":
                    value = part.leaves[index]
                    entry.frozen[first + index] = self._frozen.leaf(
                        value, is_known=stays
                    )
            first += len(part.leaves)

    def _take_up_scalars(self, save: Save, entry: Entry) -> None:
        """Have scalars on devices copied with the tree, since the loop may donate them.

        A scalar on other devices than the tree is fetched, if it is computed already.
        """
        scalars = entry.scalars()
        if not scalars:
            return
        arrays = [leaf for leaf in save.part.leaves if isinstance(leaf, jax.Array)]
        for name, value in scalars.items():
            beside = not arrays or value.sharding.device_set == (
                arrays[0].sharding.device_set
            )
            if beside or is_unknown(value):
                save.scalars.append(name)
            else:
                entry.keep(name, fetched_value(value))

    def _start_later(self, save: Save, entry: Entry) -> bool:
        """Let the device decide, if there is memory to copy to without waiting."""
        state, value = entry.state, entry.unknown
        if state is None or value is None:  # the metric is computed by now
            return False
        job = self._writer.claim(self._key(save, entry), self._limit(save), wait=False)
        if job is None:
            return False
        try:
            is_submitted = self._decide_later(save, entry, job, state, value)
        except BaseException:
            self._writer.give_back(job)
            raise
        if not is_submitted:
            self._writer.give_back(job)
        return is_submitted

    def _decide_later(
        self,
        save: Save,
        entry: Entry,
        job: Job,
        state: CheckpointState,
        value: jax.Array,
    ) -> bool:
        self._take_up_frozen(save, entry)
        leaves = save.leaves(entry)
        plan = planned(leaves)
        if not plan.is_on_one_mesh(value, state.best_value, state.has_best):
            return False
        memory: Copies | None = job.memory
        fits = memory is not None and memory.plan is plan
        if job.content is not None and len(plan.batches) > 1:
            return False  # an interrupt between two batches would tear what waits
        if not fits and (job.content is not None or not self._is_on_device(leaves)):
            return False
        into, always = memory if fits else None, save.whole is not None
        entry.copies = unfilled(leaves, plan)
        self._prepare(job, save, entry, save.path)
        entry.decide_on_device(state, value, leaves, into, always=always)
        self._move_head(entry)
        self._submit(job)
        return True

    def _claim(self, save: Save, entry: Entry) -> tuple[Job, float]:
        """Claim a job; return it, and the seconds that the call waited for it."""
        key, limit = self._key(save, entry), self._limit(save)
        job, waited = self._writer.claim(key, limit, wait=False), 0.0
        if job is None:
            start = time.perf_counter()
            job = self._writer.claim(key, limit)
            waited = time.perf_counter() - start
            self.counts.delayed += 1
            self.counts.delayed_secs += waited
        assert job is not None
        return job, waited

    def _prepare(
        self,
        job: Job,
        save: Save,
        entry: Entry,
        where: Path | None,
        memory: Copies | None = None,
    ) -> None:
        """Set what a job becomes once the entry's copies are filled."""
        key = self._key(save, entry)
        for part in (save.part, save.whole):
            if part is not None:
                part.leaves = []  # the copies take their place
        earlier: Save | None = job.content
        content = replace(earlier or save, entries=[entry])
        if earlier is not None:
            content.entries[:0] = earlier.entries
        copies = entry.copies
        assert copies is not None
        if memory is None and self._snapshot != "none":
            memory = copies.memory()
        job.then = Job(
            key,
            self._shown(where or self._series.root),
            functools.partial(self._run, content),
            self._series.area.sweep,
            content,
            memory,
            is_filled=lambda: copies.is_filled,
        )

    def _submit(self, job: Job) -> None:
        content: Save = job.then.content if job.then is not None else job.content
        *earlier, entry = content.entries
        is_sure = entry.save is True or (
            entry.save is False and content.whole is not None
        )
        self._writer.submit(job)
        for each in earlier if is_sure else ():
            each.copies = None  # superseded

    def _key(self, save: Save, entry: Entry) -> Any:
        """Return the key of a save: it supersedes a waiting save of an equal key."""
        on_device = isinstance(entry.save, jax.Array) or entry.save is None
        if on_device and save.whole is not None:
            return None  # the device decides between the series and the slot
        if entry.save is not False and save.path is None:
            return None
        where, line = save.path, entry.line
        if entry.save is False:
            where = line = None  # any later state supersedes it in the slot
        parts = [p for p in (save.part, save.whole) if p is not None]
        layouts = [(part.layout, part.weights) for part in parts]
        return where, line, save.scalars, layouts

    def _spares(self, entry: Entry) -> bool:
        """Tell whether an entry may not replace a better checkpoint."""
        state = entry.state
        by_policy = state is not None and state.save_best_only and not entry.by_hand
        return by_policy and not self._overwrite

    def _number(self, entry: Entry) -> None:
        """Number an entry's line: it may supersede only saves that it improves on.

        An entry goes on with the line if its state is the one returned last, unless it
        saves without a new best. A save by hand has a line of its own: it supersedes no
        save, and none supersedes it.
        """
        if entry.by_hand and self._best_only and not self._overwrite:
            entry.line = self._line + 1
            self._line += 2
        if entry.state is None or entry.before is None or not self._spares(entry):
            return
        goes_on = _are_same(entry.before, self._head)
        if not goes_on or not (
            entry.save is False or entry.save is None or entry.improves
        ):
            self._line += 1
        entry.line = self._line
        self._move_head(entry)

    def _move_head(self, entry: Entry) -> None:
        """Note the state of a call, as it is by now, as the one returned last."""
        if self._spares(entry):
            self._head = entry.state

    def _limit(self, save: Save) -> int:
        if self._max_in_flight is not None:
            return self._max_in_flight
        size = save.part.layout.nbytes
        if save.whole is not None and save.whole is not save.part:
            size += save.whole.layout.nbytes
        return min(max(SMALL_BYTES // max(size, 1), 1), MAX_IN_FLIGHT)

    def _copy_all(self, save: Save, entry: Entry, job: Job, where: Path | None) -> None:
        """Copy, and prepare the job before the copies overwrite what it would write."""
        leaves, memory = save.leaves(entry), job.memory
        if self._snapshot == "none":
            entry.copies = Copies(None, [], leaves)
            self._prepare(job, save, entry, where)
            return
        plan = planned(leaves)
        fits = memory is not None and memory.plan is plan
        if not (fits or self._is_on_device(leaves)):
            # Not into the memory of a waiting save, which an error half-way would tear.
            entry.copies = copied_to_host(leaves, None if job.content else memory)
            self._prepare(job, save, entry, where)
            return
        if not fits or (job.content and len(plan.batches) > 1):  # likewise
            job.memory = memory = None  # freed before new memory is allocated
        entry.copies = unfilled(leaves, plan)
        self._prepare(job, save, entry, where)
        fill(entry.copies, leaves, memory)

    def _is_on_device(self, leaves: list[Any]) -> bool:
        return self._snapshot == "device" or (
            self._snapshot == "auto" and fits_on_device(leaves)
        )

    # ---- in the background -----------------------------------------------------------

    def _run(self, save: Save) -> None:
        try:
            self._write(save)
        except BaseException:
            self.counts.failed += 1
            self.has_failed = True
            raise

    def _write(self, save: Save) -> None:
        """Write the last entry that saves, and delete what retention does not keep.

        Nothing is deleted before the new checkpoint is in its place.
        """
        settled = self._settled(save)
        if settled is not None:
            with self._series.area.turn:
                self._put(*settled)

    def _settled(self, save: Save) -> tuple[Entry, list[Page]] | None:
        """Wait for the copies; return the entry to write and its pages, if any."""
        newest = save.entries[-1].copies
        assert newest is not None
        # This waits without the interpreter's lock, which the loop needs.
        jax.block_until_ready((newest.arrays, newest.beside))
        entry = self._chosen(save)
        if entry is None:
            return None
        assert entry.copies is not None
        leaves = entry.copies.refilled(newest).leaves()
        for position, leaf in entry.frozen.items():
            if leaf.value is None:
                leaf.value = leaves[position]
            leaves[position] = leaf
        number = len(leaves) - len(save.scalars)
        for name, value in zip(save.scalars, leaves[number:], strict=True):
            entry.keep(name, np.asarray(value)[()])
        del leaves[number:]
        pages: list[Page] = []
        if entry.save:
            path = save.path
            if path is None:
                path = Path(self._template.render(entry.epoch, entry.batch, entry.logs))
                self._check(path)
                self._tell_saving(entry, path)
            part, number = save.part, len(save.part.layout.leaves)
            pages.append(Page(path, False, part.layout, leaves[:number], part.weights))
        if save.whole is not None and not (entry.save and save.whole is save.part):
            part, number = save.whole, len(save.whole.layout.leaves)
            own = leaves[len(leaves) - number :]
            slot = self._series.slot()
            pages.append(Page(slot, True, part.layout, own, part.weights))
        return entry, pages

    def _put(
        self, entry: Entry, pages: list[Page], together: Together | None = None
    ) -> None:
        """Write an entry, and delete what retention does not keep.

        The caller holds the area's turn, because other objects may write the series.

        Args:
            entry: The entry.
            pages: Its directories; the path of one that goes aside is changed.
            together: How several processes write each page; None for one process.
        """
        self._open(pages[0].path if pages else None)  # the lock may have been deleted
        state, logs = entry.kept, plain_scalars(entry.logs)
        step = entry.epoch + 1
        if state is not None and state.save_freq != "epoch":
            step = int(np.asarray(state.batches))
        is_direct = True
        for page in pages:
            rest, kept, path = list[Path](), None, page.path
            if self._best_only and not page.in_slot:
                rest, kept = self._place(page, entry, logs)
            swaps = kept is not None and page.path == kept
            task = self._series.put(
                page,
                entry.epoch,
                entry.batch,
                logs,
                None if state is None else plain_state(state),
                step=step,
                time=entry.time,
                weights_only=self._weights_only and not page.in_slot,
                together=together,
            )
            if task is not None:
                is_direct = is_direct and task.marks is not None
                self._warn_of_fault(page.path, task.fault)
            if swaps and kept is not None:
                page.path = path
                kept = kept if self._series.swap(kept, path) else None
            self._series.drop(rest)
            if kept is not None:
                self._warn_of_kept(page.path, kept)
            self._say(entry, f"finished saving model to {self._shown(page.path)}")
        if entry.save:
            for problem in self._series.prune(resumable=not self._weights_only):
                self._writer.warn(problem)
        self.counts.saved += 1
        self.counts.direct += is_direct
        self.counts.by_orbax += not is_direct
        if self._frozen is not None:
            self.counts.linked_bytes = self._frozen.linked_bytes

    def _place(
        self, page: Page, entry: Entry, logs: Logs
    ) -> tuple[Sequence[Path], Path | None]:
        """Choose where a page goes if a better checkpoint may be at its path.

        A worse page goes aside, but a page saved by hand gets its path: in a store the
        better checkpoint is copied aside first. On a disk the page goes aside, and the
        caller swaps the two once the page is written, so the path is never missing.

        Returns:
            The checkpoints to delete once the page is written, and the place for the
            better checkpoint; None if that stays where it is.
        """
        state, path = entry.kept, page.path
        placed = self._series.place(
            path, logs, overwrite=self._overwrite, by_hand=entry.by_hand
        )
        chosen, rest = placed.path, placed.rest
        if placed.reason and not self._has_told_reason and chosen != path:
            self._has_told_reason = True
            self._writer.warn(
                f"{self._shown(path)!r} is not replaced: {placed.reason}. What this "
                f"run saves goes to {self._shown(chosen)!r}. To replace it, pass "
                "overwrite=True."
            )
        if placed.kept is not None:
            if self._series.area.is_mirror:
                is_moved = self._series.make_way(path, placed.kept)
                return rest, placed.kept if is_moved else None
            page.path = placed.kept
            return rest, placed.kept
        page.path = chosen
        if chosen != path:
            better, own = self._shown(path), self._shown(chosen)
            self._say(entry, f"{better} has a better one: this one goes to {own}")
        is_news = not self._has_saved or (self._owes_place and chosen != path)
        if state is not None and is_news and not self._overwrite:
            self._warn_of_better(state, chosen if chosen != path else None)
        self._has_saved = True
        return rest, None

    def _warn_of_fault(self, path: Path, fault: Exception | None) -> None:
        if fault is not None:
            self._series.may_write = False
            self._writer.warn(
                f"Orbax wrote {self._shown(path)!r} after flaxckpt's direct way had "
                f"failed ({in_one_line(fault)}). Nothing is lost but time: Orbax "
                "writes from now on. Please report it."
            )

    def _warn_of_kept(self, path: Path, kept: Path) -> None:
        """Warn that a better checkpoint is aside, since a save by hand has its path."""
        here, aside = self._shown(path), self._shown(kept)
        self._writer.warn(
            f"save() took the place of a better checkpoint at {here!r}, which is kept "
            f"at {aside!r}. To replace it, pass overwrite=True."
        )

    def _warn_of_better(self, state: CheckpointState, aside: Path | None) -> None:
        """Warn if a checkpoint on disk is better than the best that the run knows."""
        best, own = self._series.best_value(), plain_state(state)["best"]
        if best is None or (
            own is not None and (best >= own if state.mode == "min" else best <= own)
        ):
            return
        self._owes_place = aside is None
        shown, own_shown = _apart(best, best if own is None else own)
        of_run = "it has none yet" if own is None else f"its own best is {own_shown}"
        there, how = self._shown(self._series.root), ""
        if aside is not None:
            how = (
                "The better one stays, and this run's is saved aside until it is "
                f"better, at {self._shown(aside)!r}; to replace the better one, pass "
                "overwrite=True. "
            )
        self._writer.warn(
            f"{there!r} has a checkpoint of an earlier run with {state.monitor} "
            f"{shown}, which this run does not know of: {of_run}. {how}To go on "
            "from the better one, begin with ckpt.restore(like=tree)."
        )

    def _check(self, path: Path) -> None:
        self._check_path(path)

    def _check_path(self, path: Path) -> None:
        """Check that a checkpoint can be written at a path, outside of the slot."""
        at = [slot for slot in self._series.slots if f"{path}/".startswith(f"{slot}/")]
        if at and (slot := self._series.slot()) in at:
            raise CheckpointPathError(
                self._shown(slot),
                "is where the last state is kept. Pass another filepath, or another "
                "name as save_last.",
            )
        check_target(path, self._series.root)

    def _chosen(self, save: Save) -> Entry | None:
        """Take up what devices have decided, and return the entry to write, if any."""
        for entry in save.entries:
            entry.take_verdict()  # if an interrupt kept the call from that
            if isinstance(entry.save, jax.Array):
                entry.save = bool(entry.save)
                self.tell_decided(entry)
                if entry.save and save.path is not None:
                    self._tell_saving(entry, save.path)
        wanted = [entry for entry in save.entries if entry.save]
        if save.whole is not None:
            wanted = wanted or save.entries
        self.counts.superseded += max(len(wanted) - 1, 0)
        for entry in wanted[:-1]:
            self._say(entry, "superseded by a newer one before it was written")
        return wanted[-1] if wanted else None

    # ---- what verbose says -----------------------------------------------------------

    def _shown(self, path: Path) -> str:
        return str(self._series.area.shown(path))

    def _say(self, entry: Entry, message: str) -> None:
        if self._tell is not None:
            self._tell(f"Epoch {entry.epoch + 1}: {message}")

    def _tell_saving(self, entry: Entry, path: Path) -> None:
        self._say(entry, f"{entry.news}saving model to {self._shown(path)}")

    def tell_decided(self, entry: Entry) -> None:
        """Print a decision as Keras does, or keep it for the message about the save."""
        state = entry.kept
        if self._tell is None or state is None or not state.save_best_only:
            return
        before = np.asarray(entry.before.best) if entry.before is not None else np.nan
        old = "None" if np.isnan(before) else f"{before:.5f}"
        new = np.asarray(state.best)
        if entry.save and new != before and not np.isnan(new):
            entry.news = f"{state.monitor} improved from {old} to {new:.5f}, "
        elif not entry.save and entry.metric in entry.logs:
            if np.isnan(float(entry.logs[entry.metric])):
                self._say(entry, f"{state.monitor} is nan, which is no improvement")
            else:
                self._say(entry, f"{state.monitor} did not improve from {old}")


def _are_same(one: CheckpointState, other: CheckpointState | None) -> bool:
    """Tell whether two states are known to have the same best."""
    if other is None:
        return False
    if one.best_value is other.best_value:
        return True
    bests = one.best_value, one.has_best, other.best_value, other.has_best
    if not all(isinstance(value, np.generic) for value in bests):
        return False
    return bests[:2] == bests[2:]


def _apart(one: float, other: float) -> tuple[str, str]:
    """Show two numbers with five digits, or as many as tell them apart."""
    digits = 5
    while one != other and digits < 17 and f"{one:.{digits}g}" == f"{other:.{digits}g}":
        digits += 1
    return f"{one:.{digits}g}", f"{other:.{digits}g}"


def _refuse_processes() -> None:
    if jax.process_count() > 1:
        raise CheckpointError(
            f"This is one of {jax.process_count()} processes, which was not known when "
            "the ModelCheckpoint was made. Make it after jax.distributed.initialize()."
        )
