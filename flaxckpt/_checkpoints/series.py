"""A series of checkpoints: what one template has on disk.

A series has its checkpoints and a `last` slot, which holds the newest state whenever no
checkpoint holds all of it.
"""

import os
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxckpt._checkpoints.aside import bare, without_suffix
from flaxckpt._checkpoints.retention import monitored_value, ranked
from flaxckpt._decision.template import Template
from flaxckpt._disk.area import Area
from flaxckpt._disk.disk_area import DiskArea
from flaxckpt._disk.info import CheckpointInfo
from flaxckpt._disk.listing import Infos, LeftOut, list_below
from flaxckpt._disk.open import leads_nowhere
from flaxckpt._disk.record import read_record
from flaxckpt._disk.series_names import SLOT_SUFFIX, tag_of
from flaxckpt._object_store.store_area import StoreArea
from flaxckpt.errors import CheckpointCorruptError, CheckpointPathError


class Series:
    """What one template has on disk.

    Attributes:
        root: The directory that has all of it.
        name: The series' name.
        area: Where it is written.
        slots: The two paths that the slot may have, the preferred one first.
        slot_name: The name of the slot's series.
        tag: Short for the name, in names of files.
        monitor: Key in the logs of the value by which a checkpoint is the best.
        mode: `"min"`, `"max"`, or `"auto"` if there is no best.
    """

    def __init__(
        self,
        template: Template,
        slot: Path,
        *,
        monitor: str,
        mode: str,
        dtype: Any,
        sync: bool,
        in_store: bool,
    ) -> None:
        """Describe the series; touch nothing.

        Args:
            template: The template of its paths.
            slot: The preferred path of the slot.
            monitor: See the attribute.
            mode: See the attribute.
            dtype: The dtype in which the values are compared.
            sync: Whether to wait for the disk.
            in_store: Whether the paths are in a mirror of an object store.
        """
        self.root = Path(template.root)
        self._template = template
        self.name, self.slot_name = template.name, template.name + SLOT_SUFFIX
        self.tag = tag_of(self.name)
        self.slots = slot, slot.with_name(f"{slot.name}-{self.tag}")
        self.monitor, self.mode, self._dtype = monitor, mode, dtype
        names = self.name, self.slot_name
        if in_store:
            self.area: Area = StoreArea(self.root, names, template.depth)
        else:
            self.area = DiskArea(self.root, names, template.depth, sync=sync)

    def listed(self) -> tuple[Infos, list[LeftOut]]:
        """List the checkpoints, oldest first, and an error for each that is left out.

        Each of these is damaged or unreadable, and `may_be_ours` tells if it matters.
        """
        template = self._template
        self.area.refresh()
        with self.area.claim.committing:  # so the listed names are on disk
            infos, damaged = list_below(template.root, template.depth)
        return tuple(filter(self._is_own, infos)), list(map(self._shown, damaged))

    def _is_own(self, info: CheckpointInfo) -> bool:
        """Tell whether a checkpoint is of this series.

        If it was copied or renamed by hand, the template must be able to give its name.
        """
        if info.series != self.name:
            return False
        place = self.saved_as(info.path)
        return info.saved_as in (None, place) or self._template.may_give(
            place.split("/")
        )

    def saved_as(self, path: Path) -> str:
        """Return the `saved_as` of a path's record, and of its places aside."""
        below = path.relative_to(self.root)
        name = without_suffix(below.name, self.tag)
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
        return self._template.fits((*above, bare(name, self.tag)))

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
            elif info.series == self.slot_name:
                ours.append(info)
        if ours:
            return max(ours, key=lambda info: info.time).path
        return (free or [self.slots[-1]])[0]

    def slot_info(self) -> CheckpointInfo | None:
        """Return the record in this series' slot; None if there is no whole one."""
        info = self._of_slot(self.slot())
        return info if info and info.series == self.slot_name else None

    def _of_slot(self, path: Path) -> CheckpointInfo | None:
        try:
            return read_record(path)
        except CheckpointCorruptError:
            return None

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
        if self.mode == "auto":
            return None
        return next(iter(self.ranked(infos)), None)

    def ranked(self, infos: Sequence[CheckpointInfo]) -> Infos:
        """Return the checkpoints that have a number to compare, the best first."""
        return ranked(infos, self.monitor, self.mode, self._dtype)

    def others(self) -> list[str]:
        """Name the checkpoints of other series below the same root, at this depth."""
        infos, _ = list_below(self._template.root, self._template.depth)
        return [info.path.name for info in infos if not self._is_own(info)]

    def value_of(self, logs: Mapping[str, Any]) -> float | None:
        """Return the monitored value in logs, as values are compared; None for none."""
        return monitored_value(logs, self.monitor, self._dtype)

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
        if info is not None and not info.series.endswith(SLOT_SUFFIX):
            infos = (*infos, info)
        best = self.best_of(infos)
        return None if best is None else self.value_of(best.logs)
