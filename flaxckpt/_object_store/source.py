"""A checkpoint in a store, of which a reader fetches what it needs."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from flaxckpt._disk.record import LEAVES_FILE, RECORD_FILE
from flaxckpt._object_store.objects import Objects
from flaxckpt._object_store.pointer import CURRENT, Pointer
from flaxckpt._object_store.scratch import scratch
from flaxckpt._object_store.url import split_url
from flaxckpt.errors import CheckpointCorruptError, CheckpointNotFoundError

_ORBAX_FILE = "_CHECKPOINT_METADATA"


class Source:
    """A checkpoint in a store, of which as much is on the disk as was needed.

    Attributes:
        url: Its URL.
        directory: Where that is on the disk.
    """

    def __init__(self, url: str, scratch: Path) -> None:
        """Look the checkpoint up.

        Args:
            url: Of a checkpoint: of flaxckpt's, or of plain Orbax's.
            scratch: A directory in which nothing is.

        Raises:
            CheckpointNotFoundError: If there is none.
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
        """Get what tells what is in it.

        Raises:
            CheckpointCorruptError: If that is missing.
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
        """Have all of it on the disk."""
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
    """Have a checkpoint at hand for as long as it is read; see `Source`."""
    with scratch() as directory:
        source = Source(url, directory)
        try:
            _SOURCES[source.directory] = source
            yield source
        finally:
            _SOURCES.pop(source.directory, None)


def source_of(path: Path) -> Source | None:
    """Return what is being read of at a path; None for what is on the disk anyway."""
    return _SOURCES.get(path)


_SOURCES: dict[Path, Source] = {}


def _found(bucket: Objects, path: str) -> str:
    """Return the directory that the files of the checkpoint at a path are in.

    That of plain Orbax's is the path itself.
    """
    parts = path.split("/")
    pointers = [
        "/".join([*parts[:depth], CURRENT, *parts[depth:]])
        for depth in reversed(range(len(parts)))
    ]
    for key, content in bucket.read_all(pointers).items():
        at = Pointer.parse(content).at
        if not at:
            raise CheckpointCorruptError(
                f"{bucket.url}/{path}", "what points to its files does not parse"
            )
        return key[: key.index(CURRENT)] + at
    if bucket.read(f"{path}/{_ORBAX_FILE}").content is not None:
        return path
    beside = "/".join([*parts[:-1], CURRENT])
    names = [key.rpartition("/")[2] for key in bucket.keys_below(beside)]
    raise CheckpointNotFoundError(f"{bucket.url}/{path}", tuple(names))
