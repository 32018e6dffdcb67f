"""What a listing says of a checkpoint, and a load of what it has loaded."""

import dataclasses
import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What is known of a checkpoint without loading it.

    Attributes:
        path: Its directory, absolute.
        epoch: Zero-based epoch at which it was saved.
        batch: Zero-based batch within the epoch; None at the end of an epoch.
        step: One-based count that retention policies go by: batches seen in the run
            where `save_freq` is a number, epochs otherwise.
        logs: The scalar metrics at that time, as Python numbers.
        time: When it was saved, UTC. Never earlier than that of the one before it.
        weights_only: Whether it holds the weights alone.
        series: The part of the filepath template behind its fixed directory:
            checkpoints of one series are retained and deleted together.
        state: The decision state at that time, as plain values; None if none was given.
        saved_as: Its path below the fixed directory of the template at that time. A
            checkpoint that was copied or renamed by hand, to a name that the template
            would not give, is no longer of the series, which neither restores nor
            deletes it. None for a checkpoint of a flaxckpt that did not record it.
    """

    path: Path
    epoch: int
    batch: int | None
    step: int
    logs: Mapping[str, Any]
    time: datetime.datetime
    weights_only: bool
    series: str
    state: Mapping[str, Any] | None = dataclasses.field(default=None, repr=False)
    saved_as: str | None = dataclasses.field(default=None, repr=False)

    def __fspath__(self) -> str:
        """Return the path, so that a record can be passed for one."""
        return str(self.path)

    @property
    def metrics(self) -> Mapping[str, Any]:
        """The logs, under the name by which Orbax's preservation policies ask."""
        return self.logs


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A tree that was loaded, and what is known of the checkpoint that it is from.

    Attributes:
        tree: The tree.
        info: The record of that very checkpoint; None for one of plain Orbax's.
    """

    tree: Any
    info: CheckpointInfo | None
