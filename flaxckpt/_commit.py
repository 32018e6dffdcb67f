"""Directories that appear whole or not at all: staging, renaming, exchanging."""

import ctypes
import errno
import os
import shutil
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from flaxckpt._record import STAGING_PREFIX

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def staging(root: Path) -> Generator[Path]:
    """Make a directory below `root` to write in, and take it away afterwards."""
    path = root / f"{STAGING_PREFIX}{uuid.uuid4().hex[:12]}"
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def put(written: Path, target: Path) -> None:
    """Move a finished directory to its place, or exchange it with the one there.

    `target` is at every moment the old directory, whole, or the new one, whole.
    Afterwards the old one, if there was one, is at `written`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(written, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        _exchange(written, target)


def remove(path: Path, root: Path) -> None:
    """Delete a checkpoint: it is gone at once, however long its files take."""
    with staging(root) as aside:
        path.rename(aside / "removed")


def _exchange(one: Path, other: Path) -> None:
    """Exchange two directories atomically, by Linux's renameat2(2)."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        code = errno.ENOSYS
    else:
        if not renameat2(
            _AT_FDCWD,
            os.fsencode(one),
            _AT_FDCWD,
            os.fsencode(other),
            _RENAME_EXCHANGE,
        ):
            return
        code = ctypes.get_errno()
    if code not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        raise OSError(code, os.strerror(code), str(one), None, str(other))
    # TODO(durability): states between these two renames are not yet recognised.
    aside = one.with_name("replaced")
    os.rename(other, aside)
    os.rename(one, other)
    os.rename(aside, one)
