"""Access an object store: Google Cloud Storage, Amazon S3, or a store like S3.

A store has no directories and no renames. Each object is replaced whole, and every
later read gets the new one. TensorStore, which Orbax depends on, makes the requests
(https://google.github.io/tensorstore/kvstore).
"""

import os
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import tensorstore

from flaxckpt._object_store.url import split_url
from flaxckpt._runtime.forks import use_threads
from flaxckpt.errors import CheckpointError

_AT_A_TIME_BYTES = 256 * 2**20
_RETRIES = {"max_retries": 8, "initial_delay": "1s", "max_delay": "32s"}
_S3_BYTES = 5 * 2**30  # the most that one request takes


class Object(NamedTuple):
    """What an object store has under one key.

    Attributes:
        content: Its bytes; None if there is no object.
        generation: Identifies this version of the object, or that there is none.
    """

    content: bytes | None
    generation: bytes


class Objects:
    """The objects below one URL; a key is what follows the URL and a slash."""

    def __init__(self, url: str) -> None:
        """Open the store, without a request.

        Args:
            url: `gs://bucket/path` or `s3://bucket/path`. For another S3 server than
                Amazon's, set `AWS_ENDPOINT_URL` in the environment.

        Raises:
            CheckpointError: If this process was forked; see `use_threads`.
        """
        use_threads()
        self.url = url.rstrip("/")
        scheme, bucket, path = split_url(self.url)
        spec: dict[str, Any] = {"driver": "gcs" if scheme == "gs" else scheme}
        spec |= {"bucket": bucket, "path": f"{path}/" if path else ""}
        spec["context"] = {f"{spec['driver']}_request_retries": _RETRIES}
        self._limit_bytes = None
        if scheme == "s3":
            self._limit_bytes = _S3_BYTES
            spec |= _of_environment(
                endpoint=("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
                aws_region=("AWS_REGION", "AWS_DEFAULT_REGION"),
            )
        with self._translated():
            self._store = tensorstore.KvStore.open(spec).result()

    def read(self, key: str) -> Object:
        """Read an object."""
        with self._translated():
            found = self._store.read(key).result()
        content = bytes(found.value) if found.state == "value" else None
        return Object(content, found.stamp.generation)

    def read_all(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Read objects, all at a time; leave out missing ones."""
        with self._translated():
            reads = [self._store.read(key) for key in keys]
            found = [read.result() for read in reads]
        pairs = zip(keys, found, strict=True)
        return {key: bytes(each.value) for key, each in pairs if each.state == "value"}

    def write(self, key: str, content: bytes) -> None:
        """Write an object, over the one that is there."""
        with self._translated():
            self._store.write(key, content).result()

    def write_if_unchanged(
        self, key: str, content: bytes | None, generation: bytes
    ) -> bytes | None:
        """Write an object, unless another process has written it meanwhile.

        Args:
            key: Its key.
            content: Its bytes; None to delete it.
            generation: What `read` returned for the key, also if there was no object.

        Returns:
            The new generation; None if the object has another generation by now.
        """
        with self._translated():
            done = self._store.write(key, content, if_equal=generation).result()
        return done.generation or None

    def delete(self, key: str) -> None:
        """Delete an object."""
        with self._translated():
            self._store.write(key, None).result()

    def delete_below(self, directory: str) -> None:
        """Delete all objects in a directory."""
        keys = self.keys_below(directory)
        with self._translated():
            for done in [self._store.write(key, None) for key in keys]:
                done.result()

    def keys_below(self, directory: str) -> list[str]:
        """List the keys in a directory; `""` for all."""
        with self._translated():
            keys = [
                key.decode() for key in self._store.list(_range(directory)).result()
            ]
        # Not every server like S3 supports ranges.
        prefix = f"{directory}/" if directory else ""
        return sorted(key for key in keys if key.startswith(prefix))

    def upload(self, source: Path, directory: str) -> None:
        """Upload all files of a directory on the disk, and wait until they are stored.

        Args:
            source: The directory on the disk.
            directory: The directory in the store.

        Raises:
            CheckpointError: If a file is too large; nothing is uploaded then.
        """
        files = [path for path in sorted(source.rglob("*")) if path.is_file()]
        for path in files:
            size = path.stat().st_size
            if self._limit_bytes is not None and size > self._limit_bytes:
                raise CheckpointError(
                    f"{path.name} of {self.url}/{directory} has {size / 1e9:.1f} GB, "
                    f"and S3 takes {self._limit_bytes / 1e9:.1f} in one request. Shard "
                    "its array over more devices."
                )
        writes, size = deque[tuple[Any, int]](), 0
        with self._translated():
            for path in files:
                content = path.read_bytes()
                while writes and size + len(content) > _AT_A_TIME_BYTES:
                    write, done = writes.popleft()
                    write.result()
                    size -= done
                key = f"{directory}/{path.relative_to(source).as_posix()}"
                writes.append((self._store.write(key, content), len(content)))
                size += len(content)
            for write, _ in writes:
                write.result()

    def copy(self, source: str, directory: str) -> None:
        """Copy all objects of a directory into another one.

        Raises:
            FileNotFoundError: If there are none, or if one is deleted meanwhile.
        """
        keys = self.keys_below(source)
        if not keys:
            raise FileNotFoundError(source)
        for key in keys:
            content = self.read(key).content
            if content is None:
                raise FileNotFoundError(key)
            self.write(f"{directory}/{key.removeprefix(f'{source}/')}", content)

    def download(self, directory: str, target: Path) -> None:
        """Download all objects of a directory into a directory on the disk."""
        for key in self.keys_below(directory):
            content = self.read(key).content
            if content is not None:  # None: deleted meanwhile
                path = target / key.removeprefix(f"{directory}/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)

    @contextmanager
    def _translated(self) -> Generator[None]:
        try:
            yield
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise CheckpointError(f"{self.url}: {error}") from error


def _of_environment(**names: Sequence[str]) -> Mapping[str, str]:
    """Return for each name the first of its variables that is set, if any."""
    found = {
        key: next(filter(None, map(os.environ.get, each)), "")
        for key, each in names.items()
    }
    return {key: value for key, value in found.items() if value}


def _range(directory: str) -> tensorstore.KvStore.KeyRange:
    if not directory:
        return tensorstore.KvStore.KeyRange()
    # All keys that begin with `directory/`: "0" is the character after "/".
    return tensorstore.KvStore.KeyRange(f"{directory}/", f"{directory}0")
