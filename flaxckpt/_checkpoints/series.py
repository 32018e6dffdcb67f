"""A series of checkpoints: what one template has on disk, and what may go.

A series has its checkpoints and a `last` slot, which holds the newest state whenever no
checkpoint holds all of it. A reader lists the disk. The writer holds the series' lock,
so no other process changes it, and remembers what is there: with 10,000 checkpoints,
reading all records again takes a second.
"""

import datetime
import functools
import hashlib
import math
import os
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from flaxckpt._checkpoints.aside import (
    Placed,
    bare,
    placed,
    places_aside,
    without_suffix,
)
from flaxckpt._checkpoints.looks import shared_looks
from flaxckpt._checkpoints.retention import (
    PreservationPolicy,
    best_of,
    expired,
    monitored_value,
    ranked,
)
from flaxckpt._checkpoints.target import check_target
from flaxckpt._checkpoints.write import write_checkpoint, write_together
from flaxckpt._decision.template import Template
from flaxckpt._direct.form import Share
from flaxckpt._direct.frozen_files import Frozen
from flaxckpt._disk.commit import Area, OccupiedError
from flaxckpt._disk.info import CheckpointInfo
from flaxckpt._disk.listing import Infos, LeftOut, list_below
from flaxckpt._disk.open import leads_nowhere
from flaxckpt._disk.record import is_of, read_record, set_aside
from flaxckpt._disk.record_fields import LAST_TIME
from flaxckpt._object_store.commit import Mirror
from flaxckpt._orbax.state_handler import Task
from flaxckpt._runtime.failures import space_told
from flaxckpt._trees.layout import Layout
from flaxckpt._trees.skeleton import Skeleton
from flaxckpt.errors import CheckpointCorruptError, CheckpointError, CheckpointPathError

# Has several processes write their shares of a checkpoint, and returns all shares.
Together: TypeAlias = Callable[[Path, Callable[[], list[Share]]], list[list[Share]]]
# The slot is a series of its own: this follows the name of the checkpoints' series.
_SLOT_SERIES = " (last)"
_TICK = datetime.timedelta(microseconds=1)


@dataclass
class Page:
    """One directory to write, and what goes into it.

    Attributes:
        path: The directory.
        in_slot: Whether it is the slot.
        layout: The tree's layout.
        leaves: Its leaves.
        weights: Where in the layout the weights are.
    """

    path: Path
    in_slot: bool
    layout: Layout
    leaves: list[Any]
    weights: Skeleton


