"""Lock a series in an object store, so that one process writes it at a time.

The lock is an object that its owner writes again every `HEARTBEAT_SECS`. Each write
replaces only the version that the writer has read, so only one of several processes
gets the lock. A process that finds it taken watches it for `WATCH_SECS`: if the object
does not change, its owner has died. The watch compares no clocks.
"""

import atexit
import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from flaxckpt._disk.fields import MalformedError, parse_json
from flaxckpt._disk.owner import parse_owner
from flaxckpt._object_store.objects import Object, Objects
from flaxckpt._runtime.locks import new_lock
from flaxckpt.errors import CheckpointError, CheckpointLockedError

HEARTBEAT_SECS = 5.0
WATCH_SECS = 3 * HEARTBEAT_SECS
_TRIES = 5


class Lease:
    """A lock that this process has taken; all objects that write the series share it.

    Attributes:
        holders: The objects that share it.
        is_cleared: Whether the leftovers of an earlier writer are cleared up.
    """

    def __init__(self, objects: Objects, key: str) -> None:
        """Describe the lock; `take` takes it.

        Args:
            objects: The objects below the series' root.
            key: The lock's key.
        """
        self._objects, self._key, self._url = objects, key, _url(objects, key)
        self._id, self._beats = uuid.uuid4().hex, 0
        self._generation: bytes | None = None
        self._process, self._is_lost, self._is_over = os.getpid(), False, False
        self._changing, self._stop = new_lock(), threading.Event()
        self._heart: threading.Thread | None = None
        self.holders: set[Hashable] = set()
        self.is_cleared = False

    def take(self) -> None:
        """Take the lock, unless this lease has it; after an interrupt, call it again.

        If another process seems to have the lock, watch it for `WATCH_SECS` at most.

        Raises:
            CheckpointLockedError: If another process has it.
            CheckpointError: If the store cannot be reached.
        """
        if self._generation is None:
            self._generation = self._take()
        if self._heart is None:
            heart = threading.Thread(
                target=self._beat, name="flaxckpt-lease", daemon=True
            )
            heart.start()
            self._heart = heart

    def check(self) -> None:
        """Check that this process has had the lock ever since it took it.

        Raises:
            CheckpointLockedError: If this process gave no heartbeat for so long that
                another one has taken the lock.
            CheckpointError: If the store cannot be reached.
        """
        with self._changing:
            if not self._is_lost:
                self._give_sign()
        if self._is_lost:
            self._raise_locked(self._objects.read(self._key))

    @property
    def is_good(self) -> bool:
        """Whether this process has the lock, as far as it knows."""
        gone = self._is_lost or self._is_over
        return self._process == os.getpid() and not gone

    def end(self) -> None:
        """Give the lock back."""
        self._stop.set()
        with self._changing:
            if self.is_good:
                if self._generation is None:  # an interrupt came in `take`
                    found = self._objects.read(self._key)
                    if _fields(found).get("id") == self._id:
                        self._generation = found.generation
                if self._generation is not None:
                    self._objects.write_if_unchanged(self._key, None, self._generation)
                self._is_over = True
        with _guard:
            if _held.get(self._url) is self:
                del _held[self._url]

    def end_soon(self) -> None:
        """Make the heartbeat's thread give the lock back."""
        self._stop.set()

    def _take(self) -> bytes:
        for _ in range(_TRIES):
            found = self._objects.read(self._key)
            if found.content is not None and _fields(found).get("id") != self._id:
                self._watch(found)
            taken = self._sign(found.generation)
            if taken is not None:
                return taken
        raise CheckpointError(
            f"{self._objects.url} cannot be written to. Is there a bucket of that name?"
        )

    def _watch(self, found: Object) -> None:
        """Wait for a heartbeat of the lock's owner, and raise an error if it comes."""
        until = time.monotonic() + WATCH_SECS
        while time.monotonic() < until:
            time.sleep(HEARTBEAT_SECS / 5)
            now = self._objects.read(self._key)
            if now.content is None:
                return
            if now.content != found.content:
                self._raise_locked(now)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECS):
            with self._changing:
                if self._is_lost:
                    return
                if self._stop.is_set():
                    break
                with contextlib.suppress(CheckpointError):  # `check` will report it
                    self._give_sign()
        with contextlib.suppress(CheckpointError):
            self.end()

    def _give_sign(self) -> None:
        now = self._sign(self._generation or b"")
        self._is_lost = now is None
        self._generation = now or b""

    def _sign(self, generation: bytes) -> bytes | None:
        """Write a heartbeat; return its generation, None if the lock is another's."""
        self._beats += 1
        who = {"host": socket.gethostname(), "pid": os.getpid(), "id": self._id}
        content = json.dumps({**who, "beats": self._beats}).encode()
        for _ in range(2):
            written = self._objects.write_if_unchanged(self._key, content, generation)
            if written is not None:
                return written
            found = self._objects.read(self._key)
            if _fields(found).get("id") != self._id:
                return None
            generation = found.generation  # of a heartbeat whose answer was lost
        return None

    def _raise_locked(self, found: Object) -> None:
        owner = parse_owner(found.content or b"")
        raise CheckpointLockedError(self._objects.url, *owner)


