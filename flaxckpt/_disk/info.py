"""What a listing returns for each checkpoint, and what a load returns."""

import dataclasses
import datetime
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from flaxckpt._runtime.failures import listed
from flaxckpt.errors import LeafDifference


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What is known of a checkpoint without loading it.

    Attributes:
        path: Its directory, absolute.
        epoch: Zero-based epoch at which it was saved; None if the call gave a step.
        batch: Zero-based batch within the epoch; None at the end of an epoch.
        step: What retention policies count by: the global step that the call gave, or
            else the batches that the run has seen, or else its epochs.
        logs: The scalar metrics at that time, as Python numbers.
        time: When it was saved, UTC. Never earlier than the time of the checkpoint
            before it.
        weights_only: Whether it holds the weights alone.
        series: The part of the filepath template behind its fixed directory:
            retention treats the checkpoints of each series separately.
        state: The decision state at that time, as plain values; None if none was given.
        saved_as: Its path at that time, below the template's fixed directory. If a
            checkpoint is copied or renamed by hand to a name that the template would
            not give, it leaves the series, which then neither restores nor deletes it.
            None if the flaxckpt that wrote it did not record the path.
        is_best: For a function of `on_saved`: whether it was the best of its filepath
            when it was saved; None if the direction of `monitor` is not known. In a
            listing it is None.
    """

    path: Path
    epoch: Any  # an int or None; type checkers would have each user check for None
    batch: int | None
    step: int
    logs: Mapping[str, Any]
    time: datetime.datetime
    weights_only: bool
    series: str
    state: Mapping[str, Any] | None = dataclasses.field(default=None, repr=False)
    saved_as: str | None = dataclasses.field(default=None, repr=False)
    is_best: bool | None = dataclasses.field(default=None, compare=False, repr=False)

    def __fspath__(self) -> str:
        """Return the path, so that a record can be passed as a path."""
        return str(self.path)

    @property
    def metrics(self) -> Mapping[str, Any]:
        """The logs, under the name that Orbax's preservation policies read."""
        return self.logs


Hook: TypeAlias = Callable[[CheckpointInfo], object]


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What became of the leaves in a load. Its text is a line.

    Attributes:
        loaded: The names of the wanted leaves that were loaded.
        kept: The wanted leaves that stayed as `like` has them: the name of each, what
            is stored in its place, and what was wanted.
        passed_over: The names of the stored leaves that nothing asked for.
    """

    loaded: tuple[str, ...] = ()
    kept: tuple[LeafDifference, ...] = ()
    passed_over: tuple[str, ...] = ()

    def __str__(self) -> str:
        number = len(self.loaded) + len(self.kept)
        text = f"loaded {len(self.loaded)} of {number} leaves"
        if self.kept:
            kept = [
                f"{name} (stored {stored}, wanted {wanted})"
                for name, stored, wanted in self.kept
            ]
            text += f"; kept from like: {listed(kept)}"
        if self.passed_over:
            text += f"; passed over: {listed(self.passed_over)}"
        return text

    def __repr__(self) -> str:
        return f"<LoadReport: {self}>"


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A loaded tree, and the record of the checkpoint that it was loaded from.

    Attributes:
        tree: The tree.
        info: The record of that very checkpoint; None if plain Orbax wrote it.
        report: What became of the leaves.
    """

    tree: Any
    info: CheckpointInfo | None
    report: LoadReport
