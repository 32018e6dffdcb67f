"""Learns from a checkpoint that Orbax has written how Orbax stores such a tree.

`learn` compares what Orbax wrote with what `write_values` would have written: of each
chunk the size and both ends. If they differ, because of another version of Orbax or an
unknown option, it learns nothing, and Orbax goes on writing.
"""

import collections
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from flaxckpt._direct.chunks import chunks_of, within
from flaxckpt._direct.form import Form, database_of
from flaxckpt._direct.sources import HEAD, Database, Files, Store
from flaxckpt._direct.zarr import (
    ARRAYS_METADATA,
    DESCRIPTION,
    MANIFEST,
    STATE,
    STRINGS,
    Bytes,
    OtherwiseError,
    ZarrArray,
    below,
    dtype_of,
    parsed,
    raw_bytes,
    trailer_of,
)
from flaxckpt._processes.messages import LEADER
from flaxckpt._trees.digest import combined, sum_here
from flaxckpt._trees.layout import Layout
from flaxckpt._trees.leaf import ARRAYS, Leaf, without_keys
from flaxckpt._trees.owned_shards import is_shared, pieces, shards

_OTHERWISE = (
    OtherwiseError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
)


def learn(directory: Path, layout: Layout, values: Sequence[Any]) -> Form | None:
    """Learn how Orbax has just written a checkpoint.

    Args:
        directory: The checkpoint.
        layout: Its layout.
        values: The leaves that Orbax stores.

    Returns:
        What Orbax wrote; None if it wrote in a way that is not known here.
    """
    leaves = [leaf for leaf in layout.leaves if leaf.in_orbax]
    is_database = (directory / STATE / MANIFEST).exists()
    names = {leaf.stored_name for leaf in leaves if not leaf.is_text}
    try:
        store = Database(directory / STATE) if is_database else Files(directory / STATE)
        arrays: list[ZarrArray | str] = []
        for leaf, value in zip(leaves, values, strict=True):
            stored = _stored(leaf, value, store)
            if isinstance(stored, ZarrArray) and not is_database:
                stored = stored.with_keys(".")
            arrays.append(stored)
        contents = {
            name: path.read_bytes()
            for name, path in _files(directory)
            if not _holds_values(name, is_database, names)
        }
        return _checked(Form(is_database, contents, arrays), values)
    except _OTHERWISE:
        return None


def learn_share(
    directory: Path,
    layout: Layout,
    values: Sequence[Any],
    process: int,
    *,
    spreads: bool,
) -> tuple[Form, list[int]] | None:
    """Learn how Orbax has just written the share of a process, as `learn` does.

    Args:
        directory: The checkpoint.
        layout: Its layout.
        values: The leaves that Orbax stores.
        process: The process. It has a database of its own, which for process 0 has the
            description of each array, and for others only chunks; without any of these,
            Orbax makes no database.
        spreads: Whether replicas are divided between processes.

    Returns:
        The form, and for each leaf the sum over the chunks that were written here; see
        `combined`. Replicas may differ, so it matters which was written.
    """
    leaves = [leaf for leaf in layout.as_stored.leaves if leaf.in_orbax]
    state = directory / STATE
    shapes = state / ARRAYS_METADATA / f"process_{process}"
    try:
        database = state / database_of(process)
        store = Database(database) if (database / MANIFEST).exists() else None
        contents, chunks = dict[str, bytes](), dict[str, tuple[int, ...]]()
        if shapes.exists():  # there are none for host arrays
            contents[shapes.relative_to(directory).as_posix()] = shapes.read_bytes()
            chunks = _chunk_shapes(shapes.read_bytes())
        there = frozenset[str]() if store is None else store.keys
        keys = _by_name(there)
        if store is not None:
            store.expect_all()
        arrays: list[ZarrArray | str] = []
        sums: list[int] = []
        for leaf, value in zip(leaves, values, strict=True):
            name = leaf.stored_name
            key, named = below(name, DESCRIPTION), keys.get(name, {})
            description = store.read(key) if store and key in there else b""
            is_missing = process == LEADER and not (description or leaf.is_text)
            if is_missing:
                raise OtherwiseError
            stored = _stored_share(leaf, value, description, named, chunks)
            arrays.append(stored)
            sums.append(_sum_as_stored(stored, value, store, process))
        if process != LEADER:
            return Form(True, contents, arrays, spreads), sums
        contents |= {
            name: path.read_bytes()
            for name, path in _files(directory)
            if name.startswith(f"{STATE}/")
            and not _holds_values(name, True, set())
            and path.parent != shapes.parent
        }
        return _checked(Form(True, contents, arrays, spreads), values), sums
    except _OTHERWISE:
        return None


def _chunk_shapes(metadata_of_arrays: bytes) -> dict[str, tuple[int, ...]]:
    """Read which shape the chunks of each array have, by the array's name."""
    found = json.loads(metadata_of_arrays)["array_metadatas"]
    metadata = [each["array_metadata"] for each in found]
    return {each["param_name"]: tuple(each["chunk_shape"]) for each in metadata}


