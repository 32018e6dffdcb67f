"""Keeps a better checkpoint that is at a save's path; see `aside` for the places."""

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flaxckpt._checkpoints.aside import Placed, choose_place, places_aside
from flaxckpt._checkpoints.ledger import Ledger
from flaxckpt._checkpoints.series import Series
from flaxckpt._checkpoints.target import check_target
from flaxckpt._disk.info import CheckpointInfo
from flaxckpt._disk.record import read_record
from flaxckpt.errors import CheckpointCorruptError, CheckpointPathError


class Rivals:
    """The checkpoints that a save may not replace. The series' area must be open."""

    def __init__(self, series: Series, ledger: Ledger) -> None:
        """Look at nothing yet."""
        self._series, self._ledger = series, ledger

    def place(
        self,
        path: Path,
        logs: Mapping[str, Any],
        *,
        overwrite: bool,
        by_hand: bool = False,
    ) -> Placed:
        """Choose the place of a save that may not replace a better checkpoint.

        Args:
            path: The save's path.
            logs: The save's scalar metrics.
            overwrite: Whether it may replace a better checkpoint after all; then the
                checkpoints aside are superfluous.
            by_hand: Whether it gets its path, and a better checkpoint moves aside.

        Raises:
            CheckpointPathError: If nothing can be written at the place aside.
        """
        self._ledger.refresh()
        series, infos = self._series, self._ledger.infos
        names = places_aside(path, series.tag)
        found = {
            place: infos[str(place)]
            for place in names
            if str(place) in infos and os.path.lexists(place)
        }
        by_age = sorted(found, key=lambda place: found[place].time)
        values = {place: series.value_of(found[place].logs) for place in by_age}
        if overwrite:
            return Placed(path, rest=[*values])
        reason = ""
        if os.path.lexists(path):
            values[path], reason = self._to_beat(path, infos.get(str(path)))
        free = next((name for name in names if not os.path.lexists(name)), names[-1])
        choice = choose_place(
            path,
            free,
            values,
            series.value_of(logs),
            series.mode,
            by_hand=by_hand,
            swaps=not series.area.is_mirror,
        )
        for place in (choice.path, choice.kept):
            if place is not None and place != path:
                check_target(place, series.root)
        return replace(choice, reason=reason)

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
        monitor, mode = self._series.monitor, self._series.mode
        unbeaten = -math.inf if mode == "min" else math.inf
        if info is None:
            try:
                info = read_record(path)
            except (CheckpointCorruptError, CheckpointPathError) as error:
                return unbeaten, f"it may be better ({error.problem.rstrip('.')})"
            if info is None:
                return None, ""
        if info.state is not None:
            by = info.state["monitor"], info.state["mode"]
            if by != (monitor, mode):
                return unbeaten, f"it is the best by {by[0]!r} ({by[1]})"
        value = self._series.value_of(info.logs)
        if info.series == self._series.name:
            return value, ""
        if value is None:
            return unbeaten, f"it is of another filepath, without {monitor!r}"
        return value, f"it is better, and of another filepath ({info.series!r})"

    def swap(self, new: Path, path: Path) -> bool:
        """Exchange the names of a save by hand and the better checkpoint at its path.

        At every moment, there is a checkpoint at the path, and the better one exists.

        Args:
            new: The place aside, where the save is.
            path: The path.

        Returns:
            Whether the better checkpoint was still there.
        """
        ledger, area = self._ledger, self._series.area
        ledger.refresh()
        ledger.doubt()
        is_there = True
        try:
            area.swap(new, path)
        except FileNotFoundError:  # somebody has deleted it by hand
            area.move(new, path)
            ledger.drop(str(path))
            is_there = False
        ledger.rename({str(new): path, str(path): new})
        ledger.settle()
        return is_there

    def make_way(self, path: Path, kept: Path) -> bool:
        """Copy a checkpoint in an object store aside, for a save by hand.

        It goes to `kept`, the place that `place` chose, and also stays at its path
        until the save is there.

        Returns:
            Whether it was still there.
        """
        ledger = self._ledger
        ledger.refresh()
        is_moved = True
        try:
            self._series.area.move(path, kept)
        except FileNotFoundError:
            is_moved = False
        info = ledger.drop(str(path))
        if is_moved and info is not None:
            ledger.infos[str(kept)] = replace(info, path=kept)
        ledger.settle()
        return is_moved
