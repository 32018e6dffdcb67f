"""Checkpoints in a form that Orbax has shown: its files as it wrote them, new values.

Orbax takes a millisecond a leaf to write a tree, most of it in the interpreter, and
copies large arrays on the way. Where it has written a tree of the same structure,
shapes and shardings before, only the values differ: its own small files are written
again as they were, and the values go where it put them, in the format it chose (Zarr 3,
each chunk a shard of one part;
https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed), straight from
the memory they are in. Two arrangements are known: a directory for each array, and one
OCDBT database for all of them, which is better for many small ones.

What Orbax wrote is compared with what would have been written here before a form is
used: if they differ, because of another version of it or an option not known here,
there is no form, and Orbax goes on writing.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import stat
import struct
import time
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
import xxhash

from flaxckpt._alias import plainly
from flaxckpt._background import give_way, writing_pool, writing_threads
from flaxckpt._digest import (
    Digest,
    agrees,
    checksum,
    checksum_in,
    combined,
    digest,
    digest_of,
)
from flaxckpt._draft import Draft, stamp_of
from flaxckpt._frozen import Frozen, FrozenLeaf, Home
from flaxckpt._memory import part_of
from flaxckpt._mirror import Source
from flaxckpt._open import (
    NoFileError,
    is_inside,
    is_there,
    open_file,
    plain_files,
    read_small,
    unreadable,
)
from flaxckpt._parsing import MalformedError, parse_texts, parse_zarr
from flaxckpt._pieces import Piece, is_shared, pieces
from flaxckpt._tree import Layout, Leaf, key_numbers, without_keys
from flaxckpt._vetting import check_readable
from flaxckpt.errors import CheckpointPathError

Array: TypeAlias = np.ndarray[Any, Any]
Bounds: TypeAlias = tuple[tuple[int, int], ...]  # first and behind the last, by axis
Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]

# Of a leaf, its digest as a number, and its files' positions and checksums.
Share: TypeAlias = tuple[int, list[tuple[int, str]]]

STATE = "state"  # the directory in a checkpoint that holds the tree
_DESCRIPTION = "zarr.json"  # of an array, beside its chunks
_TIMES = "_CHECKPOINT_METADATA"
_STRINGS = f"{STATE}/_strings.json"
_DATABASE = {"compression": None, "max_inline_value_bytes": 1024}
_BATCH_BYTES = 32 * 2**20  # values of a database that are in memory at a time
_INDEX_BYTES = 64 * 2**20  # of a database's index that are kept while it is read
_MANIFEST_BYTES = 64 * 2**20
_HEAD = 64
_ROOM_BYTES = 64 * 2**20  # of an array that gets memory without a look at its files
_BLOCK_BYTES = 512 * 2**10  # that are read, and checked while they are in the cache
_READ = ("jax", "numpy", "numpy_scalar")  # kinds of leaves that have their own dtype
_ARRAYS = (*_READ, "bytes")
_NUMBERS = ("bool", "int", "float")
_DTYPES = {  # by which Orbax stores what has no dtype of its own
    "bool": "bool",
    "int": "int64",
    "float": "float64",
    "complex": "complex128",
    "key": "uint32",
}
_ALIGNMENT = 64  # of what JAX on CPU takes over as it is


@dataclass(frozen=True)
class _Stored:
    """How an array is stored: name, `zarr.json`, dtype, and the grid of its chunks."""

    name: str
    description: bytes
    dtype: Any
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    separator: str = "/"

    @property
    def is_one_chunk(self) -> bool:
        """Whether one chunk holds the whole array."""
        return self.shape == self.chunk

    @property
    def description_key(self) -> str:
        """The name of the file that describes it."""
        return _below(self.name, _DESCRIPTION)

    def with_keys(self, separator: str) -> "_Stored":
        """Return it with its chunks' files in directories (`/`) or in one (`.`)."""
        fields = json.loads(self.description)
        fields["chunk_key_encoding"] = {"name": "default"}
        if separator == ".":
            fields["chunk_key_encoding"]["configuration"] = {"separator": separator}
        description = json.dumps(fields, separators=(",", ":")).encode()
        return replace(self, description=description, separator=separator)

    def keys(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the name of each chunk's file, and where in the array it begins."""
        grid = [range(0, size, part) for size, part in zip(self.shape, self.chunk)]  # noqa: B905
        for start in itertools.product(*grid):
            number = [str(at // part) for at, part in zip(start, self.chunk)]  # noqa: B905
            yield _below(self.name, self.separator.join(["c", *number])), start


@dataclass(frozen=True)
class Form:
    """What is the same in all checkpoints of one structure, with the same shardings.

    Attributes:
        is_database: Whether the arrays are in an OCDBT database.
        files: Orbax's own files, by path.
        arrays: How each leaf's values are stored, or for text, which has a file, its
            name.
    """

    is_database: bool
    files: Mapping[str, bytes]
    arrays: Sequence[_Stored | str]

    def write(
        self,
        draft: Draft,
        directory: Path,
        values: Sequence[Any],
        frozen: Frozen | None = None,
    ) -> tuple[list[str], list[Sequence[str]]]:
        """Write a checkpoint of this form.

        Args:
            draft: Where to.
            directory: Its directory.
            values: The leaves that Orbax holds; those that are frozen as `FrozenLeaf`,
                which a database takes none of.
            frozen: Where frozen leaves are stored.

        Returns:
            The leaves' digests, and the checksums of each leaf's files; none in a
            database, which is not on disk yet.
        """
        self._write_around(draft, values)
        if self.is_database:
            return self._write_database(directory / STATE, values), []
        return self._write_files(draft, values, frozen)

    def begin(self, draft: Draft, values: Sequence[Any]) -> None:
        """Write all but the arrays' values, which several processes write.

        Args:
            draft: Where to.
            values: The leaves that Orbax holds.
        """
        self._write_around(draft, values)
        for stored in self.arrays:
            if isinstance(stored, _Stored):
                draft.write(f"{STATE}/{stored.description_key}", [stored.description])

    def write_share(
        self, draft: Draft, values: Sequence[Any], *, leads: bool
    ) -> list[Share]:
        """Write what is this process's of a checkpoint that several write.

        That is, of each shard the first replica, and, in one of the processes, what is
        in each of them.

        Args:
            draft: Where to.
            values: The leaves that Orbax holds.
            leads: Whether this is that process.

        Returns:
            For each leaf the digest of what was written, as a number, and the checksum
            of each file, with the file's position among the leaf's.
        """

        def write(stored: _Stored | str, value: Any) -> Share:
            if isinstance(stored, str):
                return (combined(pieces(value)) if leads else 0), []
            digested = None if stored.is_one_chunk else Digest()
            sums = [
                (position, _write_file(draft, key, start, chunk, digested))
                for position, (key, start, chunk) in enumerate(
                    _own_chunks(stored, value, leads=leads)
                )
                if chunk is not None
            ]
            return (digested.total if digested else 0), sums

        with writing_pool() as pool:
            return list(pool.map(write, self.arrays, values))

    def joined(
        self, shares: Sequence[Sequence[Share]]
    ) -> tuple[list[str], list[Sequence[str]]]:
        """Join what the processes have written.

        Args:
            shares: Of each process, what `write_share` returned.

        Returns:
            The leaves' digests, and the checksums of each leaf's files.

        Raises:
            ValueError: If there is a part that none of them has written, or several.
        """
        digests, sums = list[str](), list[Sequence[str]]()
        for stored, parts in zip(self.arrays, zip(*shares, strict=True), strict=True):
            digested = Digest()
            for total, _ in parts:
                digested.add(total)
            written = [file for _, found in parts for file in found]
            files = dict(map(tuple, written))
            number = 0 if isinstance(stored, str) else sum(1 for _ in stored.keys())
            if not len(files) == len(written) == number:
                raise ValueError(
                    f"of {stored}, {number} files, {len(written)} were written"
                )
            sums.append([files[position] for position in range(number)])
            is_one_chunk = isinstance(stored, _Stored) and stored.is_one_chunk
            digests.append(digest_of(files[0]) if is_one_chunk else digested.text)
        return digests, sums

    def link(
        self,
        draft: Draft,
        values: Sequence[Any],
        digests: Sequence[str],
        sums: Sequence[Sequence[str]],
        frozen: Frozen,
    ) -> None:
        """Replace what Orbax has written of frozen leaves by links, where it is stored.

        Args:
            draft: What Orbax has written.
            values: The leaves, those that are frozen as `FrozenLeaf`.
            digests: Of the leaves.
            sums: Of their files.
            frozen: Where frozen leaves are stored.
        """
        found = zip(digests, sums, strict=True)
        for stored, value, marks in zip(self.arrays, values, found, strict=True):
            if isinstance(value, FrozenLeaf) and isinstance(stored, _Stored):
                value.digest = marks[0]
                names = [f"{STATE}/{key}" for key, _ in stored.with_keys("/").keys()]
                is_linked = frozen.link(draft, stored, value, names)
                value.sums = marks[1]
                frozen.note(draft, stored, value, names, is_linked=is_linked)

    def adopt(self, path: Path, leaves: Sequence[Leaf], frozen: Frozen) -> None:
        """Look up what of an earlier checkpoint can be linked, by what is there now.

        Args:
            path: The checkpoint.
            leaves: Its leaves.
            frozen: What to tell.
        """
        store = _Files(path / STATE)
        known = {leaf.stored_name: leaf for leaf in leaves}
        for stored in self.arrays:
            leaf = None if isinstance(stored, str) else known.get(stored.name)
            if leaf is None or isinstance(stored, str) or leaf.kind not in _READ:
                continue
            found = _read(store, leaf)
            if found is None or found[0].with_keys(".") != stored:
                continue
            files = [path / STATE / key for key, _ in found[0].keys()]
            try:
                stamps = [stamp_of(file) for file in files]
            except OSError:
                continue
            digest = _digest(stored, found[1])  # an earlier version's may be another
            frozen.adopt(stored, Home(digest, files, stamps, found[2]))

    def marks(self, values: Sequence[Any]) -> tuple[list[str], list[Sequence[str]]]:
        """Compute what `write` returns."""
        pairs = list(zip(self.arrays, values, strict=True))
        digests = [_digest(stored, value) for stored, value in pairs]
        if self.is_database:
            return digests, []
        sums: list[Sequence[str]] = []
        for (stored, value), mark in zip(pairs, digests, strict=True):
            whole, chunks = checksum_in(mark), list[str]()
            if whole is None and isinstance(stored, _Stored):
                chunks = [checksum(chunk) for _, _, chunk in _chunks(stored, value)]
            sums.append(chunks if whole is None else [whole])
        return digests, sums

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """The files that this form has, as paths in the checkpoint."""
        names = set(self.files)
        for stored in self.arrays:
            if not isinstance(stored, str):
                names.add(f"{STATE}/{stored.description_key}")
                names.update(f"{STATE}/{key}" for key, _ in stored.keys())
        return frozenset(names)

    def _write_around(self, draft: Draft, values: Sequence[Any]) -> None:
        for path, content in self.files.items():
            draft.write(path, [self._current(path, content, values)])

    def _current(self, path: str, content: bytes, values: Sequence[Any]) -> bytes:
        if path == _STRINGS:
            pairs = zip(self.arrays, values, strict=True)
            texts = {name: text for name, text in pairs if isinstance(name, str)}
            return json.dumps(texts).encode()
        if path == _TIMES:
            fields = json.loads(content)
            now = time.time_ns()
            for key in ("init_timestamp_nsecs", "commit_timestamp_nsecs"):
                fields[key] = now
            return json.dumps(fields).encode()
        return content

    def _write_database(self, directory: Path, values: Sequence[Any]) -> list[str]:
        with plainly(directory) as plain:
            database = tensorstore.KvStore.open(_database(plain)).result()
            return self._write_into(database, values)

    def _write_into(self, database: Any, values: Sequence[Any]) -> list[str]:
        found: list[str] = []
        transaction, size = tensorstore.Transaction(), 0
        into = database.with_transaction(transaction)
        turn = time.perf_counter()
        for stored, value in zip(self.arrays, values, strict=True):
            turn = give_way(turn)
            found.append(_digest(stored, value))
            if isinstance(stored, str):
                continue
            into.write(stored.description_key, stored.description)
            for key, _, chunk in _chunks(stored, value):
                into.write(key, chunk.tobytes() + _trailer(chunk.nbytes))
                size += chunk.nbytes
            if size > _BATCH_BYTES:
                transaction.commit_sync()
                transaction, size = tensorstore.Transaction(), 0
                into = database.with_transaction(transaction)
        transaction.commit_sync()
        return found

    def _write_files(
        self, draft: Draft, values: Sequence[Any], frozen: Frozen | None
    ) -> tuple[list[str], list[Sequence[str]]]:
        def write(stored: _Stored | str, value: Any) -> tuple[str, Sequence[str]]:
            if isinstance(stored, str):
                return digest(value), ()
            if isinstance(value, FrozenLeaf):
                assert frozen is not None
                names = [f"{STATE}/{key}" for key, _ in stored.keys()]
                value.digest = value.digest or _digest(stored, value.value)
                is_linked = frozen.link(draft, stored, value, names)
                if not is_linked:
                    _, value.sums = _write_array(draft, stored, value.value)
                frozen.note(draft, stored, value, names, is_linked=is_linked)
                marks = value.digest, value.sums
            else:
                marks = _write_array(draft, stored, value)
            draft.write(f"{STATE}/{stored.description_key}", [stored.description])
            return marks

        with writing_pool() as pool:
            found = list(pool.map(write, self.arrays, values))
        return [digest for digest, _ in found], [sums for _, sums in found]


def _digest(stored: _Stored | str, value: Any) -> str:
    """Digest a leaf as it is digested where it is written in this way."""
    if isinstance(stored, _Stored) and stored.is_one_chunk:
        return digest_of(checksum(value))
    return digest(value)


def _write_array(draft: Draft, stored: _Stored, value: Any) -> tuple[str, list[str]]:
    """Write an array's files; return its digest and their checksums.

    Block by block, so that all three find a block in the cache.
    """
    digested = None if stored.is_one_chunk else Digest()
    sums = [
        _write_file(draft, key, start, chunk, digested)
        for key, start, chunk in _chunks(stored, value)
    ]
    return (digested.text if digested else digest_of(sums[0])), sums


def _write_file(
    draft: Draft,
    key: str,
    start: tuple[int, ...],
    chunk: Array,
    digested: Digest | None,
) -> str:
    """Write a chunk's file, take it into a digest, and return its checksum."""
    summed = xxhash.xxh3_64()
    blocks = digested.blocks(chunk, start) if digested else _blocks(chunk)
    with draft.writing(f"{STATE}/{key}") as write:
        for block in blocks:
            found = _bytes(block).data
            summed.update(found)
            write(found)
        write(_trailer(chunk.nbytes))
    return summed.hexdigest()


def _blocks(chunk: Array) -> Iterator[Array]:
    """Yield a chunk in blocks that stay in the cache."""
    values = _bytes(chunk)
    for start in range(0, values.nbytes, _BLOCK_BYTES):
        yield values[start : start + _BLOCK_BYTES]


def recognized(
    directory: Path, layout: Layout, values: Sequence[Any], *, leads: bool = True
) -> Form | None:
    """Learn the form of a checkpoint that Orbax has just written.

    Args:
        directory: The checkpoint.
        layout: Its layout.
        values: The leaves that Orbax holds.
        leads: Whether what is in each of several processes is in these files, too.

    Returns:
        The form; None if it is not one that can be written here.
    """
    leaves = [leaf for leaf in layout.leaves if leaf.in_orbax]
    is_database = (directory / STATE / "manifest.ocdbt").exists()
    files: dict[str, bytes] = {}
    names: set[str] = set()
    store = _Database(directory / STATE) if is_database else _Files(directory / STATE)
    arrays: list[_Stored | str] = []
    try:
        for leaf, value in zip(leaves, values, strict=True):
            name = leaf.stored_name
            if leaf.is_text:
                arrays.append(name)
                continue
            stored = _stored(name, leaf, value, store)
            for key, _, chunk in _own_chunks(stored, value, leads=leads):
                if chunk is not None:
                    _compare(store.ends(key), _bytes(chunk))
            arrays.append(stored if is_database else stored.with_keys("."))
            names.add(name)
        for path in sorted(directory.rglob("*")):
            name = path.relative_to(directory).as_posix()
            if path.is_file() and not _holds_values(name, is_database, names):
                files[name] = path.read_bytes()
        form = Form(is_database, files, arrays)
        if leads and any(leaf.is_text for leaf in leaves):
            text = form._current(_STRINGS, files[_STRINGS], values)
            if json.loads(text) != json.loads(files[_STRINGS]):
                return None
    except (_OtherwiseError, KeyError, ValueError, TypeError, AttributeError):
        return None
    return form


class _OtherwiseError(Exception):
    """Orbax wrote it otherwise than it would be written here."""


_UNREADABLE = (
    _OtherwiseError,
    OSError,
    KeyError,
    ValueError,
    TypeError,
    AttributeError,  # where a mapping is expected
)


def _stored(name: str, leaf: Leaf, value: Any, store: "_Values") -> _Stored:
    """Read how Orbax has stored an array; raise if not in the way known here."""
    # A leaf's own dtype, where it has one: Orbax may have been given another.
    dtype = leaf.dtype if leaf.kind in _READ else _dtype(value)
    if not name:  # its files are among Orbax's own
        raise _OtherwiseError
    stored = _parsed(name, store.read(_below(name, _DESCRIPTION)), dtype)
    if stored.separator != "/":
        raise _OtherwiseError
    return stored


def _dtype(value: Any) -> str:
    """Return the dtype by which a leaf is stored, of which not all needs to be here."""
    if is_shared(value):
        return str(value.dtype)
    return str(pieces(value)[0][1].dtype)


def _parsed(name: str, description: bytes, dtype: str) -> _Stored:
    """Parse a `zarr.json`, for values of a dtype.

    Raises:
        _OtherwiseError: If it is in another way than the one known here.
        MalformedError: If it is none.
    """
    found = parse_zarr(description)
    codec = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": list(found.chunk),
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            "index_codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "crc32c"},
            ],
        },
    }
    for each in found.codecs:
        setting = each.get("configuration", {})
        setting.pop("index_location", None)
        for inner in setting.get("codecs", ()):  # one byte has no order
            inner.setdefault("configuration", {"endian": "little"})
    pairs = zip(found.shape, found.chunk, strict=True)
    if (
        found.codecs != [codec]
        or any(size % part for size, part in pairs)
        or found.dtype != dtype
    ):
        raise _OtherwiseError
    kind = jnp.dtype(dtype)
    return _Stored(name, description, kind, found.shape, found.chunk, found.separator)


