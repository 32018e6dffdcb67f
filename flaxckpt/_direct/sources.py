"""Where stored values are read from: files, an OCDBT database, or an object store."""

import contextlib
import functools
import math
import os
import stat
import weakref
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorstore
import xxhash

from flaxckpt._direct.zarr import (
    DESCRIPTION,
    MANIFEST,
    STATE,
    Array,
    OtherwiseError,
    ZarrArray,
    below,
    parsed,
    raw_bytes,
    trailer_of,
)
from flaxckpt._disk.alias import aliased
from flaxckpt._disk.open import (
    NoFileError,
    is_inside,
    open_file,
    plain_files,
    read_small,
    unreadable,
)
from flaxckpt._disk.vetting import check_readable
from flaxckpt._disk.zarr_json import parse_zarr
from flaxckpt._object_store.source import Source
from flaxckpt._trees.digest import checksum
from flaxckpt._trees.leaf import Leaf, key_numbers

_INDEX_BYTES = 64 * 2**20  # of a database's index that TensorStore keeps in memory
_AHEAD_BYTES = 2**30  # of descriptions, and of chunks, that a thread reads ahead
_ALL_BYTES = 64 * 2**20  # of a database that is read at once
_MANIFEST_BYTES = 64 * 2**20
HEAD = 64  # bytes at the beginning of a file that `ends` returns
_ROOM_BYTES = 64 * 2**20  # a larger array gets memory only if its files are as large
BLOCK_BYTES = 512 * 2**10  # read or written at a time, and summed in the CPU cache
_MEAN_BYTES = BLOCK_BYTES // 2  # of a value; of larger ones `ends` reads the ends only


def stored_of(store: "Store", leaf: Leaf) -> ZarrArray | None:
    """Look up how a leaf is stored; None if the shape differs from the leaf's.

    Raises:
        OtherwiseError: If it is missing, or `parsed` does not know how it is stored.
        MalformedError: If its `zarr.json` is none.
    """
    name = leaf.stored_name
    shape, dtype = array_of(leaf)
    stored = parsed(name, store.read(below(name, DESCRIPTION)), dtype)
    return stored if stored.shape == shape else None


def array_of(leaf: Leaf) -> tuple[tuple[int, ...], str]:
    """Return the shape and the dtype of the array in which a leaf is stored."""
    numbers = key_numbers(leaf.impl) if leaf.kind == "key" else ()
    return leaf.shape + numbers, leaf.stored_dtype


def first_chunk(leaf: Leaf) -> str:
    """Return the key of the first chunk of a leaf, as Orbax usually names it."""
    return below(leaf.stored_name, "c" + "/0" * len(array_of(leaf)[0]))


def outlined(store: "Store", leaf: Leaf) -> tuple[ZarrArray, int | None]:
    """Look up how a leaf is stored, in any encoding, and the bytes of a chunk's file.

    The size is None if it depends on the values.

    Raises:
        OtherwiseError: If shape or dtype differ from the leaf's, or it is missing.
        MalformedError: If its `zarr.json` is none.
    """
    with contextlib.suppress(OtherwiseError):
        stored = stored_of(store, leaf)
        if stored is not None:
            nbytes = math.prod(stored.chunk) * stored.dtype.itemsize
            return stored, nbytes + len(trailer_of(nbytes))
    name = leaf.stored_name
    description = store.read(below(name, DESCRIPTION))
    found = parse_zarr(description)
    if (found.shape, found.dtype) != array_of(leaf):
        raise OtherwiseError
    dtype = jnp.dtype(found.dtype)
    stored = ZarrArray(
        name, description, dtype, found.shape, found.chunk, found.separator
    )
    return stored, None


class Store:
    """Where a checkpoint's arrays are read from."""

    @property
    def most_at_once(self) -> int:
        """Of how many leaves values may be read ahead; 0 for none."""
        return 0

    def read(self, key: str) -> bytes:
        """Read a file, or a database's value of that key."""
        raise NotImplementedError

    def has(self, key: str, nbytes: int | None) -> bool:
        """Tell whether a file is there, with `nbytes` bytes if its size is known.

        If it is not, this may raise one of `UNREADABLE` instead.
        """
        raise NotImplementedError

    def read_into(self, key: str, values: Array, *, check: bool) -> list[str]:
        """Read a chunk into `values`; return its checksum if `check`, else nothing."""
        found, trailer = self.read(key), trailer_of(values.nbytes)
        if len(found) != values.nbytes + len(trailer) or not found.endswith(trailer):
            raise OtherwiseError
        raw_bytes(values)[:] = np.frombuffer(found, np.uint8, values.nbytes)
        return [checksum(values)] if check else []

    def ends(self, key: str, nbytes: int) -> tuple[bytes, bytes]:
        """Return a file's first `HEAD` bytes, and all bytes from `nbytes` on."""
        found = self.read(key)
        return found[:HEAD], found[nbytes:]

    def check_room(self, name: str, nbytes: int) -> None:
        """Check that an array can have `nbytes`, before it gets memory.

        Raises:
            OtherwiseError: If its files are smaller.
        """


