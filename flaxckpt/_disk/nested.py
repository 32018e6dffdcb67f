"""Refuse checkpoints in checkpoints: deleting the outer deletes the inner one."""

import os
from collections.abc import Iterable
from pathlib import Path

from flaxckpt._disk.record import (
    HIDDEN_PREFIX,
    LEAVES_FILE,
    RECORD_FILE,
    REPLACED_PREFIX,
)
from flaxckpt.errors import CheckpointPathError

_TREE = "state"  # the directory of a checkpoint that holds its own tree


def refuse_inside(path: Path, above: Iterable[Path]) -> None:
    """Check that no checkpoint is written in another one.

    Args:
        path: Where a checkpoint is to be written.
        above: Directories above `path`.

    Raises:
        CheckpointPathError: If one of `above` is a checkpoint.
    """
    for directory in above:
        if _holds_checkpoint(directory):
            raise CheckpointPathError(
                str(directory),
                f"is a checkpoint, and what is saved in it, at {str(path)!r}, would be "
                "deleted with it. Choose another filepath.",
            )


def refuse_around(path: Path) -> None:
    """Check that a checkpoint has no others in it; its own tree is not searched.

    Args:
        path: The checkpoint that is to be replaced, moved or deleted.

    Raises:
        CheckpointPathError: If there is another checkpoint in it.
    """
    left = [entry for entry in _directories(path) if entry.name != _TREE]
    while left:
        entry = left.pop()
        if _holds_checkpoint(Path(entry.path)):
            raise CheckpointPathError(
                str(path),
                f"has another checkpoint in it, {entry.path!r}, and is neither "
                "replaced nor deleted. Move that one, or choose another filepath.",
            )
        left += _directories(entry)


def _holds_checkpoint(directory: Path) -> bool:
    names = RECORD_FILE, LEAVES_FILE
    return any(os.path.lexists(directory / name) for name in names)


def _directories(path: os.PathLike[str]) -> list[os.DirEntry[str]]:
    """Return the directories in a directory, without staging directories."""
    try:
        with os.scandir(path) as found:
            return [
                entry
                for entry in found
                if entry.is_dir(follow_symlinks=False)
                and (
                    not entry.name.startswith(HIDDEN_PREFIX)
                    or entry.name.startswith(REPLACED_PREFIX)
                )
            ]
    except OSError:
        return []