class Reader:
    """Reads leaves of a checkpoint, as fast as their bytes can be read.

    For use by several threads.
    """

    def __init__(self, directory: Path, source: Source | None = None) -> None:
        """Look how the checkpoint is arranged.

        Args:
            directory: The checkpoint.
            source: What has the files that are not in the directory; None if all are.

        Raises:
            ValueError: If that cannot be known.
            CheckpointPathError: If this process cannot read it.
        """
        state = directory / STATE
        self._texts: dict[str, str] | None = None
        self._files = _Files(state) if source is None else _Sourced(source)
        is_database = is_there(state / "manifest.ocdbt")
        if source is not None and source.read(f"{STATE}/manifest.ocdbt") is not None:
            source.complete()
            is_database = True
        try:
            self._store = _Database(state) if is_database else self._files
        except _OtherwiseError as error:
            raise ValueError("its database cannot be opened") from error

    def knows(self, leaf: Leaf) -> bool:
        """Tell whether a leaf is stored in a way that is known here."""
        try:
            return leaf.is_text or _stored_of(self._store, leaf) is not None
        except CheckpointPathError:
            raise
        except _UNREADABLE:
            return False

    def contradicts(self, leaf: Leaf) -> bool:
        """Tell whether a leaf is not stored, or as an array of another kind."""
        if not leaf.in_orbax:
            return False
        try:
            if leaf.is_text:
                self._text(leaf)
                return False
            found = parse_zarr(self._store.read(_below(leaf.stored_name, _DESCRIPTION)))
        except CheckpointPathError:
            raise
        except _UNREADABLE:
            return True
        return (found.shape, found.dtype) != _array_of(leaf)

    def holds(self, leaf: Leaf) -> bool:
        """Tell whether all files of a leaf are there, with the sizes that they have.

        Reads no values. False also where the leaf is stored in a way of which that
        cannot be told.
        """
        try:
            if leaf.is_text:
                self._text(leaf)
                return True
            stored, nbytes = _outlined(self._store, leaf)
            return all(self._store.has(key, nbytes) for key, _ in stored.keys())
        except CheckpointPathError:
            raise
        except _UNREADABLE:
            return False

    def read(self, leaf: Leaf, *, check: bool) -> tuple[Any, bool]:
        """Read a leaf to the host.

        Args:
            leaf: The leaf.
            check: Whether to compare it with what is recorded of what was saved.

        Returns:
            Its values, in memory that JAX on CPU need not copy; of keys, their data.
            None if they are stored in a way that is not known here, or not whole: Orbax
            can tell. And whether they are what was saved, as far as that was checked.
        """
        if leaf.is_text:
            return self._read_text(leaf, check=check)
        recorded = _sums(leaf)
        found = _read(self._store, leaf, check=check and bool(recorded))
        if found is None:
            return None, True
        _, values, sums = found
        is_same = True
        if check and recorded:
            is_same = recorded == sums
        elif check and leaf.digest:
            is_same = agrees(values, leaf.digest)
        return (values.item() if leaf.kind in _NUMBERS else values), is_same

    def read_onto(
        self, leaf: Leaf, sharding: jax.sharding.Sharding, *, check: bool
    ) -> tuple[jax.Array | None, bool | None]:
        """Read an array onto the devices of this process; no other one has to come.

        Args:
            leaf: The array.
            sharding: How it is to lie on all devices.
            check: Whether to compare it with what is recorded of what was saved.

        Returns:
            As `read`; None for a check that needs more than the files that were read.
        """
        try:
            stored = _stored_of(self._store, leaf)
            if stored is None:
                return None, True
            indices = sharding.addressable_devices_indices_map(stored.shape)
            places = {
                device: tuple(
                    part.indices(size)[:2]
                    for part, size in zip(index or (), stored.shape, strict=True)
                )
                for device, index in indices.items()
            }
            recorded = _sums(leaf)
            check = check and bool(recorded)
            parts, sums = _read_parts(self._store, stored, places.values(), check=check)
            array = jax.make_array_from_single_device_arrays(
                stored.shape,
                sharding,
                [
                    jax.device_put(parts[at], part_of(sharding, device))
                    for device, at in places.items()
                ],
                dtype=stored.dtype,
            )
        except CheckpointPathError:
            raise
        except _UNREADABLE:
            return None, True
        if not recorded:
            return array, None
        return array, all(
            recorded[position : position + 1] == (found,)
            for position, found in sums.items()
        )

    def _read_text(self, leaf: Leaf, *, check: bool) -> tuple[str | None, bool]:
        try:
            text = self._text(leaf)
        except _OtherwiseError:
            return None, True
        return text, not (check and leaf.digest) or agrees(text, leaf.digest)

    def _text(self, leaf: Leaf) -> str:
        if self._texts is None:
            file = _STRINGS.removeprefix(f"{STATE}/")
            try:
                self._texts = parse_texts(self._files.read(file))
            except MalformedError as error:
                raise _OtherwiseError from error
        try:
            return self._texts[leaf.stored_name]
        except KeyError as error:
            raise _OtherwiseError from error


