"""What `restore` returns."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flaxckpt._decision.state import CheckpointState
from flaxckpt._trees.ties import PyTree


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What `ModelCheckpoint.restore` found.

    Attributes:
        tree: The tree.
        state: The decision state to go on with, as if the run had never stopped.
        epoch: Zero-based epoch at which it was saved; None if plain Orbax wrote it.
        batch: Zero-based batch within it; None at the end of an epoch.
        logs: The scalar metrics at that time.
        path: The checkpoint.
    """

    tree: PyTree
    state: CheckpointState
    epoch: Any  # int, but for plain Orbax's: a loop need not check for that
    batch: int | None
    logs: Mapping[str, Any]
    path: Path
