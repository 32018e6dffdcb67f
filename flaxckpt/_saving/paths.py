"""`Paths`: where the checkpoint of a call goes."""

from pathlib import Path

import numpy as np

from flaxckpt._checkpoints.series import Series
from flaxckpt._checkpoints.target import check_target
from flaxckpt._decision.logs import find
from flaxckpt._decision.template import Template
from flaxckpt._runtime.failures import in_one_line
from flaxckpt._saving.call import Call, is_unknown
from flaxckpt.errors import CheckpointPathError, CheckpointWriteError


class Paths:
    """The paths of one series, in the series and in the slot."""

    def __init__(self, template: Template, series: Series) -> None:
        """Touch nothing."""
        self.template, self._series = template, series

    def take_lock(self, path: Path | None) -> None:
        """Take the lock of the series, if it is not held.

        Args:
            path: The path that an error names; None for the root.
        """
        try:
            self._series.area.open()
        except OSError as error:
            shown = self._series.area.shown(path or self._series.root)
            raise CheckpointWriteError(str(shown), in_one_line(error)) from error

    def known(self, call: Call) -> Path | None:
        """Return the path of a call; None if it shows a value still computed.

        Raises:
            TemplateError: If no values can fill in the template.
        """
        logs, is_known = dict(call.logs), True
        for name in [find(logs, field) for field in self.template.fields]:
            value = logs.get(name)
            if is_unknown(value):
                logs[name], is_known = np.zeros(value.shape, value.dtype), False
        path = self.template.render(call.at, logs)
        return Path(path) if is_known else None

    def checked(self, call: Call, *, to_slot: bool) -> tuple[Path | None, Path | None]:
        """Return the checked paths of a call: in the series, and in the slot."""
        path = None if call.skips else self.known(call)
        slot = self._series.slot() if to_slot else None
        if path is not None:
            self.check(path)
        if slot is not None:
            check_target(slot, self._series.root)
        return path, slot

    def check(self, path: Path) -> None:
        """Check that a checkpoint can be written at a path, outside of the slot."""
        at = [slot for slot in self._series.slots if f"{path}/".startswith(f"{slot}/")]
        if at and (slot := self._series.slot()) in at:
            raise CheckpointPathError(
                str(self._series.area.shown(slot)),
                "is where the last state is kept. Pass another filepath, or another "
                "name as save_last.",
            )
        check_target(path, self._series.root)
