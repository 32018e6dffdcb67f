"""Model checkpoints for JAX training loops: decide in `jit`, save in the background.

`CheckpointState` and `step` are the decision: they are pure, and need only JAX.
`Snapshot` keeps the best trees in a program, and `scan_in_chunks` runs a scan in parts.
`ModelCheckpoint` saves and restores through Orbax, which is imported when
`ModelCheckpoint`, `Restored`, `load`, `load_weights`, `export`, `describe` or `verify`
is first looked up.
"""

import importlib
from typing import TYPE_CHECKING

from flaxckpt import errors as errors
from flaxckpt._checkpoints.listing import list_checkpoints
from flaxckpt._decision.state import CheckpointState
from flaxckpt._decision.step import step
from flaxckpt._disk.info import CheckpointInfo, Loaded, LoadReport
from flaxckpt._program.best_trees import Snapshot
from flaxckpt._program.chunked_scan import Chunk, scan_in_chunks
from flaxckpt.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointLockedError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointPathError,
    CheckpointWriteError,
    HookError,
    MetricError,
    Preempted,
    SettingError,
    TemplateError,
    UnsupportedLeafError,
)

if TYPE_CHECKING:
    from flaxckpt._checkpoints.delete import delete
    from flaxckpt._checkpoints.described import Description, LeafInfo, describe
    from flaxckpt._checkpoints.export import export
    from flaxckpt._checkpoints.load import load, load_weights, verify
    from flaxckpt._checkpoints.watch import watch
    from flaxckpt._model_checkpoint import ModelCheckpoint
    from flaxckpt._restoring import Restored
    from flaxckpt._resuming import Start
    from flaxckpt._saving.report import SaveCounts
    from flaxckpt._trees.weights import default_weights

__version__ = "0.1.0"

__all__ = [
    "CheckpointCorruptError",
    "CheckpointError",
    "CheckpointInfo",
    "CheckpointLockedError",
    "CheckpointMismatchError",
    "CheckpointNotFoundError",
    "CheckpointPathError",
    "CheckpointState",
    "CheckpointWriteError",
    "Chunk",
    "Description",
    "HookError",
    "LeafInfo",
    "LoadReport",
    "Loaded",
    "MetricError",
    "ModelCheckpoint",
    "Preempted",
    "Restored",
    "SaveCounts",
    "SettingError",
    "Snapshot",
    "Start",
    "TemplateError",
    "UnsupportedLeafError",
    "default_weights",
    "delete",
    "describe",
    "errors",
    "export",
    "list_checkpoints",
    "load",
    "load_weights",
    "scan_in_chunks",
    "step",
    "verify",
    "watch",
]

_LAZY = {
    "Description": "flaxckpt._checkpoints.described",
    "LeafInfo": "flaxckpt._checkpoints.described",
    "describe": "flaxckpt._checkpoints.described",
    "ModelCheckpoint": "flaxckpt._model_checkpoint",
    "Restored": "flaxckpt._restoring",
    "SaveCounts": "flaxckpt._saving.report",
    "Start": "flaxckpt._resuming",
    "default_weights": "flaxckpt._trees.weights",
    "export": "flaxckpt._checkpoints.export",
    "delete": "flaxckpt._checkpoints.delete",
    "load": "flaxckpt._checkpoints.load",
    "load_weights": "flaxckpt._checkpoints.load",
    "verify": "flaxckpt._checkpoints.load",
    "watch": "flaxckpt._checkpoints.watch",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
