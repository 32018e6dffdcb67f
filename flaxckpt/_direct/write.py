"""Writes values as Orbax would store them: in files, or in an OCDBT database."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorstore
import xxhash

from flaxckpt._direct.chunks import chunks_of, digest_as_stored
from flaxckpt._direct.form import Fingerprints, Form
from flaxckpt._direct.frozen_files import Frozen, FrozenLeaf
from flaxckpt._direct.sources import BLOCK_BYTES
from flaxckpt._direct.threads import give_way, writing_pool, writing_threads
from flaxckpt._direct.zarr import STATE, Array, ZarrArray, raw_bytes, trailer_of
from flaxckpt._disk.alias import aliased
from flaxckpt._disk.files import Draft
from flaxckpt._trees.digest import Digest, as_digest, checksum, checksum_in, digest

_DATABASE = {"compression": None, "max_inline_value_bytes": 1024}
_BATCH_BYTES = 32 * 2**20  # of values that a database holds in memory until a commit


def write_values(
    form: Form,
    draft: Draft,
    directory: Path,
    values: Sequence[Any],
    frozen: Frozen | None = None,
) -> Fingerprints:
    """Write the tree of a checkpoint in the form that Orbax has shown.

    Args:
        form: How Orbax has written such a tree.
        draft: The draft to write to.
        directory: The draft's directory. The caller must sync a database's files.
        values: The leaves that Orbax stores. Frozen leaves come as `FrozenLeaf`; a
            database takes no frozen leaves.
        frozen: Where frozen leaves are stored; None if no leaf is frozen.
    """
    for path, content in form.contents_for(values, f"{STATE}/"):
        draft.write(path, [content])
    if form.is_database:
        with aliased(directory / STATE) as plain:
            database = tensorstore.KvStore.open(database_at(plain)).result()
            return _write_into(database, form, values), []
    return _write_files(form, draft, values, frozen)


def fingerprints_of(form: Form, values: Sequence[Any]) -> Fingerprints:
    """Compute what `write_values` would return, and write nothing."""
    pairs = list(zip(form.arrays, values, strict=True))
    digests = [digest_as_stored(stored, value) for stored, value in pairs]
    if form.is_database:
        return digests, []
    sums: list[Sequence[str]] = []
    for (stored, value), mark in zip(pairs, digests, strict=True):
        whole, chunks = checksum_in(mark), list[str]()
        if whole is None and isinstance(stored, ZarrArray):
            chunks = [checksum(chunk) for _, _, chunk in chunks_of(stored, value)]
        sums.append(chunks if whole is None else [whole])
    return digests, sums


def _write_into(database: Any, form: Form, values: Sequence[Any]) -> list[str]:
    digests: list[str] = []
    transaction, size = tensorstore.Transaction(), 0
    into = database.with_transaction(transaction)
    turn = time.perf_counter()
    for stored, value in zip(form.arrays, values, strict=True):
        turn = give_way(turn)
        digests.append(digest_as_stored(stored, value))
        if isinstance(stored, str):
            continue
        into.write(stored.description_key, stored.description)
        for key, _, chunk in chunks_of(stored, value):
            into.write(key, chunk.tobytes() + trailer_of(chunk.nbytes))
            size += chunk.nbytes
        if size > _BATCH_BYTES:
            transaction.commit_sync()
            transaction, size = tensorstore.Transaction(), 0
            into = database.with_transaction(transaction)
    transaction.commit_sync()
    return digests


def _write_files(
    form: Form, draft: Draft, values: Sequence[Any], frozen: Frozen | None
) -> Fingerprints:
    def write(stored: ZarrArray | str, value: Any) -> tuple[str, Sequence[str]]:
        if isinstance(stored, str):
            return digest(value), ()
        if isinstance(value, FrozenLeaf):
            assert frozen is not None
            names = [f"{STATE}/{key}" for key, _ in stored.keys()]
            value.digest = value.digest or digest_as_stored(stored, value.value)
            is_linked = frozen.link(draft, stored, value, names)
            if not is_linked:
                _, value.sums = write_array(draft, stored, value.value)
            frozen.note(draft, stored, value, names, is_linked=is_linked)
            marks = value.digest, value.sums
        else:
            marks = write_array(draft, stored, value)
        draft.write(f"{STATE}/{stored.description_key}", [stored.description])
        return marks

    with writing_pool() as pool:
        found = list(pool.map(write, form.arrays, values))
    return [digest for digest, _ in found], [sums for _, sums in found]


def write_array(draft: Draft, stored: ZarrArray, value: Any) -> tuple[str, list[str]]:
    """Write an array's files; return its digest and their checksums.

    Each block is digested, summed and written while it is in the CPU cache.
    """
    digested = None if stored.is_one_chunk else Digest()
    sums = [
        write_file(draft, key, start, chunk, digested)
        for key, start, chunk in chunks_of(stored, value)
    ]
    return (digested.text if digested else as_digest(sums[0])), sums


def write_file(
    draft: Draft,
    key: str,
    start: tuple[int, ...],
    chunk: Array,
    digested: Digest | None,
) -> str:
    """Write a chunk's file, add the chunk to `digested`, and return its checksum."""
    summed = xxhash.xxh3_64()
    blocks = digested.blocks(chunk, start) if digested else _blocks(chunk)
    with draft.writing(f"{STATE}/{key}") as write:
        for block in blocks:
            found = raw_bytes(block).data
            summed.update(found)
            write(found)
        write(trailer_of(chunk.nbytes))
    return summed.hexdigest()


def _blocks(chunk: Array) -> Iterator[Array]:
    """Yield a chunk's bytes in blocks that fit into the CPU cache."""
    values = raw_bytes(chunk)
    for start in range(0, values.nbytes, BLOCK_BYTES):
        yield values[start : start + BLOCK_BYTES]


def database_at(directory: Path) -> dict[str, Any]:
    base = {"driver": "file", "path": f"{directory}/"}
    threads = {"limit": writing_threads()}
    context = {"file_io_concurrency": threads, "data_copy_concurrency": threads}
    return {"driver": "ocdbt", "base": base, "config": _DATABASE, "context": context}