def _files(directory: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            yield path.relative_to(directory).as_posix(), path


def _checked(learnt: Form, values: Sequence[Any]) -> Form:
    """Return a form; raise if it has texts in another way than is written here."""
    if any(isinstance(stored, str) for stored in learnt.arrays):
        content = learnt.contents[STRINGS]
        if json.loads(learnt.current(STRINGS, content, values)) != json.loads(content):
            raise OtherwiseError
    return learnt


def _by_name(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Group the keys of chunks by the array's name, and what is behind its `/c`."""
    found = collections.defaultdict[str, dict[str, str]](dict)
    for key in keys:
        if not key.endswith(DESCRIPTION):
            name, _, number = key.rpartition("/c")
            found[name][number] = key
    return found


def _stored(leaf: Leaf, value: Any, store: Store) -> ZarrArray | str:
    """Read how Orbax has stored a leaf; raise if the way is not known here."""
    if leaf.is_text:
        return leaf.stored_name
    dtype, name = _dtype(leaf, value), leaf.stored_name
    return _compared(_described(name, dtype, store), value, store)


def _stored_share(
    leaf: Leaf,
    value: Any,
    description: bytes,
    keys: Mapping[str, str],
    chunks: Mapping[str, tuple[int, ...]],
) -> ZarrArray | str:
    """Read how Orbax has stored this process's part of a leaf.

    Args:
        leaf: The leaf.
        value: Its value.
        description: The array's `zarr.json`, in process 0.
        keys: The keys of the leaf's chunks, by what is behind the name and `/c`.
        chunks: The shapes of chunks, by the arrays' names.
    """
    if leaf.is_text:
        return leaf.stored_name
    dtype, name, shape = _dtype(leaf, value), leaf.stored_name, np.shape(value)
    if description:
        stored = _parsed(name, dtype, description)
    else:
        chunk = chunks[name] if keys else shape
        stored = ZarrArray(name, b"", jnp.dtype(dtype), shape, chunk)
    starts = [
        tuple(int(at) * size for at, size in zip(number, stored.chunk, strict=True))
        for number in (behind.split("/")[1:] for behind in keys)
    ]
    return replace(stored, own_chunks=tuple(sorted(starts)))


def _sum_as_stored(
    stored: ZarrArray | str, value: Any, store: Database | None, process: int
) -> int:
    """Return the sum over the chunks of a leaf here.

    Raises:
        OtherwiseError: If a chunk has another size, or other bytes at its ends.
    """
    if isinstance(stored, str):
        return sum_here(value) if process == LEADER else 0
    parts, total = shards(value), 0
    for key, start in stored.keys():
        assert store is not None  # the keys were found there
        found = [*within(parts, start, stored.chunk)]
        if not (found or is_shared(value)):  # its chunks span shards of this process
            parts = pieces(np.asarray(without_keys(value)))
            found = [*within(parts, start, stored.chunk)]
        if len(found) > 1:  # Orbax has written one of the replicas
            content = store.read(key)
            found = [chunk for chunk in found if content.startswith(chunk.tobytes())]
        chunk = np.ascontiguousarray(found[0]).reshape(stored.chunk)
        _compare(store.ends(key, chunk.nbytes), raw_bytes(chunk))
        total += combined([(start, chunk)])
    return total


def _dtype(leaf: Leaf, value: Any) -> str:
    # Orbax may have been given another dtype than the leaf's own.
    return leaf.dtype if leaf.kind in ARRAYS else dtype_of(value)


def _described(name: str, dtype: str, store: Store) -> ZarrArray:
    if not name:  # the leaf is the whole tree; its files are among Orbax's own
        raise OtherwiseError
    return _parsed(name, dtype, store.read(below(name, DESCRIPTION)))


def _parsed(name: str, dtype: str, description: bytes) -> ZarrArray:
    stored = parsed(name, description, dtype)
    if stored.separator != "/":
        raise OtherwiseError
    return stored


def _compared(stored: ZarrArray, value: Any, store: Store) -> ZarrArray:
    """Return how an array is stored.

    Raises:
        OtherwiseError: If a chunk has another size, or other bytes at its ends.
    """
    for key, _, chunk in chunks_of(stored, value):
        _compare(store.ends(key, chunk.nbytes), raw_bytes(chunk))
    return stored


def _compare(ends: tuple[bytes, bytes], chunk: Bytes) -> None:
    trailer = trailer_of(chunk.nbytes)
    if ends != ((chunk[:HEAD].tobytes() + trailer)[:HEAD], trailer):
        raise OtherwiseError


def _holds_values(path: str, is_database: bool, names: set[str]) -> bool:
    first, _, rest = path.partition("/")
    if first != STATE:
        return False
    if is_database:
        return rest.endswith(MANIFEST) or rest.startswith(("d/", "ocdbt."))
    return any(rest[:at] in names for at, letter in enumerate(rest) if letter == "/")