def _below(name: str, file: str) -> str:
    """Return the key of a leaf's file; a leaf that is the whole tree has no name."""
    return f"{name}/{file}" if name else file


def _sums(leaf: Leaf) -> tuple[str, ...]:
    """Return what is recorded as the checksums of a leaf's chunks; none if nothing."""
    whole = checksum_in(leaf.digest)
    return leaf.sums if whole is None else (whole,)


def _read_parts(
    store: "_Values",
    stored: _Stored,
    bounds: Iterable[Bounds],
    *,
    check: bool,
) -> tuple[dict[Bounds, Array], dict[int, str]]:
    """Read parts of an array, each of its files once.

    Args:
        store: Where it is.
        stored: How it is stored.
        bounds: Of the parts.
        check: Whether to compute checksums.

    Returns:
        The parts, in memory that JAX on CPU need not copy, and the checksums of the
        chunks that were read, by their positions.
    """
    sizes = {
        where: math.prod(stop - start for start, stop in where) for where in bounds
    }
    store.check_room(stored.name, sum(sizes.values()) * stored.dtype.itemsize)
    parts = {
        where: _aligned(tuple(stop - start for start, stop in where), stored.dtype)
        for where in sizes
    }
    sums: dict[int, str] = {}
    for position, (key, start) in enumerate(stored.keys()):
        own = tuple(
            (at, at + size) for at, size in zip(start, stored.chunk, strict=True)
        )
        overlaps = {where: _overlap(where, own) for where in parts}
        overlaps = {
            where: both
            for where, both in overlaps.items()
            if all(low < high for low, high in both)
        }
        if not overlaps:
            continue
        chunk = parts[own] if own in parts else np.empty(stored.chunk, stored.dtype)
        for found in store.read_into(key, chunk, check=check):
            sums[position] = found
        for where, both in overlaps.items():
            if where != own:
                parts[where][_within_part(both, where)] = chunk[_within_part(both, own)]
            sizes[where] -= math.prod(high - low for low, high in both)
    if any(sizes.values()):  # of memory that nothing was read into
        raise _OtherwiseError
    return parts, sums


