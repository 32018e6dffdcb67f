"""One writing process for a series of checkpoints at a time, in an object store.

The lock is an object that its owner writes again every few seconds. Each time it is
written only over what was found there, so of several that want it one gets it. Who
finds it taken watches it for longer than that: if it does not change, its owner has
died. Only changes are watched, no clocks compared.
"""

import atexit
import contextlib
import json
import os
import socket
import threading
import time
import uuid
from typing import Any

from flaxckpt._objects import Object, Objects
from flaxckpt._parsing import parse_owner
from flaxckpt.errors import CheckpointError, CheckpointLockedError

HEARTBEAT_SECS = 5.0
WATCH_SECS = 3 * HEARTBEAT_SECS
_TRIES = 5


class Lease:
    """A lock that this process has taken, shared by all that write the series here."""

    def __init__(self, objects: Objects, key: str) -> None:
        """Take the lock.

        Where it seems to be taken, waits until that is known.

        Args:
            objects: Where.
            key: The lock's key.

        Raises:
            CheckpointLockedError: If another process has it.
            CheckpointError: If the store cannot be reached.
        """
        self._objects, self._key = objects, key
        self._id, self._beats = uuid.uuid4().hex, 0
        self._generation = self._take()
        self.owner, self.count, self._is_lost = os.getpid(), 1, False
        self._changing, self._stop = threading.Lock(), threading.Event()
        beat = threading.Thread(target=self._beat, name="flaxckpt-lease", daemon=True)
        beat.start()

    def check(self) -> None:
        """Check that the lock is this process's now, and has been since it was taken.

        Raises:
            CheckpointLockedError: If this process gave no sign for so long that another
                one has taken it.
            CheckpointError: If the store cannot be reached.
        """
        with self._changing:
            if not self._is_lost:
                self._give_sign()
        if self._is_lost:
            self._raise_locked(self._objects.read(self._key))

    @property
    def is_good(self) -> bool:
        """Whether it is this process's, as far as is known."""
        return self.owner == os.getpid() and not self._is_lost

    def end(self) -> None:
        """Give the lock back."""
        self._stop.set()
        with self._changing:
            if self.is_good:
                self._objects.write_over(self._key, None, self._generation)

    def _take(self) -> bytes:
        for _ in range(_TRIES):
            found = self._objects.read(self._key)
            if found.content is not None:
                self._watch(found)
            taken = self._sign(found.generation)
            if taken is not None:
                return taken
        raise CheckpointError(
            f"{self._objects.url} cannot be written to. Is there a bucket of that name?"
        )

    def _watch(self, found: Object) -> None:
        """Wait for a sign of life of the lock's owner."""
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
                if self._stop.is_set() or self._is_lost:
                    return
                with contextlib.suppress(CheckpointError):  # what is saved will tell
                    self._give_sign()

    def _give_sign(self) -> None:
        now = self._sign(self._generation)
        self._is_lost = now is None
        self._generation = now or b""

    def _sign(self, generation: bytes) -> bytes | None:
        """Write whose the lock is; return its generation, None if it is another's."""
        self._beats += 1
        who = {"host": socket.gethostname(), "pid": os.getpid(), "id": self._id}
        content = json.dumps({**who, "beats": self._beats}).encode()
        for _ in range(2):
            written = self._objects.write_over(self._key, content, generation)
            if written is not None:
                return written
            found = self._objects.read(self._key)
            if _fields(found).get("id") != self._id:
                return None
            generation = found.generation  # of a sign whose answer has got lost
        return None

    def _raise_locked(self, found: Object) -> None:
        owner = parse_owner(found.content or b"")
        raise CheckpointLockedError(self._objects.url, *owner)


_held: dict[str, Lease] = {}
_guard = threading.Lock()


def acquire(objects: Objects, key: str) -> tuple[Lease, bool]:
    """Take a lock, or share it if this process has it already.

    Returns:
        The lock, and whether it was not held before: then what is left of a writer
        before is stale.

    Raises:
        CheckpointError: As `Lease`.
    """
    url = f"{objects.url}/{key}"
    with _guard:
        held = _held.get(url)
        if held is not None and held.is_good:
            held.count += 1
            return held, False
    lease = Lease(objects, key)
    with _guard:
        _held[url] = lease
    return lease, True


def release(lease: Lease) -> None:
    """Give a lock back; it goes when the last holder in this process did."""
    with _guard:
        lease.count -= 1
        if lease.count:
            return
        for url in [url for url, held in _held.items() if held is lease]:
            del _held[url]
    lease.end()


def _release_all() -> None:
    """Keep nobody waiting for what a program that ends has not closed."""
    for lease in list(_held.values()):
        with contextlib.suppress(CheckpointError):
            lease.end()


atexit.register(_release_all)


def _fields(found: Object) -> dict[str, Any]:
    try:
        return dict(json.loads(found.content or b"{}"))
    except (ValueError, TypeError, RecursionError):
        return {}
