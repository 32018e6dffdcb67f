"""Values are written as Orbax would store them: in files, or in an OCDBT database."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from flaxckpt._direct.chunks import chunks_of
from flaxckpt._direct.sources import BLOCK_BYTES
from flaxckpt._direct.threads import writing_threads
from flaxckpt._direct.zarr import STATE, Array, Stored, raw_bytes, trailer_of
from flaxckpt._disk.files import Draft
from flaxckpt._trees.digest import Digest, digest_of

_DATABASE = {"compression": None, "max_inline_value_bytes": 1024}
BATCH_BYTES = 32 * 2**20  # of values that a database holds in memory until a commit


def write_array(draft: Draft, stored: Stored, value: Any) -> tuple[str, list[str]]:
    """Write an array's files; return its digest and their checksums.

    Each block is digested, summed and written while it is in the CPU cache.
    """
    digested = None if stored.is_one_chunk else Digest()
    sums = [
        write_file(draft, key, start, chunk, digested)
        for key, start, chunk in chunks_of(stored, value)
    ]
    return (digested.text if digested else digest_of(sums[0])), sums


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