def _overlap(one: Bounds, other: Bounds) -> Bounds:
    pairs = zip(one, other, strict=True)
    return tuple((max(a[0], b[0]), min(a[1], b[1])) for a, b in pairs)


def _within_part(bounds: Bounds, part: Bounds) -> tuple[slice, ...]:
    pairs = zip(bounds, part, strict=True)
    return tuple(slice(low - at, high - at) for (low, high), (at, _) in pairs)


def _stored_of(store: "_Values", leaf: Leaf) -> _Stored | None:
    """Look up how a leaf is stored; None if otherwise than its table says.

    Raises:
        _OtherwiseError, KeyError, ValueError, TypeError, AttributeError: As `_parsed`.
    """
    name = leaf.stored_name
    shape, dtype = _array_of(leaf)
    stored = _parsed(name, store.read(_below(name, _DESCRIPTION)), dtype)
    return stored if stored.shape == shape else None


def _array_of(leaf: Leaf) -> tuple[tuple[int, ...], str]:
    """Return the shape and the dtype of the array by which a leaf is stored."""
    numbers = key_numbers(leaf.impl) if leaf.kind == "key" else ()
    return leaf.shape + numbers, _DTYPES.get(leaf.kind, leaf.dtype)


def _outlined(store: "_Values", leaf: Leaf) -> tuple[_Stored, int | None]:
    """Look up how a leaf is stored, in whatever encoding, and how large a chunk is.

    The size is None where it depends on the values.

    Raises:
        _OtherwiseError: If it is not as its table says, or is not known here.
        MalformedError: If what describes it is nothing of the kind.
    """
    with contextlib.suppress(_OtherwiseError):
        stored = _stored_of(store, leaf)
        if stored is not None:
            nbytes = math.prod(stored.chunk) * stored.dtype.itemsize
            return stored, nbytes + len(_trailer(nbytes))
    name = leaf.stored_name
    description = store.read(_below(name, _DESCRIPTION))
    found = parse_zarr(description)
    if (found.shape, found.dtype) != _array_of(leaf):
        raise _OtherwiseError
    dtype = jnp.dtype(found.dtype)
    stored = _Stored(
        name, description, dtype, found.shape, found.chunk, found.separator
    )
    return stored, None


