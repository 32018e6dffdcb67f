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
import io
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path

from flaxckpt._disk.lock_file import (
    flock,
    has_flock,
    is_alive,
    is_still,
    made,
    open_lock_file,
    owner,
)
from flaxckpt._runtime.locks import new_lock
from flaxckpt.errors import CheckpointLockedError

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


def acquire_lock(path: Path, holder: Hashable = None) -> bool:
    """Take the lock, or share it if this process has it already.

    Who has it by a file that was deleted, or replaced, takes it anew, for all its
    holders: another process may have had it meanwhile.

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
        if held is None or not _is_at(path, held):
            opened: list[io.FileIO] = []
            lost = None if held is None else held.file
            try:
                _take(path, opened)
                if held is None:
                    held = _held[path] = _Held(opened[0], {holder})
                else:
                    held.file, held.is_cleared = opened[0], False
            except BaseException:
                for file in opened:
                    file.close()
                raise
            if lost is not None:
                lost.close()
        held.holders.add(holder)
        if held.heart is None:
            heart = threading.Thread(
                target=_beat, args=(path, held), name="flaxckpt-lock", daemon=True
            )
            heart.start()
            held.heart = heart
        return not held.is_cleared


def holds_lock(path: Path, at: str | Path) -> bool:
    """Tell whether this process has the lock, and its file is the one at a path.

    Waits for nobody: a handler of a signal may come here and wait for a save, which
    asks this too.

    Args:
        path: By which the lock was acquired.
        at: Where its file should be: at that path, or at another one that leads there.
    """
    held = _held.get(path)
    try:
        return held is not None and _is_at(at, held)
    except ValueError:  # it is given back at this moment
        return False


def _is_at(path: str | Path, held: _Held) -> bool:
    """Tell whether the lock's file is the one at a path; not if it was let go."""
    return not held.file.closed and is_still(path, held.file.fileno())


def settle_lock(path: Path) -> None:
    """Note that what a writer before has left is cleared up. The lock is held."""
    _held[path].is_cleared = True


def release_lock(path: Path, holder: Hashable = None) -> None:
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


def drop_lock(path: Path, holder: Hashable) -> None:
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
            if is_still(path, held.file.fileno()):
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
        descriptor, is_ours = open_lock_file(path, opened)
        flock(path, descriptor)
        _watch(path, descriptor)
        if is_still(path, descriptor):
            if is_ours:
                _sign(descriptor)
            else:
                _succeed(path, opened)
            return
        opened.pop().close()  # its owner took the file away meanwhile


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
        descriptor = made(new, opened)
    except PermissionError:
        return
    try:
        flock(path, descriptor)
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


def _watch(path: Path, descriptor: int) -> None:
    """Where another machine holds it, wait for a sign of life."""
    host, pid = owner(descriptor)
    if not host or (host == socket.gethostname() and not is_alive(pid)):
        return
    if host == socket.gethostname() and has_flock(descriptor):
        return
    before = os.fstat(descriptor).st_mtime_ns
    until = time.monotonic() + WATCH_SECS
    while time.monotonic() < until:
        time.sleep(HEARTBEAT_SECS / 4)
        if os.fstat(descriptor).st_mtime_ns != before:
            raise CheckpointLockedError(str(path.parent), host, pid)


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
