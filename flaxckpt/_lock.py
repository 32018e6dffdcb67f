"""One writing process for a series of checkpoints at a time.

The lock is a file, locked with flock(2): the kernel drops it when its owner ends,
however it ends, so on one machine there are no stale locks, nor after a reboot. Where
the kernels of several machines do not share such locks, or the file system has none, a
heartbeat tells: the owner touches the file every few seconds, and who finds it owned by
another machine watches it for longer than that. Only changes are watched, no clocks
compared.

A lock that nobody holds is free, whoever owns the file: another user of the same
directory takes it over by putting a new file in its place.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from flaxckpt._parsing import parse_owner
from flaxckpt.errors import CheckpointLockedError, CheckpointPathError

HEARTBEAT_SECS = 2.0
WATCH_SECS = 3 * HEARTBEAT_SECS


@dataclass
class _Held:
    descriptor: int
    count: int
    stop: threading.Event = field(default_factory=threading.Event)


_held: dict[Path, _Held] = {}
_guard = threading.Lock()


def acquire(path: Path) -> bool:
    """Take the lock, or share it if this process has it already.

    Waits, for a few seconds at most, only where another machine seems to hold it.

    Args:
        path: The lock's file; its directory exists.

    Returns:
        Whether it was not held before: then what is left of a writer before is stale.

    Raises:
        CheckpointLockedError: If another process has it.
        CheckpointPathError: If there is something at `path` that cannot be the lock.
    """
    with _guard:
        held = _held.get(path)
        if held is not None:
            held.count += 1
            return False
        descriptor = _take(path)
        held = _held[path] = _Held(descriptor, 1)
    beat = threading.Thread(
        target=_beat, args=(descriptor, held.stop), name="flaxckpt-lock", daemon=True
    )
    beat.start()
    return True


def release(path: Path) -> None:
    """Give the lock back; the file goes when the last holder in this process did."""
    with _guard:
        held = _held[path]
        held.count -= 1
        if held.count:
            return
        del _held[path]
        held.stop.set()
        with contextlib.suppress(OSError):  # it is nobody's when it is closed
            if _is_still(path, held.descriptor):
                path.unlink()
        os.close(held.descriptor)


def _let_go() -> None:
    """Let a forked process not hold on to what its parent has locked."""
    for held in _held.values():
        os.close(held.descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


def _take(path: Path) -> int:
    while True:
        descriptor, is_ours = _opened(path)
        try:
            _flock(path, descriptor)
            _watch(path, descriptor)
            if _is_still(path, descriptor):
                if is_ours:
                    _sign(descriptor)
                    return descriptor
                return _succeed(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its owner took the file away meanwhile


def _opened(path: Path) -> tuple[int, bool]:
    """Open the lock's file, or make it; tell whether this process may write into it.

    Anybody who can write in the directory can put something else there. So a link is
    not followed, and a file that was found is written only if it is this user's, under
    this one name.

    Raises:
        CheckpointPathError: If there is something that cannot be the lock.
    """
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    while True:
        try:
            return _made(path), True
        except FileExistsError:
            pass
        try:
            try:
                descriptor = os.open(path, os.O_RDWR | flags)
            except PermissionError:  # reading another user's suffices to lock it
                descriptor = os.open(path, os.O_RDONLY | flags)
            break
        except FileNotFoundError:  # its owner has just taken it away
            continue
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise _no_lock(path, "no plain file") from error
            raise CheckpointPathError(
                str(path),
                f"cannot be opened: {error.strerror}. It is the lock of the "
                "checkpoints: have its owner remove it, or choose another filepath.",
            ) from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        what = "a file with other names (hard links)"
        raise _no_lock(path, what if stat.S_ISREG(found.st_mode) else "no plain file")
    return descriptor, found.st_uid == os.geteuid()


def _made(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    # Whoever shares the directory has to be able to see whether the lock is held.
    with contextlib.suppress(OSError):
        os.fchmod(descriptor, stat.S_IMODE(os.fstat(descriptor).st_mode) | 0o444)
    return descriptor


def _no_lock(path: Path, what: str) -> CheckpointPathError:
    return CheckpointPathError(
        str(path),
        f"is {what}, and the lock of the checkpoints has to be there. Nothing was "
        "written to it. Remove it, or choose another filepath.",
    )


def _succeed(path: Path, held: int) -> int:
    """Replace the lock of another user, which nobody holds any more, by a new one.

    Args:
        path: The lock's file.
        held: That file, which this process has locked.

    Returns:
        The new file, locked. Where the directory lets only its owner replace the old
        file, that one: it is locked, but names the owner of before.
    """
    new = path.with_name(f"{path.stem}-{uuid.uuid4().hex[:12]}{path.suffix}")
    try:
        descriptor = _made(new)
    except PermissionError:
        return held
    try:
        _flock(path, descriptor)
        _sign(descriptor)
        os.rename(new, path)
    except PermissionError:
        os.close(descriptor)
        new.unlink()
        return held
    except BaseException:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            new.unlink()
        raise
    os.close(held)
    return descriptor


def _sign(descriptor: int) -> None:
    owner = {"host": socket.gethostname(), "pid": os.getpid()}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(owner).encode(), 0)


def _flock(path: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CheckpointLockedError(str(path.parent), *_owner(descriptor)) from error
    except OSError:
        pass  # this file system has no such locks: the heartbeat tells


def _watch(path: Path, descriptor: int) -> None:
    """Where another machine holds it, wait for a sign of life."""
    host, pid = _owner(descriptor)
    if not host or (host == socket.gethostname() and not _is_alive(pid)):
        return
    if host == socket.gethostname() and _has_flock(descriptor):
        return
    before = os.fstat(descriptor).st_mtime_ns
    until = time.monotonic() + WATCH_SECS
    while time.monotonic() < until:
        time.sleep(HEARTBEAT_SECS / 4)
        if os.fstat(descriptor).st_mtime_ns != before:
            raise CheckpointLockedError(str(path.parent), host, pid)


def _has_flock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _owner(descriptor: int) -> tuple[str, int]:
    try:
        return parse_owner(os.pread(descriptor, 4096, 0))
    except OSError:
        return "", 0


def _beat(descriptor: int, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_SECS):
        try:
            os.utime(descriptor)
        except OSError:
            return
