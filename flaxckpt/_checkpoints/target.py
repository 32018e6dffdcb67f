"""Checks that a checkpoint can be written at a path, before anything is written."""

import functools
import itertools
import os
import stat
import sys
from pathlib import Path

from flaxckpt._disk.nested import refuse_inside
from flaxckpt._disk.open import is_damage, unreadable
from flaxckpt._disk.record import holds_checkpoint
from flaxckpt.errors import CheckpointPathError

NAME_BYTES = 255  # most bytes of each name in a path, on Linux and macOS
# Most bytes of a path, less room for the names below it.
_PATH_BYTES = (4096 if sys.platform == "linux" else 1024) - 300
_ELSEWHERE = "Choose another filepath."


def check_target(path: Path, root: Path) -> None:
    """Check that a checkpoint can be written at `path`, and write nothing.

    Raises:
        CheckpointPathError: If something else is there, the path is within a
            checkpoint, is too long or on another file system than `root`, or its
            directory cannot be written to.
    """
    device = check_root(root).st_dev
    _check_names(os.fspath(path))
    try:
        there, found = path, os.lstat(path)
    except OSError:
        there, found = _nearest(path)
    if found is not None and stat.S_ISLNK(found.st_mode):
        raise CheckpointPathError(
            str(path),
            "is a symbolic link, and a checkpoint is a directory of that very name. "
            f"Remove the link, or save to where it leads, {os.path.realpath(path)!r}.",
        )
    if found is None or not stat.S_ISDIR(found.st_mode):
        raise _no_directory(there, found, "a checkpoint is a directory")
    if found.st_dev != device:
        fixed = os.path.join(os.path.realpath(path.parent), "{epoch:02d}")
        raise CheckpointPathError(
            str(there),
            f"is on another file system than {str(root)!r}, in which each checkpoint "
            f"is written before it is renamed. Save there by filepath={fixed!r}.",
        )
    refuse_inside(path, itertools.takewhile(lambda each: each != root, path.parents))
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
    if holds_checkpoint(path):
        return False
    try:
        has_any = any(path.iterdir())
    except FileNotFoundError:  # the writing thread has deleted it meanwhile
        return False
    # The writing thread may have put a checkpoint there meanwhile.
    return has_any and not holds_checkpoint(path)


def check_root(root: Path) -> os.stat_result:
    """Check that `root` is a directory, or can be made.

    Returns:
        The status of `root`, or of the nearest directory above it that exists.

    Raises:
        CheckpointPathError: If `root`, or the nearest path above it that exists, is a
            file; or if `root` is too long.
    """
    _check_names(os.fspath(root))
    there, found = _nearest(root)
    if found is None or not stat.S_ISDIR(found.st_mode):
        raise _no_directory(there, found, "checkpoints need a directory there")
    return found


def _no_directory(
    path: Path, found: os.stat_result | None, need: str
) -> CheckpointPathError:
    what, name = "a file", "file"
    if found is None:
        what, name = "a symbolic link that leads nowhere", "link"
    advice = f"Remove the {name}, or choose another filepath."
    return CheckpointPathError(str(path), f"is {what}, and {need}. {advice}")


@functools.lru_cache(maxsize=64)
def _check_names(path: str) -> None:
    """Check that a file system takes the names in a path.

    Raises:
        CheckpointPathError: If it cannot be encoded, or it or a name in it is too long.
    """
    try:
        names = os.fsencode(path).split(b"/")
    except UnicodeEncodeError as error:
        problem = f"is no path in this file system's encoding ({error})"
        raise CheckpointPathError(path, f"{problem}. {_ELSEWHERE}") from error
    longest = max(map(len, names))
    if longest > NAME_BYTES or sum(map(len, names)) + len(names) > _PATH_BYTES:
        problem = f"is too long for a checkpoint, or has a name of {longest} bytes"
        limits = f"the limits are {_PATH_BYTES} bytes and {NAME_BYTES}"
        raise CheckpointPathError(path, f"{problem}: {limits}. {_ELSEWHERE}")


def _nearest(path: Path) -> tuple[Path, os.stat_result | None]:
    """Find the nearest path that exists, and its status; None for a broken link.

    It looks at each path only once, since other threads make directories meanwhile.
    """
    for each in itertools.chain([path], path.parents):  # mostly, the first is there
        try:
            return each, os.stat(each)
        except OSError as error:
            if not is_damage(error):
                raise unreadable(each, error) from error
            if each.is_symlink():
                return each, None
    raise AssertionError(f"{path} has no root")
