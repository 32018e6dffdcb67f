"""Whether a path can be written to, before anything is."""

import os
import stat
import sys
from pathlib import Path

from flaxckpt._disk.open import is_damage, unreadable
from flaxckpt._disk.record import is_checkpoint
from flaxckpt.errors import CheckpointPathError

NAME_BYTES = 255  # of each name in a path; Linux and macOS take no more
_PATH_BYTES = (4096 if sys.platform == "linux" else 1024) - 300  # less what is below
_ELSEWHERE = "Choose another filepath."


def check_target(path: Path, root: Path) -> None:
    """Check that a checkpoint can be written at `path`, and write nothing.

    Raises:
        CheckpointPathError: If something else is there, or the directory cannot be
            written to.
    """
    check_root(root)
    there, is_directory = _nearest(path)
    if not is_directory:
        raise CheckpointPathError(
            str(there),
            "is a file, and a checkpoint is a directory. Remove the file, or choose "
            "another filepath.",
        )
    if there == path:
        if _holds_other_things(path):
            raise CheckpointPathError(
                str(path),
                "is there and is no checkpoint: it would be replaced. Give the "
                'checkpoints names in it, as in filepath="directory/{epoch:02d}".',
            )
        there = path.parent
    if not os.access(there, os.W_OK | os.X_OK):
        raise CheckpointPathError(
            str(there),
            "cannot be written to. Make it writable, or choose another filepath.",
        )


def _holds_other_things(path: Path) -> bool:
    if is_checkpoint(path):
        return False
    try:
        has_any = any(path.iterdir())
    except FileNotFoundError:  # the thread that writes has deleted it by now
        return False
    return has_any and not is_checkpoint(path)  # which that thread has put there by now


def check_root(root: Path) -> None:
    """Check that `root` is a directory, or can be made.

    Raises:
        CheckpointPathError: If it, or what should be a directory above it, is a file.
    """
    there, is_directory = _nearest(root)
    if not is_directory:
        raise CheckpointPathError(
            str(there),
            "is a file, and checkpoints need a directory there. Remove the file, or "
            "choose another filepath.",
        )


def _nearest(path: Path) -> tuple[Path, bool]:
    """Find what exists of a path: the nearest, and whether it is a directory.

    One look at each, for other threads make directories meanwhile.

    Raises:
        CheckpointPathError: If no file system takes the path.
    """
    try:
        names = os.fsencode(path).split(b"/")
    except UnicodeEncodeError as error:
        problem = f"is no path in this file system's encoding ({error})"
        raise CheckpointPathError(str(path), f"{problem}. {_ELSEWHERE}") from error
    longest = max(map(len, names))
    if longest > NAME_BYTES or sum(map(len, names)) + len(names) > _PATH_BYTES:
        problem = f"is too long for a checkpoint, or has a name of {longest} bytes"
        limits = f"the limits are {_PATH_BYTES} bytes and {NAME_BYTES}"
        raise CheckpointPathError(str(path), f"{problem}: {limits}. {_ELSEWHERE}")
    for each in (path, *path.parents):
        try:
            return each, stat.S_ISDIR(each.stat().st_mode)
        except OSError as error:
            if not is_damage(error):
                raise unreadable(each, error) from error
            if each.is_symlink():  # to nothing
                return each, False
    raise AssertionError(f"{path} has no root")