def _read(
    store: "_Values", leaf: Leaf, *, check: bool = True
) -> tuple[_Stored, Array, tuple[str, ...]] | None:
    """Read an array, how it is stored, and its chunks' checksums, if asked to."""
    try:
        stored = _stored_of(store, leaf)
        if stored is None:
            return None
        whole = tuple((0, size) for size in stored.shape)
        parts, sums = _read_parts(store, stored, [whole], check=check)
    except CheckpointPathError:
        raise
    except _UNREADABLE:
        return None
    return stored, parts[whole], tuple(sums.values())


def _aligned(shape: tuple[int, ...], dtype: Any) -> Array:
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _compare(found: tuple[int, bytes, bytes], chunk: Bytes) -> None:
    size, head, tail = found
    trailer = _trailer(chunk.nbytes)
    if (size, head, tail) != (
        chunk.nbytes + len(trailer),
        (chunk[:_HEAD].tobytes() + trailer)[:_HEAD],
        trailer,
    ):
        raise _OtherwiseError


def _holds_values(path: str, is_database: bool, names: set[str]) -> bool:
    first, _, rest = path.partition("/")
    if first != STATE:
        return False
    if is_database:
        return rest.endswith("manifest.ocdbt") or rest.startswith(("d/", "ocdbt."))
    return any(rest[:at] in names for at, each in enumerate(rest) if each == "/")