_held: dict[str, Lease] = {}
_guard = new_lock()


class StoreLock:
    """The lock of a series in an object store, as one object takes it.

    Attributes:
        lease: What was taken; None if it was given back, or never taken.
    """

    def __init__(self, objects: Objects) -> None:
        """Take nothing yet.

        Args:
            objects: The objects below the series' root.
        """
        self._objects = objects
        self.lease: Lease | None = None

    def acquire(self, path: Path) -> bool:
        """Take the lock, or share it if this process has it already.

        After an interrupt the lock may be taken or not; repeat the call.

        Returns:
            Whether to clear up what an earlier writer has left: True until
            `note_cleared` is called.

        Raises:
            CheckpointError: As `Lease.take` does.
        """
        url = _url(self._objects, path.name)
        with _guard:
            lease = _held.get(url)
            if lease is None or not lease.is_good or not lease.holders:
                lease = _held[url] = Lease(self._objects, path.name)
            lease.holders.add(self)
        lease.take()
        self.lease = lease
        return not lease.is_cleared

    def is_held(self, path: Path, at: str) -> bool:
        """Return True: the lease is checked at each change of the store."""
        del path, at
        return True

    def note_cleared(self, path: Path) -> None:
        """Note that the leftovers are cleared up."""
        del path
        assert self.lease is not None
        self.lease.is_cleared = True

    def release(self, path: Path) -> None:
        """Give the lock back; the last holder in this process also deletes the object.

        Nothing happens if this object does not have the lock.
        """
        self.lease = None
        self._leave(path, Lease.end)

    def drop(self, path: Path) -> None:
        """Give the lock back after its owner is collected, and wait for nothing."""
        self._leave(path, Lease.end_soon)

    def _leave(self, path: Path, end: Callable[[Lease], None]) -> None:
        lease = _held.get(_url(self._objects, path.name))
        if lease is not None:
            lease.holders.discard(self)
            if not lease.holders:
                end(lease)


def _url(objects: Objects, key: str) -> str:
    return f"{objects.url}/{key}"


@atexit.register
def _release_all() -> None:
    """Give all locks back at exit, so that no other process has to wait for them."""
    for lease in list(_held.values()):
        with contextlib.suppress(CheckpointError):
            lease.end()


# A forked process lets go of the locks of its parent.
os.register_at_fork(after_in_child=_held.clear)


def _fields(found: Object) -> dict[str, Any]:
    try:
        fields = parse_json(found.content or b"{}")
    except MalformedError:
        return {}
    return fields if isinstance(fields, dict) else {}
