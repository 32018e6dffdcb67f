"""What the writer of a series knows to be on disk.

The writer holds the series' lock, so no other process changes the series, and remembers
what is there: with 10,000 checkpoints, reading all records again takes a second.
"""

import datetime
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flaxckpt._checkpoints.retention import PreservationPolicy, expired
from flaxckpt._checkpoints.series import Series
from flaxckpt._disk.info import CheckpointInfo
from flaxckpt._disk.listing import Infos
from flaxckpt._disk.record_fields import LAST_TIME

_TICK = datetime.timedelta(microseconds=1)


class Ledger:
    """The checkpoints of a series, as of the last `refresh`. The area must be open.

    Attributes:
        infos: The checkpoints by their paths, oldest first.
        has_slot: Whether there is something in the slot.
        newest: The latest time of all checkpoints and the slot.
    """

    def __init__(self, series: Series) -> None:
        """Read nothing yet."""
        self._series = series
        self.infos: dict[str, CheckpointInfo] = {}
        self.has_slot = False
        self.newest: datetime.datetime | None = None
        self._best: CheckpointInfo | None = None  # None: it must be looked for
        self._changes: int | None = None  # the area's count; None: unknown

    def refresh(self) -> None:
        """Read the disk, if it was never read, or another object has changed it."""
        claim = self._series.area.claim
        if self._changes == claim.changes:
            return
        infos, slot = self._series.listed()[0], self._series.slot_info()
        times = [info.time for info in (*infos, slot) if info is not None]
        self.infos = {str(info.path): info for info in infos}
        self.has_slot, self.newest = slot is not None, max(times, default=None)
        self._best, self._changes = None, claim.changes

    def doubt(self) -> None:
        """Have the next `refresh` read the disk, unless `settle` is called before."""
        self._changes = None

    def settle(self) -> None:
        """Note that this is what is on disk after the caller's changes."""
        self._changes = self._series.area.claim.changes

    def add(self, info: CheckpointInfo) -> None:
        """Note a new checkpoint."""
        replaced = self.infos.pop(str(info.path), None)
        self.infos[str(info.path)] = info
        if replaced is self._best:
            self._best = None
        elif self._best is not None:
            self._best = self._series.best_of((self._best, info))

    def rename(self, paths: Mapping[str, Path]) -> None:
        """Note that checkpoints have other paths now."""
        infos = [
            replace(info, path=paths.get(path, info.path))
            for path, info in self.infos.items()
        ]
        self.infos, self._best = {str(info.path): info for info in infos}, None

    def drop(self, path: str) -> CheckpointInfo | None:
        """Note that nothing is at a path any more; return what was there."""
        info = self.infos.pop(path, None)
        if info is self._best:
            self._best = None
        return info

    def best(self) -> CheckpointInfo | None:
        """Return the best checkpoint, less those that somebody has deleted by hand."""
        if self._series.mode == "auto":
            return None
        if self._best is None or not self._best.path.exists():
            self.infos = {path: i for path, i in self.infos.items() if i.path.exists()}
            self._best = self._series.best_of(tuple(self.infos.values()))
        return self._best

    def expired(self, policy: PreservationPolicy) -> Infos:
        """Return the checkpoints that a policy does not keep, less the best."""
        infos = tuple(self.infos.values())
        gone = expired(infos, policy, self._best)
        if not gone:
            return ()
        best = self.best()
        if len(self.infos) < len(infos):  # some were deleted by hand
            gone = expired(tuple(self.infos.values()), policy, best)
        return tuple(info for info in gone if info is not best)

    def later(self, now: datetime.datetime) -> Any:
        """Return a save's time, later than `newest` even if the clock was set back."""
        if self.newest is None:
            return now
        return max(now, min(self.newest + _TICK, LAST_TIME))