def _chunks(
    stored: _Stored, value: Any
) -> Iterator[tuple[str, tuple[int, ...], Array]]:
    """Yield of each chunk its file, where it begins, and its values, contiguous."""
    if stored.shape == stored.chunk:
        ((key, start),) = stored.keys()
        yield key, start, np.asarray(_on_host(value), order="C")
        return
    parts = pieces(value)
    for key, start in stored.keys():
        yield key, start, np.ascontiguousarray(_cut(parts, value, start, stored.chunk))


def _own_chunks(
    stored: _Stored, value: Any, *, leads: bool
) -> Iterator[tuple[str, tuple[int, ...], Array | None]]:
    """Yield of each chunk what `_chunks` does; no values of what others have."""
    if not is_shared(value):
        for key, start, chunk in _chunks(stored, value):
            yield key, start, chunk if leads else None
        return
    parts = pieces(value)
    for key, start in stored.keys():
        chunk = _within(parts, start, stored.chunk)
        yield key, start, None if chunk is None else np.asarray(chunk, order="C")


def _cut(
    parts: list[Piece],
    value: Any,
    start: tuple[int, ...],
    chunk: tuple[int, ...],
) -> Array:
    found = _within(parts, start, chunk)
    if found is not None:
        return found
    parts[:] = [((0,) * len(chunk), _on_host(value))]  # it spans several shards
    return _cut(parts, value, start, chunk)


