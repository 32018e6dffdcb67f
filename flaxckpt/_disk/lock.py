"""Lock a series of checkpoints, so that one process writes it at a time.

The lock is a file, locked with flock(2). The kernel drops the lock when its owner ends,
however it ends, so one machine has no stale locks, even after a reboot. Where several
machines do not share such locks, or the file system has none, a heartbeat decides: the
owner touches the file every `HEARTBEAT_SECS`, and a process that finds another owner in
the file watches it for `WATCH_SECS`. It compares no clocks, only looks for a change.

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
    is_alive,
    is_still,
    made,
    open_lock_file,
    owner,
    try_flock,
)
from flaxckpt._runtime.locks import new_lock
from flaxckpt.errors import CheckpointLockedError

HEARTBEAT_SECS = 2.0
WATCH_SECS = 3 * HEARTBEAT_SECS
_LAST_SECS = 1.0  # the most that `release` delays the interpreter's end


@dataclass
class _Held:
    """A lock that this process has.

    Attributes:
        file: The open file, locked.
        holders: The objects in this process that share it; if empty, the lock is free.
        is_cleared: Whether the leftovers of an earlier writer are cleared up.
        wakes: Set after a holder is gone, to wake `heart`.
        heart: The thread that touches the file.
    """

    file: io.FileIO
    holders: set[Hashable]
    is_cleared: bool = False
    wakes: threading.Event = field(default_factory=threading.Event)
    heart: threading.Thread | None = None


_held: dict[Path, _Held] = {}
_guard = new_lock()


class FileLock:
    """The lock of a series on a disk, as one object takes it; see `SeriesLock`."""

    def acquire(self, path: Path) -> bool:
        """Take the lock, or share it if this process has it already.

        If the lock's file was deleted or replaced, this takes the lock anew, for all
        holders: another process may have had it meanwhile.

        Waits, for some `WATCH_SECS`, only if the file names an owner whose lock flock
        may not show. After an interrupt the lock may be taken or not; repeat the call.

        Args:
            path: The lock's file; its directory exists.

        Returns:
            Whether to clear up what an earlier writer has left: True until
            `note_cleared` is called.

        Raises:
            CheckpointLockedError: If another process has the lock.
            CheckpointPathError: If what is at `path` cannot be the lock, or not be
                opened.
        """
        with _guard:
            held = _held.get(path)
            if held is not None and not held.holders:
                _let_go(path, held)  # an interrupt came before this
                held = None
            if held is None or not _is_at(path, held.file):
                opened: list[io.FileIO] = []
                lost = None if held is None else held.file
                try:
                    _take(path, opened)
                    if held is None:
                        held = _held[path] = _Held(opened[0], {self})
                    else:
                        held.file, held.is_cleared = opened[0], False
                except BaseException:
                    for file in opened:
                        file.close()
                    raise
                if lost is not None:
                    lost.close()
            held.holders.add(self)
            if held.heart is None:
                heart = threading.Thread(
                    target=_beat, args=(path, held), name="flaxckpt-lock", daemon=True
                )
                heart.start()
                held.heart = heart
            return not held.is_cleared

    def is_held(self, path: Path, at: str | Path) -> bool:
        """Tell whether this process has the lock, and its file is the one at a path.

        Takes no lock: a signal handler may call this and wait for a save, which calls
        this too.

        Args:
            path: The path by which the lock was acquired.
            at: Where its file should be: `path`, or another path that leads there.
        """
        file = getattr(_held.get(path), "file", None)
        try:
            return file is not None and _is_at(at, file)
        except (OSError, ValueError):
            if file is None or not file.closed:
                raise
            return self.is_held(path, at)  # another thread has closed it meanwhile

    def note_cleared(self, path: Path) -> None:
        """Note that an earlier writer's leftovers are cleared up; needs the lock."""
        _held[path].is_cleared = True

    def release(self, path: Path) -> None:
        """Give the lock back; the last holder in this process also deletes the file.

        Nothing happens if this object does not have the lock. At the end of the
        interpreter, `_guard` may belong to a thread that was stopped for ever. Then the
        file stays, and the lock is free once the process has ended.
        """
        if not _guard.acquire(timeout=_LAST_SECS if sys.is_finalizing() else -1):
            return
        try:
            held = _held.get(path)
            if held is not None:
                held.holders.discard(self)
                _let_go(path, held)
        finally:
            _guard.release()

    def drop(self, path: Path) -> None:
        """Give the lock back after its owner is collected as garbage.

        The collection may run at any moment, in any thread, so this waits for nothing.
        If `_guard` is taken, the lock's heart gives the lock back.
        """
        held = _held.get(path)
        if held is None:
            return
        held.holders.discard(self)
        if not _guard._is_owned() and _guard.acquire(blocking=False):
            try:
                _let_go(path, held)
            finally:
                _guard.release()
        else:
            held.wakes.set()


def _is_at(path: str | Path, file: io.FileIO) -> bool:
    """Tell whether a lock is not let go, and its file is the one at a path."""
    return not file.closed and is_still(path, file.fileno())


def _let_go(path: Path, held: _Held) -> None:
    """Give back a lock if it has no holders; repeat the call after an interrupt."""
    if held.holders:
        return
    if not held.file.closed:
        with contextlib.suppress(OSError):  # closing the file frees the lock anyway
            if is_still(path, held.file.fileno()):
                path.unlink()
        held.file.close()
    held.wakes.set()
    if _held.get(path) is held:
        del _held[path]


def _forget() -> None:
    """Let go, in a forked process, of the locks of its parent."""
    for held in _held.values():
        held.file.close()
    _held.clear()


os.register_at_fork(after_in_child=_forget)


def _take(path: Path, opened: list[io.FileIO]) -> None:
    """Lock the file.

    Args:
        path: The lock's file.
        opened: Receives each file that is opened, so that the caller can close it after
            an interrupt. On return it holds the locked file alone.
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
        opened.pop().close()  # its owner deleted the file meanwhile


def _succeed(path: Path, opened: list[io.FileIO]) -> None:
    """Replace the file of another user, which this process has locked, by a new one.

    If the directory lets only the file's owner replace it, the old file stays: it is
    locked, but still names the previous owner.

    Args:
        path: The lock's file.
        opened: Holds that file; on return, the file that is the lock now.
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
    """Watch for the owner's heartbeat, unless flock or the pid shows that it ended."""
    host, pid = owner(descriptor)
    if not host or (host == socket.gethostname() and not is_alive(pid)):
        return
    if host == socket.gethostname() and try_flock(descriptor):
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
                    _let_go(path, held)
        else:
            with contextlib.suppress(OSError, ValueError):  # it is closed by now
                os.utime(held.file.fileno())
