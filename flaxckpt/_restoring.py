"""`Restored`: what `ModelCheckpoint.restore` returns."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flaxckpt._decision.state import CheckpointState
from flaxckpt._trees.ties import PyTree


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A checkpoint that `ModelCheckpoint.restore` has loaded.

    Attributes:
        tree: The tree.
        state: The decision state to pass to `update`, as if the run had never stopped.
        epoch: Zero-based epoch of the save; None if plain Orbax wrote the checkpoint.
        batch: Zero-based batch within the epoch; None at the end of an epoch.
        logs: The scalar metrics of the save.
        path: The checkpoint's path or URL.
    """

    tree: PyTree
    state: CheckpointState
    epoch: Any  # not `int | None`: type checkers would have each loop check for None
    batch: int | None
    logs: Mapping[str, Any]
    path: Path
