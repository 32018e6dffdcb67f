"""Read and write pointers, the objects that name the place of a checkpoint's files."""

import dataclasses
import json
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from flaxckpt._disk.open import is_inside
from flaxckpt._disk.record import HIDDEN_PREFIX, RECORD_FILE
from flaxckpt._object_store.objects import Objects
from flaxckpt._runtime.patience import BusyError, tries

CURRENT = f"{HIDDEN_PREFIX}current"


@dataclasses.dataclass(frozen=True)
class Pointer:
    """Where a checkpoint's files are.

    Attributes:
        at: The directory of the files, below the series' root; "" if the pointer is
            damaged.
        record: The checkpoint's record; the pointer's content if it is damaged.
    """

    at: str
    record: str

    def encoded(self) -> bytes:
        """Return it as JSON with a new id, so that no two results are equal."""
        return json.dumps({**vars(self), "id": uuid.uuid4().hex}).encode()

    @classmethod
    def parse(cls, content: bytes) -> "Pointer":
        """Parse what `encoded` has returned; `at` is "" if it is damaged."""
        try:
            fields = json.loads(content)
            at, record = str(fields["at"]), str(fields["record"])
            if is_inside(at):  # else files of others would be deleted with it
                return cls(at, record)
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        return cls("", content.decode(errors="replace"))


def key_of(name: str) -> str:
    return f"{CURRENT}/{name}"


def read_pointers(objects: Objects, keys: Sequence[str] | None) -> dict[str, Pointer]:
    """Read pointers, by the checkpoints' names; all pointers if `keys` is None."""
    if keys is None:
        found = read_listed(objects, lambda: objects.keys_below(CURRENT))
    else:
        found = objects.read_all(keys)
    return {
        key.removeprefix(f"{CURRENT}/"): Pointer.parse(content)
        for key, content in found.items()
    }


def read_listed(
    objects: Objects, listed: Callable[[], Sequence[str]]
) -> dict[str, bytes]:
    """Read all objects that a listing names; if one is missing, list again.

    A writer that has deleted an object may have written another one since the listing.

    Raises:
        BusyError: If an object is missing again and again.
    """
    for _ in tries():
        keys = listed()
        found = objects.read_all(keys)
        if len(found) == len(keys):
            return found
    raise BusyError.of(objects.url)


def write_record(directory: Path, pointer: Pointer) -> None:
    """Write a checkpoint's record to its directory in a mirror, unless it is there."""
    path, content = directory / RECORD_FILE, pointer.record.encode()
    if path.exists() and path.read_bytes() == content:
        return
    directory.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{RECORD_FILE}.{uuid.uuid4().hex}")
    new.write_bytes(content)
    new.replace(path)