class Files(Store):
    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self, key: str) -> bytes:
        try:
            return read_small(self._path(key))
        except NoFileError as error:
            raise OtherwiseError from error

    def has(self, key: str, nbytes: int | None) -> bool:
        found = self._path(key).lstat()
        is_whole = found.st_size > 0 if nbytes is None else found.st_size == nbytes
        return stat.S_ISREG(found.st_mode) and is_whole

    def read_into(self, key: str, values: Array, *, check: bool) -> list[str]:
        summed = xxhash.xxh3_64() if check else None
        trailer, left = trailer_of(values.nbytes), memoryview(raw_bytes(values).data)
        with self._opened(key) as file:
            if os.fstat(file).st_size != values.nbytes + len(trailer):
                raise OtherwiseError
            while left:
                block = left[:BLOCK_BYTES] if summed else left
                count = os.readv(file, [block])
                if not count:
                    raise OtherwiseError
                if summed:
                    summed.update(left[:count])
                left = left[count:]
            if os.read(file, len(trailer) + 1) != trailer:
                raise OtherwiseError
        return [summed.hexdigest()] if summed else []

    def ends(self, key: str, nbytes: int) -> tuple[bytes, bytes]:
        with self._opened(key) as file:
            rest = max(os.fstat(file).st_size - nbytes, 0)
            return os.pread(file, HEAD, 0), os.pread(file, rest, nbytes)

    def check_room(self, name: str, nbytes: int) -> None:
        if nbytes > _ROOM_BYTES and nbytes > _size_of(self._path(name)):
            raise OtherwiseError

    @contextlib.contextmanager
    def _opened(self, key: str) -> Generator[int]:
        path = self._path(key)
        try:
            file = open_file(path)
        except NoFileError as error:
            raise OtherwiseError from error
        try:
            yield file
        except OSError as error:
            raise unreadable(path, error) from error
        finally:
            os.close(file)

    def _path(self, key: str) -> Path:
        """Return a file's path; raise `OtherwiseError` if it leads out of here."""
        if not is_inside(key):
            raise OtherwiseError
        return self._directory / key


class Sourced(Store):
    """Files in an object store; `read_into` compares the size of what it sends."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._descriptions: dict[str, bytes] = {}  # kept, since callers read them twice

    def read(self, key: str) -> bytes:
        if key in self._descriptions:
            return self._descriptions[key]
        found = self._source.read(f"{STATE}/{key}")
        if found is None:
            raise OtherwiseError
        if key.endswith(".json"):
            self._descriptions[key] = found
        return found

    def has(self, key: str, nbytes: int | None) -> bool:
        return len(self.read(key)) == nbytes or nbytes is None


class Database(Store):
    def __init__(self, directory: Path) -> None:
        self._size = _size_of(directory)  # which raises unless all files are plain
        try:
            read_small(directory / MANIFEST, _MANIFEST_BYTES)
        except NoFileError as error:
            raise OtherwiseError from error
        with contextlib.ExitStack() as stack:
            plain = stack.enter_context(aliased(directory))
            weakref.finalize(self, stack.pop_all().close)
        base = {"driver": "file", "path": f"{plain}/"}
        # Without a cache, TensorStore reads the index anew for every key.
        context = {"cache_pool": {"total_bytes_limit": _INDEX_BYTES}}
        spec = {"driver": "ocdbt", "base": base, "context": context}
        self._directory = directory
        self._store = self._result(tensorstore.KvStore.open(spec))
        self._coming: dict[str, Any] = {}

    @property
    def most_at_once(self) -> int:
        # Each value may be as large as the database.
        return _AHEAD_BYTES // max(self._size, 1)

    def expect(self, keys: Iterable[str]) -> None:
        """Begin to read values; they stay in memory until they are forgotten."""
        self._coming |= {key: self._store.read(key) for key in keys}

    def expect_all(self) -> None:
        """Begin to read all values, unless they are many bytes, or large on average."""
        if self._size <= min(_ALL_BYTES, len(self.keys) * _MEAN_BYTES):
            self.expect(self.keys)

    def forget(self, keys: Iterable[str]) -> None:
        """Drop expected values."""
        for key in keys:
            self._coming.pop(key, None)

    @functools.cached_property
    def keys(self) -> frozenset[str]:
        """All keys."""
        return frozenset([key.decode() for key in self._result(self._store.list())])

    def has(self, key: str, nbytes: int | None) -> bool:
        del nbytes  # the index does not tell a value's size
        return key in self.keys

    def read(self, key: str) -> bytes:
        found = self._result(self._coming.get(key) or self._store.read(key))
        if found.state != "value":
            raise OtherwiseError
        return bytes(found.value)

    def ends(self, key: str, nbytes: int) -> tuple[bytes, bytes]:
        if nbytes <= BLOCK_BYTES:
            return super().ends(key, nbytes)
        ranges = slice(0, HEAD), slice(nbytes, None)
        parts = [self._store.read(key, byte_range=each) for each in ranges]
        head, rest = (bytes(self._result(part).value) for part in parts)
        return head, rest

    def check_room(self, name: str, nbytes: int) -> None:
        if nbytes > _ROOM_BYTES and nbytes > self._size:
            raise OtherwiseError

    def _result(self, future: Any) -> Any:
        """Wait for TensorStore; raise `OtherwiseError` if it fails on the files."""
        try:
            return future.result()
        except MemoryError:
            raise
        except Exception as error:
            check_readable(self._directory)
            raise OtherwiseError from error


def _size_of(directory: Path) -> int:
    try:
        return sum(entry.stat().st_size for entry in plain_files(directory))
    except (NoFileError, OSError) as error:
        raise OtherwiseError from error
