"""Two directories exchange their names, by one call of the kernel where it has one."""

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path

from flaxckpt._disk.record import set_aside

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# What a rename fails with where a directory is that is not empty.
IN_THE_WAY = errno.ENOTEMPTY, errno.EEXIST


def replace(
    written: Path, target: Path, sync_directory: Callable[[Path], None]
) -> None:
    """Exchange two directories, by one call or, where there is none, by three."""
    if _exchange(written, target):
        return
    aside = set_aside(target)
    if aside.exists():  # an error came between the last two calls
        os.rename(aside, written.with_name("replaced"))
    _rename_by_way_of(aside, target, written, sync_directory)


def swap(new: Path, path: Path, sync_directory: Callable[[Path], None]) -> None:
    """Exchange the names of two checkpoints in one directory.

    Where there is no such call, three renames do it. Between them the one at `path` is
    there or at `new`, and who reads `path` finds one of the two: nothing is at a place
    at which it counts as replaced, but the new one.
    """
    if _exchange(new, path):
        return
    _rename_by_way_of(set_aside(path), new, path, sync_directory)


def _rename_by_way_of(
    aside: Path, first: Path, second: Path, sync_directory: Callable[[Path], None]
) -> None:
    """Exchange two directories by three renames; the first waits aside meanwhile."""
    os.rename(first, aside)
    try:
        sync_directory(first.parent)
        os.rename(second, first)
    except OSError:
        os.rename(aside, first)
        raise
    sync_directory(first.parent)
    os.rename(aside, second)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two directories atomically, by Linux's renameat2(2), if it is there."""
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