def _within(
    parts: list[Piece], start: tuple[int, ...], chunk: tuple[int, ...]
) -> Array | None:
    """Return a chunk, if one of the pieces has it all."""
    for begin, piece in parts:
        low = [at - base for at, base in zip(start, begin, strict=True)]
        high = [at + size for at, size in zip(low, chunk, strict=True)]
        if all(at >= 0 for at in low) and all(
            at <= size for at, size in zip(high, piece.shape, strict=True)
        ):
            return piece[tuple(map(slice, low, high))]
    return None


def _bytes(array: Array) -> Bytes:
    return array.reshape(-1).view(np.uint8)


def _on_host(value: Any) -> Array:
    return np.asarray(without_keys(value))


@functools.lru_cache(maxsize=256)
def _trailer(nbytes: int) -> bytes:
    """Return the index behind a chunk: where its one part is, and a checksum."""
    index = struct.pack("<QQ", 0, nbytes)
    return index + struct.pack("<I", _crc32c(index))


def _crc32c(data: bytes) -> int:
    """Castagnoli's cyclic redundancy check (RFC 3720, appendix B.4), of a few bytes."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def _database(directory: Path) -> dict[str, Any]:
    base = {"driver": "file", "path": f"{directory}/"}
    threads = {"limit": writing_threads()}
    context = {"file_io_concurrency": threads, "data_copy_concurrency": threads}
    return {"driver": "ocdbt", "base": base, "config": _DATABASE, "context": context}


class _Values(Protocol):
    """Where a checkpoint's arrays are."""

    def read(self, key: str) -> bytes:
        """Read a file, or what a database has in its place."""
        ...

    def read_into(self, key: str, values: Array, *, check: bool) -> list[str]:
        """Read a chunk; return its checksum, if asked to."""
        ...

    def ends(self, key: str) -> tuple[int, bytes, bytes]:
        """Return a file's size, and its first and last bytes."""
        ...

    def check_room(self, name: str, nbytes: int) -> None:
        """Check that an array can have so many bytes, before there is memory for it.

        Raises:
            _OtherwiseError: If its files have less.
        """
        ...

    def has(self, key: str, nbytes: int | None) -> bool:
        """Tell whether a file is there, with a size if that is given and known."""
        ...