class Series:
    """What one template has on disk.

    Attributes:
        root: The directory that has all of it.
        name: The series' name.
        area: The area that writes it.
        slots: The two paths that the slot may have, the preferred one first.
    """

    def __init__(
        self,
        template: Template,
        slot: Path,
        *,
        policy: PreservationPolicy | None,
        monitor: str,
        mode: str,
        dtype: Any,
        sync: bool,
        compress: bool,
        may_write: bool,
        frozen: Frozen | None,
        in_store: bool,
    ) -> None:
        """Describe the series; touch nothing.

        Args:
            template: The template of its paths.
            slot: The preferred path of the slot.
            policy: Tells which of its checkpoints to keep; None keeps all.
            monitor: Key in the logs of the value by which a checkpoint is the best.
            mode: `"min"`, `"max"`, or `"auto"` if there is no best.
            dtype: The dtype in which the values are compared.
            sync: Whether to wait for the disk.
            compress: Whether to compress the arrays.
            may_write: Whether values may be written straight from memory.
            frozen: Which leaves are frozen; None if none are.
            in_store: Whether the paths are in a mirror of an object store.
        """
        self.root = Path(template.root)
        self._template, self.name = template, template.name
        self._tag = hashlib.sha256(os.fsencode(self.name)).hexdigest()[:8]
        self.slots = slot, slot.with_name(f"{slot.name}-{self._tag}")
        self._policy, self._monitor, self._mode = policy, monitor, mode
        self._dtype = dtype
        self._compress, self._frozen = compress, frozen
        self.may_write = may_write
        self._looks = shared_looks()
        make = Mirror if in_store else Area
        self.area = make(
            self.root,
            (self.name, self.name + _SLOT_SERIES),
            template.depth,
            sync=sync,
        )
        self._known: _Known | None = None

    # ---- reading ---------------------------------------------------------------------

    def listed(self) -> tuple[Infos, list[LeftOut]]:
        """List the checkpoints, oldest first, and an error for each that is left out.

        Each of these is damaged or unreadable, and `may_be_ours` tells if it matters.
        """
        template = self._template
        self.area.refresh()
        with self.area.committing:  # so the names of listed checkpoints are on disk
            infos, damaged = list_below(template.root, template.depth)
        return tuple(filter(self._is_own, infos)), [
            self._shown(error) for error in damaged
        ]

    def _is_own(self, info: CheckpointInfo) -> bool:
        """Tell whether a checkpoint is of this series.

        If it was copied or renamed by hand, the template must be able to give its name.
        """
        if info.series != self.name:
            return False
        place = self._saved_as(info.path)
        return info.saved_as in (None, place) or self._template.may_give(
            place.split("/")
        )

    def _saved_as(self, path: Path) -> str:
        """Return the `saved_as` of a path's record, and of its places aside."""
        below = path.relative_to(self.root)
        name = without_suffix(below.name, self._tag)
        return below.with_name(name).as_posix() if name else ""

    def _shown(self, error: LeftOut) -> LeftOut:
        """Return an error with the path as its users know it.

        A link that leads nowhere and has a checkpoint's name is a damaged checkpoint.
        """
        path = str(self.area.shown(Path(error.path)))
        if isinstance(error, CheckpointPathError) and leads_nowhere(error.path):
            if self.may_be_ours(path):
                return CheckpointCorruptError(path, error.problem.rstrip("."))
        return type(error)(path, error.problem)

    def may_be_ours(self, unreadable: str) -> bool:
        """Tell by its name whether an unreadable path may hide checkpoints of ours."""
        root = str(self.area.shown(self.root))  # may be a URL
        if unreadable == root:
            return True
        below = os.path.join(root, "")
        if not unreadable.startswith(below):
            return False
        *above, name = unreadable.removeprefix(below).split("/")
        return self._template.fits((*above, bare(name, self._tag)))

    def slot(self) -> Path:
        """Return the slot's path, or one for a new slot that no other series has."""
        self.area.refresh(*self.slots)
        ours, free = list[CheckpointInfo](), list[Path]()
        for place in self.slots:
            try:
                info = self._of_slot(place)
            except CheckpointPathError:
                if place == self.slots[-1]:  # no other series uses this path
                    raise
                continue
            if info is None:
                free.append(place)
            elif self._is_slot(info):
                ours.append(info)
        if ours:
            return max(ours, key=lambda info: info.time).path
        return (free or [self.slots[-1]])[0]

    def slot_info(self) -> CheckpointInfo | None:
        """Return the record in this series' slot; None if there is no whole one."""
        info = self._of_slot(self.slot())
        return info if info is not None and self._is_slot(info) else None

    def _of_slot(self, path: Path) -> CheckpointInfo | None:
        try:
            return read_record(path)
        except CheckpointCorruptError:
            return None

    def _is_slot(self, info: CheckpointInfo) -> bool:
        return info.series == self.name + _SLOT_SERIES

    def by_age(self) -> tuple[Infos, list[LeftOut]]:
        """List the checkpoints and the slot, oldest first, and errors as `listed` does.

        The slot is read first. A writer deletes it only after a newer checkpoint is
        there, so at least one of the two is listed.
        """
        slot = self.slot_info()
        infos, damaged = self.listed()
        infos = infos if slot is None else (*infos, slot)
        return tuple(sorted(infos, key=lambda info: info.time)), damaged

    def best_of(self, infos: Sequence[CheckpointInfo]) -> CheckpointInfo | None:
        """Return the best of some checkpoints; None if there is nothing to compare."""
        if self._mode == "auto":
            return None
        return best_of(infos, self._monitor, self._mode, self._dtype)

    def ranked(self, infos: Sequence[CheckpointInfo]) -> Infos:
        """Return the checkpoints that have a number to compare, the best first."""
        return ranked(infos, self._monitor, self._mode, self._dtype)

    def others(self) -> list[str]:
        """Name the checkpoints of other series below the same root, at this depth."""
        infos, _ = list_below(self._template.root, self._template.depth)
        return [info.path.name for info in infos if not self._is_own(info)]

    # ---- writing ---------------------------------------------------------------------

    def place(
        self,
        path: Path,
        logs: Mapping[str, Any],
        *,
        overwrite: bool,
        by_hand: bool = False,
    ) -> Placed:
        """Choose the place of a save that may not replace a better checkpoint.

        The area must be open.

        Args:
            path: The save's path.
            logs: The save's scalar metrics.
            overwrite: Whether it may replace a better checkpoint after all; then the
                checkpoints aside are superfluous.
            by_hand: Whether it gets its path, and a better checkpoint moves aside.

        Raises:
            CheckpointPathError: If nothing can be written at the place aside.
        """
        infos, names = self._ledger().infos, places_aside(path, self._tag)
        there = {
            place: self._value(infos[str(place)].logs)
            for place in names
            if str(place) in infos and os.path.lexists(place)
        }
        if overwrite:
            return Placed(path, rest=[*there])
        reason = ""
        if os.path.lexists(path):
            there[path], reason = self._to_beat(path, infos.get(str(path)))
        free = next((name for name in names if not os.path.lexists(name)), names[-1])
        found = placed(
            path,
            free,
            there,
            self._value(logs),
            self._mode,
            by_hand=by_hand,
            swaps=not self.area.is_mirror,
        )
        for place in (found.path, found.kept):
            if place is not None and place != path:
                check_target(place, self.root)
        return replace(found, reason=reason)

    def _to_beat(
        self, path: Path, info: CheckpointInfo | None
    ) -> tuple[float | None, str]:
        """Return the value of the checkpoint at a path, and why it may have to stay.

        The value is infinitely good if it cannot be compared with the save's value.

        Args:
            path: The path, at which there is something.
            info: The record in the ledger; None if it is not a checkpoint of this
                series, or if its record cannot be read.
        """
        unbeaten = -math.inf if self._mode == "min" else math.inf
        if info is None:
            try:
                info = read_record(path)
            except (CheckpointCorruptError, CheckpointPathError) as error:
                return unbeaten, f"it may be better ({error.problem.rstrip('.')})"
            if info is None:
                return None, ""
        if info.state is not None:
            monitor, mode = info.state["monitor"], info.state["mode"]
            if (monitor, mode) != (self._monitor, self._mode):
                return unbeaten, f"it is the best by {monitor!r} ({mode})"
        value = self._value(info.logs)
        if info.series == self.name:
            return value, ""
        if value is None:
            return unbeaten, f"it is of another filepath, without {self._monitor!r}"
        return value, f"it is better, and of another filepath ({info.series!r})"

    def swap(self, new: Path, path: Path) -> bool:
        """Exchange the names of a save by hand and the better checkpoint at its path.

        At every moment, there is a checkpoint at the path, and the better one exists.

        Args:
            new: The place aside, where `put` has put the save.
            path: The path.

        Returns:
            Whether the better checkpoint was still there.
        """
        known, names = self._ledger(), {str(new): path, str(path): new}
        self._known = None  # if this fails half-way, the disk is read again
        is_there = True
        try:
            self.area.swap(new, path)
        except FileNotFoundError:  # somebody has deleted it by hand
            self.area.move(new, path)
            known.infos.pop(str(path), None)
            is_there = False
        infos = [
            replace(info, path=names.get(place, info.path))
            for place, info in known.infos.items()
        ]
        known.infos = {str(info.path): info for info in infos}
        known.best, known.changes, self._known = None, self.area.changes, known
        return is_there

    def make_way(self, path: Path, kept: Path) -> bool:
        """Copy a checkpoint in an object store aside, for a save by hand.

        It also stays at its path until the save is there.

        Args:
            path: The path.
            kept: The place aside that `place` chose.

        Returns:
            Whether it was still there.
        """
        known = self._ledger()
        try:
            self.area.move(path, kept)
        except FileNotFoundError:
            is_moved = False
            known.infos.pop(str(path), None)
        else:
            is_moved = True
            info = known.infos.pop(str(path), None)
            if info is not None:
                known.infos[str(kept)] = replace(info, path=kept)
        known.best, known.changes = None, self.area.changes
        return is_moved

    def drop(self, paths: Sequence[Path]) -> None:
        """Delete checkpoints, after the new one is in its place.

        Raises:
            CheckpointError: If one could not be deleted.
        """
        known = self._ledger()
        for path in paths:
            self._remove(path)
            if known.infos.pop(str(path), None) is known.best:
                known.best = None
        known.changes = self.area.changes

    def put(
        self,
        page: Page,
        epoch: int,
        batch: int | None,
        logs: Mapping[str, Any],
        state: Mapping[str, Any] | None,
        *,
        step: int,
        time: datetime.datetime,
        weights_only: bool,
        together: Together | None = None,
    ) -> Task | None:
        """Write a checkpoint and put it in its place. The area must be open.

        Args:
            page: What to write.
            epoch: Its zero-based epoch.
            batch: Its zero-based batch; None at the end of an epoch.
            logs: Its scalar metrics.
            state: Its decision state, as plain values.
            step: The count that retention goes by.
            time: When the caller asked for it.
            weights_only: Whether it holds only the weights.
            together: Has the other processes write their shares, and returns all
                shares; see `write_together`. None if this process writes all.

        Returns:
            What tells who wrote the values; None if several processes did.
        """
        known = self._ledger()
        info = CheckpointInfo(
            path=page.path,
            epoch=epoch,
            batch=batch,
            step=step,
            logs=logs,
            time=_after(known.newest, time),
            weights_only=weights_only,
            series=self.name + _SLOT_SERIES if page.in_slot else self.name,
            state=state,
            saved_as=self._saved_as(page.path),
        )
        self._known = None  # if this fails half-way, the disk is read again
        what = info, self.area, page.layout, page.leaves, page.weights
        put = functools.partial(self._put_in_slot, page) if page.in_slot else None
        with space_told(self.area.shown(page.path), page.layout.nbytes, self.root):
            task = None
            if together is None:
                earlier = list(known.infos.values())[-1:]
                task = write_checkpoint(
                    *what,
                    compress=self._compress,
                    frozen=self._frozen,
                    earlier=earlier[0].path if earlier else None,
                    looks=self._looks,
                    put=put,
                    may_write=self.may_write,
                )
            else:
                write_together(*what, together, looks=self._looks, put=put)
        self._known = known
        known.newest = info.time
        if page.in_slot:
            known.has_slot = True
        else:
            self._add(known, info)
        known.changes = self.area.changes
        return task

    def _put_in_slot(self, page: Page, written: Path, place: Path) -> Path:
        """Put a page at the slot's path, or at the second if another series has that.

        Another series may have taken the first path since `slot` looked: each series
        has its own lock. No other series uses the second path.
        """
        first, second = self.slots
        series = self.name + _SLOT_SERIES
        if place == first:
            try:
                self.area.put(written, first, only_over=series)
            except OccupiedError:
                check_target(second, self.root)
            else:
                return first
        self.area.put(written, second)
        page.path = second
        if place == first and not self.area.is_mirror:
            # This series' old slot, if the other one came between two renames.
            for older in (set_aside(first), first):
                if is_of(older, series):
                    self._remove(older)
        return second

    def prune(self, *, resumable: bool) -> list[str]:
        """Delete what is no longer to be kept, after the new save is in its place.

        Args:
            resumable: Whether the new save makes the slot superfluous.

        Returns:
            A message for each checkpoint that stays because of what is in it.

        Raises:
            CheckpointError: If something could not be deleted.
        """
        known, problems = self._ledger(), list[str]()
        if self._policy is not None:
            gone = self._expired(known, self._policy)
            for info in gone:
                try:
                    self._remove(info.path)
                except CheckpointPathError as error:
                    problems.append(str(error))
                del known.infos[str(info.path)]
        if resumable and known.has_slot:
            slot = self.slot_info()
            if slot is not None:
                self._remove(slot.path)
            known.has_slot = False
        known.changes = self.area.changes
        return problems

    def _expired(self, known: "_Known", policy: PreservationPolicy) -> Infos:
        infos = tuple(known.infos.values())
        gone = expired(infos, policy, known.best)
        if not gone:
            return ()
        best = self._best(known)
        if len(known.infos) < len(infos):  # some were deleted by hand
            gone = expired(tuple(known.infos.values()), policy, best)
        return tuple(info for info in gone if info is not best)

    def _remove(self, path: Path) -> None:
        try:
            self.area.remove(path)
        except FileNotFoundError:
            return  # somebody has deleted it by hand
        except CheckpointPathError:
            raise
        except (OSError, CheckpointError) as error:
            raise CheckpointError(
                f"What was new was saved, but {str(self.area.shown(path))!r}, which is "
                f"no longer to be kept, could not be deleted: {error}."
            ) from error

    def _ledger(self) -> "_Known":
        """Return what is on disk; read it again only if another object changed it."""
        known = self._known
        if known is None or known.changes != self.area.changes:
            infos, slot = self.listed()[0], self.slot_info()
            times = [info.time for info in (*infos, slot) if info is not None]
            known = self._known = _Known(
                {str(info.path): info for info in infos},
                has_slot=slot is not None,
                newest=max(times, default=None),
                changes=self.area.changes,
            )
        return known

    def _add(self, known: "_Known", info: CheckpointInfo) -> None:
        replaced = known.infos.pop(str(info.path), None)
        known.infos[str(info.path)] = info
        if known.best is not None:
            if replaced is known.best:
                known.best = None
            else:
                known.best = self.best_of((known.best, info))

    def best_value(self) -> float | None:
        """Return the best monitored value on disk, if any. The area must be open."""
        best = self._best(self._ledger())
        return None if best is None else self._value(best.logs)

    def _value(self, logs: Mapping[str, Any]) -> float | None:
        return monitored_value(logs, self._monitor, self._dtype)

    def _best(self, known: "_Known") -> CheckpointInfo | None:
        """Return the best checkpoint, less those that somebody has deleted by hand."""
        if self._mode == "auto":
            return None
        best = known.best
        if best is None or not best.path.exists():
            for path in [
                path for path, i in known.infos.items() if not i.path.exists()
            ]:
                del known.infos[path]
            known.best = self.best_of(tuple(known.infos.values()))
        return known.best

    def durable_best(
        self, info: CheckpointInfo | None, damaged: Container[str] = ()
    ) -> float | None:
        """Return the best monitored value on disk.

        Args:
            info: The loaded checkpoint, which counts too, wherever it is. But one in a
                slot does not, since it will be deleted. None for a checkpoint of plain
                Orbax.
            damaged: Times of checkpoints whose values are known to be damaged.
        """
        infos = tuple(i for i in self.listed()[0] if str(i.time) not in damaged)
        if info is not None and not info.series.endswith(_SLOT_SERIES):
            infos = (*infos, info)
        best = self.best_of(infos)
        return None if best is None else self._value(best.logs)


def _after(newest: datetime.datetime | None, now: datetime.datetime) -> Any:
    """Return the save's time, later than `newest` even if the clock was set back."""
    return now if newest is None else max(now, min(newest + _TICK, LAST_TIME))


@dataclass
class _Known:
    """What a writer knows to be on disk.

    Attributes:
        infos: The checkpoints by their paths, oldest first.
        has_slot: Whether there is something in the slot.
        newest: The latest time of all checkpoints and the slot.
        changes: The area's count of changes at that state.
        best: The best of `infos`; None if it must be looked for.
    """

    infos: dict[str, CheckpointInfo]
    has_slot: bool
    newest: datetime.datetime | None
    changes: int
    best: CheckpointInfo | None = None
