"""Model checkpoints for JAX training loops: decide in `jit`, save in the background.

`CheckpointState` and `step` are the decision: pure, and no more than JAX is loaded for
them. `ModelCheckpoint` saves and restores, with Orbax, which is loaded when it is first
looked up.
"""

import importlib
from typing import TYPE_CHECKING

from flaxckpt import errors as errors
from flaxckpt._chunks import Chunk, scan_in_chunks
from flaxckpt._listing import list_checkpoints
from flaxckpt._record import CheckpointInfo, Loaded
from flaxckpt._slots import Snapshot
from flaxckpt._state import CheckpointState, step
from flaxckpt.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointLockedError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointPathError,
    CheckpointWriteError,
    MetricError,
    Preempted,
    SettingError,
    TemplateError,
    UnsupportedLeafError,
)

if TYPE_CHECKING:
    from flaxckpt._checkpoint import ModelCheckpoint, Restored
    from flaxckpt._saves import SaveCounts
    from flaxckpt._store import load, load_weights, verify
    from flaxckpt._weights import default_weights

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
    "Loaded",
    "MetricError",
    "ModelCheckpoint",
    "Preempted",
    "Restored",
    "SaveCounts",
    "SettingError",
    "Snapshot",
    "TemplateError",
    "UnsupportedLeafError",
    "default_weights",
    "errors",
    "list_checkpoints",
    "load",
    "load_weights",
    "scan_in_chunks",
    "step",
    "verify",
]

_LAZY = {
    "ModelCheckpoint": "flaxckpt._checkpoint",
    "Restored": "flaxckpt._checkpoint",
    "SaveCounts": "flaxckpt._saves",
    "default_weights": "flaxckpt._weights",
    "load": "flaxckpt._store",
    "load_weights": "flaxckpt._store",
    "verify": "flaxckpt._store",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