class _Files:
    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self, key: str) -> bytes:
        try:
            return read_small(self._path(key))
        except NoFileError as error:
            raise _OtherwiseError from error

    def has(self, key: str, nbytes: int | None) -> bool:
        found = self._path(key).lstat()
        is_whole = found.st_size > 0 if nbytes is None else found.st_size == nbytes
        return stat.S_ISREG(found.st_mode) and is_whole

    def read_into(self, key: str, values: Array, *, check: bool) -> list[str]:
        summed = xxhash.xxh3_64() if check else None
        trailer, left = _trailer(values.nbytes), memoryview(_bytes(values).data)
        with self._opened(key) as file:
            if os.fstat(file).st_size != values.nbytes + len(trailer):
                raise _OtherwiseError
            while left:
                block = left[:_BLOCK_BYTES] if summed else left
                count = os.readv(file, [block])
                if not count:
                    raise _OtherwiseError
                if summed:
                    summed.update(left[:count])
                left = left[count:]
            if os.read(file, len(trailer) + 1) != trailer:
                raise _OtherwiseError
        return [summed.hexdigest()] if summed else []

    def ends(self, key: str) -> tuple[int, bytes, bytes]:
        with self._opened(key) as file:
            size, length = os.fstat(file).st_size, len(_trailer(0))
            head = os.pread(file, _HEAD, 0)
            return size, head, os.pread(file, length, max(size - length, 0))

    def check_room(self, name: str, nbytes: int) -> None:
        if nbytes > _ROOM_BYTES and nbytes > _size_of(self._path(name)):
            raise _OtherwiseError

    @contextlib.contextmanager
    def _opened(self, key: str) -> Generator[int]:
        path = self._path(key)
        try:
            file = open_file(path)
        except NoFileError as error:
            raise _OtherwiseError from error
        try:
            yield file
        except OSError as error:
            raise unreadable(path, error) from error
        finally:
            os.close(file)

    def _path(self, key: str) -> Path:
        """Return where a file is, which is in this directory, whatever its name."""
        if not is_inside(key):
            raise _OtherwiseError
        return self._directory / key


def _size_of(directory: Path) -> int:
    try:
        return sum(entry.stat().st_size for entry in plain_files(directory))
    except (NoFileError, OSError) as error:
        raise _OtherwiseError from error


class _Sourced:
    """Files that are not on the disk."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._descriptions: dict[str, bytes] = {}  # which are read more than once

    def read(self, key: str) -> bytes:
        if key in self._descriptions:
            return self._descriptions[key]
        found = self._source.read(f"{STATE}/{key}")
        if found is None:
            raise _OtherwiseError
        if key.endswith(".json"):
            self._descriptions[key] = found
        return found

    def read_into(self, key: str, values: Array, *, check: bool) -> list[str]:
        return _take_in(self.read(key), values, check=check)

    def ends(self, key: str) -> tuple[int, bytes, bytes]:
        return _ends(self.read(key))

    def check_room(self, name: str, nbytes: int) -> None:
        pass  # a request tells when it is made

    def has(self, key: str, nbytes: int | None) -> bool:
        return len(self.read(key)) == nbytes or nbytes is None


class _Database:
    def __init__(self, directory: Path) -> None:
        self._size = _size_of(directory)  # and nothing there but plain files
        try:
            read_small(directory / "manifest.ocdbt", _MANIFEST_BYTES)
        except NoFileError as error:
            raise _OtherwiseError from error
        with contextlib.ExitStack() as stack:
            plain = stack.enter_context(plainly(directory))
            weakref.finalize(self, stack.pop_all().close)
        base = {"driver": "file", "path": f"{plain}/"}
        # Without a cache, its index is read anew for every key.
        context = {"cache_pool": {"total_bytes_limit": _INDEX_BYTES}}
        spec = {"driver": "ocdbt", "base": base, "context": context}
        self._directory = directory
        self._store = self._result(tensorstore.KvStore.open(spec))

    def read_into(self, key: str, values: Array, *, check: bool) -> list[str]:
        return _take_in(self.read(key), values, check=check)

    @functools.cached_property
    def _keys(self) -> frozenset[str]:
        return frozenset([key.decode() for key in self._result(self._store.list())])

    def has(self, key: str, nbytes: int | None) -> bool:
        del nbytes  # which only a read of the value tells
        return key in self._keys

    def read(self, key: str) -> bytes:
        found = self._result(self._store.read(key))
        if found.state != "value":
            raise _OtherwiseError
        return bytes(found.value)

    def ends(self, key: str) -> tuple[int, bytes, bytes]:
        return _ends(self.read(key))

    def check_room(self, name: str, nbytes: int) -> None:
        if nbytes > _ROOM_BYTES and nbytes > self._size:
            raise _OtherwiseError

    def _result(self, future: Any) -> Any:
        """Wait for what TensorStore does with files that may hold anything."""
        try:
            return future.result()
        except MemoryError:
            raise
        except Exception as error:
            check_readable(self._directory)
            raise _OtherwiseError from error


def _take_in(found: bytes, values: Array, *, check: bool) -> list[str]:
    """Take a chunk's values from all of what was stored; see `_Values.read_into`."""
    trailer = _trailer(values.nbytes)
    if len(found) != values.nbytes + len(trailer) or not found.endswith(trailer):
        raise _OtherwiseError
    _bytes(values)[:] = np.frombuffer(found, np.uint8, values.nbytes)
    return [checksum(values)] if check else []


def _ends(found: bytes) -> tuple[int, bytes, bytes]:
    return len(found), found[:_HEAD], found[-len(_trailer(0)) :]
