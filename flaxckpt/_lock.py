"""One writing process for a series of checkpoints at a time.

The lock is a file, locked with flock(2): the kernel drops it when its owner ends,
however it ends, so on one machine there are no stale locks, nor after a reboot. Where
the kernels of several machines do not share such locks, or the file system has none, a
heartbeat tells: the owner touches the file every few seconds, and who finds it owned by
another machine watches it for longer than that. Only changes are watched, no clocks
compared.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from flaxckpt.errors import CheckpointLockedError

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
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _flock(path, descriptor)
            _watch(path, descriptor)
            if _is_still(path, descriptor):
                owner = {"host": socket.gethostname(), "pid": os.getpid()}
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(owner).encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its owner took the file away meanwhile


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
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _owner(descriptor: int) -> tuple[str, int]:
    try:
        fields = json.loads(os.pread(descriptor, 4096, 0))
        return str(fields["host"]), int(fields["pid"])
    except (ValueError, KeyError, TypeError):
        return "", 0


def _beat(descriptor: int, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_SECS):
        try:
            os.utime(descriptor)
        except OSError:
            return
