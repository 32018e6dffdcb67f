"""Download the files of a checkpoint in a store that a reader needs."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flaxckpt._disk.record import LEAVES_FILE, ORBAX_FILE, RECORD_FILE
from flaxckpt._object_store.objects import Objects
from flaxckpt._object_store.pointer import CURRENT, Pointer
from flaxckpt._object_store.scratch import scratch
from flaxckpt._object_store.url import split_url
from flaxckpt.errors import CheckpointCorruptError, CheckpointNotFoundError


class Source:
    """A checkpoint in a store; the files that a reader needed are on the disk.

    Attributes:
        url: Its URL.
        directory: The directory of those files.
    """

    def __init__(self, url: str, scratch: Path) -> None:
        """Look the checkpoint up.

        Args:
            url: URL of a checkpoint of flaxckpt or of plain Orbax.
            scratch: An empty directory.

        Raises:
            CheckpointNotFoundError: If there is no checkpoint.
            CheckpointCorruptError: If its pointer is damaged.
            CheckpointError: If the store cannot be reached.
        """
        self.url = url.rstrip("/")
        scheme, bucket, self._path = split_url(url)
        self._bucket = Objects(f"{scheme}://{bucket}")
        self._at = _found(self._bucket, self._path)
        self.directory = scratch / Path(self._path).name
        self.directory.mkdir()
        self._is_complete = False

    def begin(self) -> None:
        """Download the record and the table of leaves, or all of plain Orbax's files.

        Raises:
            CheckpointCorruptError: If the record or the table is missing.
        """
        is_plain = self._at == self._path
        for name in (RECORD_FILE, LEAVES_FILE):
            content = self.read(name)
            if content is not None:
                (self.directory / name).write_bytes(content)
            elif not is_plain:
                raise CheckpointCorruptError(self.url, f"{name} is missing")
        if is_plain:
            self.complete()

    def read(self, key: str) -> bytes | None:
        """Read one of its files; None if it is not there."""
        return self._bucket.read(f"{self._at}/{key}").content

    def complete(self) -> None:
        """Download all files, unless that is done."""
        if not self._is_complete:
            self._bucket.download(self._at, self.directory)
        self._is_complete = True

    def is_replaced(self) -> bool:
        """Tell whether another checkpoint is at the URL by now, or none."""
        try:
            return _found(self._bucket, self._path) != self._at
        except CheckpointNotFoundError:
            return True


@contextmanager
def fetched(url: str) -> Generator[Source]:
    """Yield a checkpoint to read; its files on the disk go at the end of the block."""
    with scratch() as directory:
        yield Source(url, directory)


@dataclass(frozen=True)
class Place:
    """Where a reader finds a checkpoint.

    Attributes:
        path: Its directory. For a checkpoint in a store, the directory of the files
            that are on the disk by now.
        source: Downloads the other files; None for a checkpoint on a disk.
    """

    path: Path
    source: Source | None = None

    def complete(self) -> None:
        """Download all files of a checkpoint in a store."""
        if self.source is not None:
            self.source.complete()


def pointer_to(bucket: Objects, path: str) -> tuple[str, Pointer] | None:
    """Return the root of the series of the checkpoint at `path`, and its pointer.

    The root is empty or ends with a slash. None if nothing points to the path.
    """
    parts = path.split("/")
    keys = [
        "/".join([*parts[:depth], CURRENT, *parts[depth:]])
        for depth in reversed(range(len(parts)))
    ]
    for key, content in bucket.read_all(keys).items():
        return key[: key.index(CURRENT)], Pointer.parse(content)
    return None


def _found(bucket: Objects, path: str) -> str:
    """Return the directory of the files of the checkpoint at `path`.

    For a checkpoint of plain Orbax, that is `path` itself.
    """
    pointed = pointer_to(bucket, path)
    if pointed is not None:
        root, pointer = pointed
        if not pointer.at:
            raise CheckpointCorruptError(
                f"{bucket.url}/{path}", "what points to its files does not parse"
            )
        return root + pointer.at
    if bucket.read(f"{path}/{ORBAX_FILE}").content is not None:
        return path
    beside = "/".join([*path.split("/")[:-1], CURRENT])
    names = [key.rpartition("/")[2] for key in bucket.keys_below(beside)]
    raise CheckpointNotFoundError(f"{bucket.url}/{path}", tuple(names))
