"""Exchange the names of two directories, by one call where the kernel has one."""

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path

from flaxckpt._disk.record import replaced_path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# The errors of a rename onto a directory that is not empty.
IN_THE_WAY = errno.ENOTEMPTY, errno.EEXIST


def replace(
    written: Path, target: Path, sync_directory: Callable[[Path], None]
) -> None:
    """Exchange two directories, by one call if there is one, or by three renames."""
    if _exchange(written, target):
        return
    hidden = replaced_path(target)
    if hidden.exists():  # an earlier call failed before its last rename
        os.rename(hidden, written.with_name("replaced"))
    _rename_by_way_of(hidden, target, written, sync_directory)


def swap(new: Path, path: Path, sync_directory: Callable[[Path], None]) -> None:
    """Exchange the names of two checkpoints in one directory.

    Where the kernel has no such call, three renames do it, and the new checkpoint is
    hidden meanwhile. The old one never is, because a hidden checkpoint counts as
    replaced: it is at `path` or at `new`. A reader of `path` always finds one of the
    two.
    """
    if _exchange(new, path):
        return
    _rename_by_way_of(replaced_path(path), new, path, sync_directory)


def _rename_by_way_of(
    hidden: Path, first: Path, second: Path, sync_directory: Callable[[Path], None]
) -> None:
    """Exchange two directories by three renames; `first` waits at `hidden`."""
    os.rename(first, hidden)
    try:
        sync_directory(first.parent)
        os.rename(second, first)
    except OSError:
        os.rename(hidden, first)
        raise
    sync_directory(first.parent)
    os.rename(hidden, second)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two directories atomically by renameat2(2), or return False."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    names = os.fsencode(one), os.fsencode(other)
    if not renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE):
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))
