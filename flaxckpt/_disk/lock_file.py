"""Open or make a lock's file, and never another file in its place."""

import contextlib
import errno
import fcntl
import io
import os
import stat
from pathlib import Path

from flaxckpt._disk.owner import parse_owner
from flaxckpt.errors import CheckpointLockedError, CheckpointPathError


def open_lock_file(path: Path, opened: list[io.FileIO]) -> tuple[int, bool]:
    """Open the lock's file, or make it; tell whether this process may write into it.

    Anybody who can write in the directory can put something else there. So this follows
    no link and refuses a file with several names, and this process may write only into
    a file of its own user.

    Args:
        path: The lock's file.
        opened: Receives the file.

    Returns:
        The file's descriptor, and whether this process may write into it.

    Raises:
        CheckpointPathError: If what is there cannot be the lock, or cannot be opened.
    """
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    while True:
        try:
            return made(path, opened), True
        except FileExistsError:
            pass
        try:
            try:
                opened.append(io.FileIO(os.open(path, os.O_RDWR | flags), "r+"))
            except PermissionError:  # reading it suffices to lock it
                opened.append(io.FileIO(os.open(path, os.O_RDONLY | flags), "r"))
            break
        except FileNotFoundError:  # its owner has just deleted it
            continue
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise _no_lock(path, "no plain file") from error
            raise CheckpointPathError(
                str(path),
                f"cannot be opened: {error.strerror}. It is the lock of the "
                "checkpoints: have its owner remove it, or choose another filepath.",
            ) from error
    descriptor = opened[-1].fileno()
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        what = "a file with other names (hard links)"
        raise _no_lock(path, what if stat.S_ISREG(found.st_mode) else "no plain file")
    return descriptor, found.st_uid == os.geteuid() and opened[-1].writable()


def made(path: Path, opened: list[io.FileIO]) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    opened.append(io.FileIO(os.open(path, flags, 0o666), "r+"))
    descriptor = opened[-1].fileno()
    # Other users of the directory must be able to open it, to see whether it is held.
    with contextlib.suppress(OSError):
        os.fchmod(descriptor, stat.S_IMODE(os.fstat(descriptor).st_mode) | 0o444)
    return descriptor


def _no_lock(path: Path, what: str) -> CheckpointPathError:
    return CheckpointPathError(
        str(path),
        f"is {what}, where flaxckpt keeps the lock of these checkpoints. Nothing was "
        "written to it. Remove it, or choose another filepath.",
    )


def flock(path: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CheckpointLockedError(str(path.parent), *owner(descriptor)) from error
    except OSError:
        pass  # this file system has no such locks: the heartbeat decides


def try_flock(descriptor: int) -> bool:
    """Lock the file by `flock`; tell whether this process has the lock now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process
        pass
    return True


def is_still(path: str | Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except (FileNotFoundError, NotADirectoryError):
        return False


def owner(descriptor: int) -> tuple[str, int]:
    try:
        return parse_owner(os.pread(descriptor, 4096, 0))
    except OSError:
        return "", 0
