"""Writes the checkpoints of a series, and deletes those that are not to be kept."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flaxckpt._checkpoints.ledger import Ledger
from flaxckpt._checkpoints.retention import PreservationPolicy
from flaxckpt._checkpoints.rivals import Rivals
from flaxckpt._checkpoints.series import Series
from flaxckpt._checkpoints.share import Share
from flaxckpt._checkpoints.target import check_target
from flaxckpt._checkpoints.together import Together, write_together
from flaxckpt._checkpoints.write import Checkpoint, Way, write_checkpoint
from flaxckpt._direct.frozen_files import Frozen
from flaxckpt._disk.area import OccupiedError
from flaxckpt._disk.info import CheckpointInfo
from flaxckpt._disk.record import is_of, replaced_path
from flaxckpt._orbax.state_handler import Task
from flaxckpt._runtime.failures import space_told
from flaxckpt._trees.layout import Layout
from flaxckpt._trees.skeleton import Skeleton
from flaxckpt.errors import CheckpointError, CheckpointPathError


@dataclass
class Page:
    """One directory to write, and what goes into it.

    Attributes:
        path: The directory.
        in_slot: Whether it is the slot.
        layout: The tree's layout.
        leaves: Its leaves.
        weights: Where in the layout the weights are.
        own: Positions of the leaves that each process has for itself.
    """

    path: Path
    in_slot: bool
    layout: Layout
    leaves: list[Any]
    weights: Skeleton
    own: Sequence[int] = ()


class SeriesWriter:
    """Writes a series for one `ModelCheckpoint`. The area must be open.

    Attributes:
        series: The series.
        way: How its checkpoints are written.
        rivals: What a save may not replace.
    """

    def __init__(
        self,
        series: Series,
        *,
        policy: PreservationPolicy | None,
        compress: bool,
        writes_directly: bool,
        frozen: Frozen | None,
    ) -> None:
        """Touch nothing.

        Args:
            series: The series.
            policy: Tells which of its checkpoints to keep; None keeps all.
            compress: Whether to compress the arrays.
            writes_directly: Whether values may be written straight from memory.
            frozen: Which leaves are frozen; None if none are.
        """
        self.series, self._policy = series, policy
        self.way = Way(series.area, compress, frozen, writes_directly)
        self._ledger = Ledger(series)
        self.rivals = Rivals(series, self._ledger)

    def write(
        self, page: Page, info: CheckpointInfo, together: Together | None = None
    ) -> tuple[Task | Share, CheckpointInfo]:
        """Write a checkpoint and put it in its place. The area must be open.

        Args:
            page: What to write.
            info: Its record, with the time when the caller asked for it. The time that
                is written is later than that of all checkpoints of the series.
            together: Has the other processes write their shares; see `write_together`.
                None if this process writes all.

        Returns:
            What tells whether flaxckpt or Orbax wrote the values, in this process; and
            the record as it was written.
        """
        ledger, area = self._ledger, self.series.area
        ledger.refresh()
        info = replace(info, time=ledger.later(info.time))
        what = Checkpoint(info, page.layout, page.leaves, page.weights)
        commit = functools.partial(self._put_in_slot, page) if page.in_slot else None
        earlier = Path(next(reversed(ledger.infos))) if ledger.infos else None
        ledger.doubt()  # if this fails half-way, the disk is read again
        with space_told(area.shown(page.path), page.layout.nbytes, self.series.root):
            done: Task | Share
            if together is None:
                done = write_checkpoint(what, self.way, earlier=earlier, commit=commit)
            else:
                done = write_together(what, self.way, together, commit)
        ledger.newest = info.time
        if page.in_slot:
            ledger.has_slot = True
        else:
            ledger.add(info)
        ledger.settle()
        return done, info

    def _put_in_slot(self, page: Page, written: Path, place: Path) -> Path:
        """Put a page at the slot's path, or at the second if another series has that.

        Another series may have taken the first path since `slot` looked: each series
        has its own lock. No other series uses the second path.
        """
        area, series = self.series.area, self.series.slot_name
        first, second = self.series.slots
        if place == first:
            try:
                area.commit(written, first, only_over=series)
            except OccupiedError:
                check_target(second, self.series.root)
            else:
                return first
        area.commit(written, second)
        page.path = second
        if place == first and not area.is_mirror:
            # This series' old slot, if the other one came between two renames.
            for older in (replaced_path(first), first):
                if is_of(older, series):
                    self._remove(older)
        return second

    def drop(self, paths: Sequence[Path]) -> None:
        """Delete checkpoints, after the new one is in its place.

        Raises:
            CheckpointError: If one could not be deleted.
        """
        self._ledger.refresh()
        for path in paths:
            self._remove(path)
            self._ledger.drop(str(path))
        self._ledger.settle()

    def prune(self, *, resumable: bool) -> list[str]:
        """Delete what is no longer to be kept, after the new save is in its place.

        Args:
            resumable: Whether the new save makes the slot superfluous.

        Returns:
            A message for each checkpoint that stays because of what is in it.

        Raises:
            CheckpointError: If something could not be deleted.
        """
        ledger, problems = self._ledger, list[str]()
        ledger.refresh()
        if self._policy is not None:
            for info in ledger.expired(self._policy):
                try:
                    self._remove(info.path)
                except CheckpointPathError as error:
                    problems.append(str(error))
                del ledger.infos[str(info.path)]
        if resumable and ledger.has_slot:
            slot = self.series.slot_info()
            if slot is not None:
                self._remove(slot.path)
            ledger.has_slot = False
        ledger.settle()
        return problems

    def _remove(self, path: Path) -> None:
        try:
            self.series.area.remove(path)
        except FileNotFoundError:
            return  # somebody has deleted it by hand
        except CheckpointPathError:
            raise
        except (OSError, CheckpointError) as error:
            shown = str(self.series.area.shown(path))
            raise CheckpointError(
                f"What was new was saved, but {shown!r}, which is no longer to be "
                f"kept, could not be deleted: {error}."
            ) from error

    def is_best(self, info: CheckpointInfo) -> bool | None:
        """Tell whether a checkpoint is the best on disk; None if that is not known."""
        if self.series.mode == "auto":
            return None
        self._ledger.refresh()
        best = self._ledger.best()
        return best is not None and best.time == info.time

    def finish(self) -> None:
        """Mark the run as ended, until something more is saved.

        Raises:
            CheckpointLockedError: If another process writes this series.
            CheckpointPathError: If the mark cannot be written.
        """
        area = self.series.area
        try:
            with area.claim.turn:
                area.open()
                area.finish()
        except OSError as error:
            raise CheckpointPathError(
                str(area.shown(self.series.root)),
                f"takes no mark of the run's end: {error.strerror}. The checkpoints "
                "are there. Make it writable, and call finish again.",
            ) from error

    def best_value(self) -> float | None:
        """Return the best monitored value on disk, if any. The area must be open."""
        self._ledger.refresh()
        best = self._ledger.best()
        return None if best is None else self.series.value_of(best.logs)
