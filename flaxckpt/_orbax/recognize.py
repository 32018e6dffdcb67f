"""Recognizes checkpoints of Orbax, and their items, by their files."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flaxckpt._direct.zarr import DESCRIPTION, MANIFEST
from flaxckpt._disk.open import NoFileError, read_small
from flaxckpt._disk.record import is_checkpoint
from flaxckpt.errors import CheckpointPathError

# Files that Orbax puts into a checkpoint, into each tree in it, and into each array.
_WHOLE = ("_CHECKPOINT_METADATA", "orbax.checkpoint")
_TREE = ("_METADATA", MANIFEST)
_ARRAY = (".zarray", DESCRIPTION)


def foreign_checkpoints(directory: Path) -> list[str]:
    """Name the checkpoints in a directory that plain Orbax wrote."""
    return [
        entry.name
        for entry in entries(directory)
        if not entry.name.startswith(".")
        and not is_ours(entry)
        and any(os.path.isfile(entry / name) for name in (*_WHOLE, "_METADATA"))
    ]


def is_ours(path: Path) -> bool:
    """Tell whether flaxckpt wrote a checkpoint; False if this process cannot know."""
    try:
        return is_checkpoint(path)
    except CheckpointPathError:
        return False


def is_orbax(path: Path) -> bool:
    """Tell by Orbax's files whether a directory is a checkpoint of Orbax's.

    Orbax itself takes any directory that is not empty for a checkpoint.
    """
    if _has_any(path, (*_WHOLE, *_TREE)):
        return True
    try:
        with os.scandir(path) as entries_of_path:
            below = [entry.path for entry in entries_of_path if entry.is_dir()]
    except (OSError, ValueError):  # it may not be looked into, or has a NUL in its name
        return False
    # Items, or arrays of Orbax's first versions. A checkpoint in a directory does not
    # make the directory one.
    return any(
        _has_any(directory, (*_TREE, *_ARRAY)) and not _has_any(directory, _WHOLE)
        for directory in below
    )


def is_readable(path: Path) -> bool:
    """Tell whether there is a checkpoint with Orbax's files, or an item of one."""
    return is_orbax(path) or is_item(path)


def is_item(path: Path) -> bool:
    """Tell whether a directory is an item in a checkpoint of plain Orbax."""
    return (
        os.path.isdir(path)  # False, too, for a name that is too long
        and not _has_any(path, _WHOLE)
        and not is_ours(path.parent)
        and is_orbax(path.parent)
        and path.name in items_of(path.parent)
    )


def _has_any(directory: str | os.PathLike[str], names: Iterable[str]) -> bool:
    return any(os.path.lexists(os.path.join(directory, name)) for name in names)


def entries(directory: Path) -> list[Path]:
    """Return what is in a directory; empty if this process cannot list it."""
    try:
        return sorted(directory.iterdir())
    except OSError:  # it does not exist, or this process may not read it
        return []


def items_of(path: Path) -> dict[str, str]:
    """Name the items of a checkpoint of plain Orbax; none if it is one tree.

    Returns:
        For each item's name, the name of the Orbax class that wrote the item; empty if
        that is not known.
    """
    try:
        described = json.loads(read_small(path / "_CHECKPOINT_METADATA"))
        handlers = described["item_handlers"]
    except (NoFileError, OSError, ValueError, KeyError, TypeError, RecursionError):
        names = [file.parent.name for file in path.glob("*/_METADATA")]
        handlers = dict.fromkeys(names, "")
    if not isinstance(handlers, dict):
        return {}
    named: dict[Any, Any] = handlers
    return {
        name: str(handler)
        for name, handler in named.items()
        if name != "metrics" and (path / name).is_dir()
    }
