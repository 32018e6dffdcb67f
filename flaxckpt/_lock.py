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
import io
import json
import os
import socket
import stat
import sys
import threading
import time
import uuid
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path

from flaxckpt._locks import new_lock
from flaxckpt._parsing import parse_owner
from flaxckpt.errors import CheckpointLockedError, CheckpointPathError

HEARTBEAT_SECS = 2.0
WATCH_SECS = 3 * HEARTBEAT_SECS
_LAST_SECS = 1.0  # that the end of the interpreter waits


@dataclass
class _Held:
    """A lock that this process has.

    Attributes:
        file: The open file, locked.
        holders: Those in this process that share it; nobody's if there are none.
        is_cleared: Whether what a writer before has left is cleared up.
        wakes: Set when a holder is gone.
        heart: The thread that touches the file.
    """

    file: io.FileIO
    holders: set[Hashable]
    is_cleared: bool = False
    wakes: threading.Event = field(default_factory=threading.Event)
    heart: threading.Thread | None = None


_held: dict[Path, _Held] = {}
_guard = new_lock()


def acquire(path: Path, holder: Hashable = None) -> bool:
    """Take the lock, or share it if this process has it already.

    Waits, for a few seconds at most, only where another machine seems to hold it. An
    interrupt may leave it taken, or not; the same call again goes on from there.

    Args:
        path: The lock's file; its directory exists.
        holder: Who takes it, the same for `release`.

    Returns:
        Whether what a writer before has left is to be cleared up, until `settle` says
        that it is.

    Raises:
        CheckpointLockedError: If another process has it.
        CheckpointPathError: If there is something at `path` that cannot be the lock.
    """
    with _guard:
        held = _held.get(path)
        if held is not None and not held.holders:
            _let_go(path, held)  # an interrupt has come before it was
            held = None
        if held is None:
            opened: list[io.FileIO] = []
            try:
                _take(path, opened)
                held = _held[path] = _Held(opened[0], {holder})
            except BaseException:
                for file in opened:
                    file.close()
                raise
        held.holders.add(holder)
        if held.heart is None:
            heart = threading.Thread(
                target=_beat, args=(path, held), name="flaxckpt-lock", daemon=True
            )
            heart.start()
            held.heart = heart
        return not held.is_cleared


def settle(path: Path) -> None:
    """Note that what a writer before has left is cleared up. The lock is held."""
    _held[path].is_cleared = True


def release(path: Path, holder: Hashable = None) -> None:
    """Give the lock back; the file goes when the last holder in this process did.

    Nothing happens if the holder does not have it. At the end of the interpreter a
    thread may have been stopped for ever while it had the guard: then the file stays,
    which is nobody's once the process has ended.
    """
    if not _guard.acquire(timeout=_LAST_SECS if sys.is_finalizing() else -1):
        return
    try:
        held = _held.get(path)
        if held is not None:
            held.holders.discard(holder)
            if not held.holders:
                _let_go(path, held)
    finally:
        _guard.release()


def drop(path: Path, holder: Hashable) -> None:
    """Give back the lock of a holder that is collected as garbage.

    That may be at any moment, in any thread, so it waits for nothing: if the lock is
    just taken or given back, the heart does this.
    """
    held = _held.get(path)
    if held is None:
        return
    held.holders.discard(holder)
    if not _guard._is_owned() and _guard.acquire(blocking=False):
        try:
            if not held.holders:
                _let_go(path, held)
        finally:
            _guard.release()
    else:
        held.wakes.set()


def _let_go(path: Path, held: _Held) -> None:
    """Give a lock back that nobody holds. If that is interrupted, do it again."""
    if not held.file.closed:
        with contextlib.suppress(OSError):  # it is nobody's when it is closed
            if _is_still(path, held.file.fileno()):
                path.unlink()
        held.file.close()
    held.wakes.set()
    if _held.get(path) is held:
        del _held[path]


def _forget() -> None:
    """Let a forked process not hold on to what its parent has locked."""
    for held in _held.values():
        held.file.close()
    _held.clear()


os.register_at_fork(after_in_child=_forget)


def _take(path: Path, opened: list[io.FileIO]) -> None:
    """Lock the file.

    Args:
        path: The lock's file.
        opened: For all files that are opened. Whatever interrupts this, they are in it;
            in the end, the locked one alone.
    """
    while True:
        descriptor, is_ours = _opened(path, opened)
        _flock(path, descriptor)
        _watch(path, descriptor)
        if _is_still(path, descriptor):
            if is_ours:
                _sign(descriptor)
            else:
                _succeed(path, opened)
            return
        opened.pop().close()  # its owner took the file away meanwhile


def _opened(path: Path, opened: list[io.FileIO]) -> tuple[int, bool]:
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
            return _made(path, opened), True
        except FileExistsError:
            pass
        try:
            try:
                opened.append(io.FileIO(os.open(path, os.O_RDWR | flags), "r+"))
            except PermissionError:  # reading another user's suffices to lock it
                opened.append(io.FileIO(os.open(path, os.O_RDONLY | flags), "r"))
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
    descriptor = opened[-1].fileno()
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        what = "a file with other names (hard links)"
        raise _no_lock(path, what if stat.S_ISREG(found.st_mode) else "no plain file")
    return descriptor, found.st_uid == os.geteuid()


def _made(path: Path, opened: list[io.FileIO]) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    opened.append(io.FileIO(os.open(path, flags, 0o666), "r+"))
    descriptor = opened[-1].fileno()
    # Whoever shares the directory has to be able to see whether the lock is held.
    with contextlib.suppress(OSError):
        os.fchmod(descriptor, stat.S_IMODE(os.fstat(descriptor).st_mode) | 0o444)
    return descriptor


def _no_lock(path: Path, what: str) -> CheckpointPathError:
    return CheckpointPathError(
        str(path),
        f"is {what}, where flaxckpt keeps the lock of these checkpoints. Nothing was "
        "written to it. Remove it, or choose another filepath.",
    )


def _succeed(path: Path, opened: list[io.FileIO]) -> None:
    """Replace the lock of another user, which nobody holds any more, by a new one.

    Where the directory lets only its owner replace the old file, that one stays: it is
    locked, but names the owner of before.

    Args:
        path: The lock's file.
        opened: That file, which this process has locked; then the one that stays.
    """
    new = path.with_name(f"{path.stem}-{uuid.uuid4().hex[:12]}{path.suffix}")
    try:
        descriptor = _made(new, opened)
    except PermissionError:
        return
    try:
        _flock(path, descriptor)
        _sign(descriptor)
        os.rename(new, path)
    except PermissionError:
        opened.pop().close()
        new.unlink()
        return
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise
    opened.pop(0).close()


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
    except PermissionError:  # somebody else's
        pass
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


def _beat(path: Path, held: _Held) -> None:
    while not held.file.closed:
        if held.wakes.wait(HEARTBEAT_SECS):
            held.wakes.clear()
            if not held.holders and not held.file.closed:
                with _guard:
                    if not held.holders:
                        _let_go(path, held)
        else:
            with contextlib.suppress(OSError, ValueError):  # it is closed by now
                os.utime(held.file.fileno())
