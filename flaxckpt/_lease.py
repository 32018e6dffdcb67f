"""One writing process for a series of checkpoints at a time, in an object store.

The lock is an object that its owner writes again every few seconds. Each time it is
written only over what was found there, so of several that want it one gets it. Who
finds it taken watches it for longer than that: if it does not change, its owner has
died. Only changes are watched, no clocks compared.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from flaxckpt._objects import Object, Objects
from flaxckpt.errors import CheckpointError, CheckpointLockedError

HEARTBEAT_SECS = 5.0
WATCH_SECS = 3 * HEARTBEAT_SECS
_TRIES = 5


@dataclass
class _Held:
    name: str
    generation: bytes
    owner: int = field(default_factory=os.getpid)
    count: int = 1
    beats: int = 0
    is_lost: bool = False
    stop: threading.Event = field(default_factory=threading.Event)


_held: dict[str, _Held] = {}
_guard = threading.Lock()


def acquire(objects: Objects, key: str) -> bool:
    """Take the lock, or share it if this process has it already.

    Where it seems to be taken, waits until that is known.

    Args:
        objects: Where.
        key: The lock's key.

    Returns:
        Whether it was not held before: then what is left of a writer before is stale.

    Raises:
        CheckpointLockedError: If another process has it.
        CheckpointError: If the store cannot be reached.
    """
    url = f"{objects.url}/{key}"
    with _guard:
        held = _held.get(url)
        if held is not None and held.owner == os.getpid() and not held.is_lost:
            held.count += 1
            return False
        name = uuid.uuid4().hex
        held = _held[url] = _Held(name, _take(objects, key, name))
    beat = threading.Thread(
        target=_beat, args=(objects, key, held), name="flaxckpt-lease", daemon=True
    )
    beat.start()
    return True


def check(objects: Objects, key: str) -> None:
    """Check that the lock is this process's now, and has been since it was taken.

    Raises:
        CheckpointLockedError: If this process gave no sign for so long that another one
            has taken it.
        CheckpointError: If the store cannot be reached.
    """
    with _guard:
        held = _held.get(f"{objects.url}/{key}")
        if held is not None and not held.is_lost:
            _give_sign(objects, key, held)
    if held is None or held.is_lost:
        raise CheckpointLockedError(objects.url, *_owner(objects.read(key)))


def release(objects: Objects, key: str) -> None:
    """Give the lock back; it goes when the last holder in this process did."""
    url = f"{objects.url}/{key}"
    with _guard:
        held = _held[url]
        held.count -= 1
        if held.count:
            return
        del _held[url]
        held.stop.set()
        if not held.is_lost:
            objects.write_over(key, None, held.generation)


def _take(objects: Objects, key: str, name: str) -> bytes:
    for _ in range(_TRIES):
        found = objects.read(key)
        if found.content is not None:
            _watch(objects, key, found)
        taken = _sign(objects, key, name, 0, found.generation)
        if taken is not None:
            return taken
    raise CheckpointError(
        f"{objects.url} cannot be written to. Is there a bucket of that name?"
    )


def _watch(objects: Objects, key: str, found: Object) -> None:
    """Wait for a sign of life of the lock's owner."""
    until = time.monotonic() + WATCH_SECS
    while time.monotonic() < until:
        time.sleep(HEARTBEAT_SECS / 5)
        now = objects.read(key)
        if now.content is None:
            return
        if now.content != found.content:
            raise CheckpointLockedError(objects.url, *_owner(now))


def _beat(objects: Objects, key: str, held: _Held) -> None:
    while not held.stop.wait(HEARTBEAT_SECS):
        with _guard:
            if held.stop.is_set() or held.is_lost:
                return
            with contextlib.suppress(CheckpointError):  # out of reach: saves will tell
                _give_sign(objects, key, held)


def _give_sign(objects: Objects, key: str, held: _Held) -> None:
    held.beats += 1
    now = _sign(objects, key, held.name, held.beats, held.generation)
    held.is_lost = now is None
    held.generation = now or b""


def _sign(
    objects: Objects, key: str, name: str, beats: int, generation: bytes
) -> bytes | None:
    """Write who has the lock; return its generation, None if somebody else has it."""
    fields = {"host": socket.gethostname(), "pid": os.getpid(), "id": name}
    content = json.dumps({**fields, "beats": beats}).encode()
    for _ in range(2):
        written = objects.write_over(key, content, generation)
        if written is not None:
            return written
        found = objects.read(key)
        if _fields(found).get("id") != name:
            return None
        generation = found.generation  # it was written, and the answer got lost
    return None


def _owner(found: Object) -> tuple[str, int]:
    fields = _fields(found)
    return str(fields.get("host", "")), int(fields.get("pid", 0))


def _fields(found: Object) -> dict[str, Any]:
    try:
        return dict(json.loads(found.content or b"{}"))
    except (ValueError, TypeError):
        return {}
