"""A leaf cut into the chunks in which it is stored."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from flaxckpt._direct.zarr import Array, ZarrArray
from flaxckpt._trees.digest import as_digest, checksum, digest
from flaxckpt._trees.leaf import without_keys
from flaxckpt._trees.owned_shards import Piece, pieces, shards


def digest_as_stored(stored: ZarrArray | str, value: Any) -> str:
    """Compute the digest that a leaf gets when it is written in this way."""
    if isinstance(stored, ZarrArray) and stored.is_one_chunk:
        return as_digest(checksum(value))
    return digest(value)


def chunks_of(
    stored: ZarrArray, value: Any
) -> Iterator[tuple[str, tuple[int, ...], Array]]:
    """Yield each chunk's key, first index by axis, and values in C order."""
    if stored.is_one_chunk and stored.own_chunks is None:
        ((key, start),) = stored.keys()
        yield key, start, np.asarray(_on_host(value), order="C")
        return
    parts = pieces(value) if stored.own_chunks is None else shards(value)
    for key, start in stored.keys():
        chunk = np.ascontiguousarray(_cut(parts, value, start, stored.chunk))
        yield key, start, chunk.reshape(stored.chunk)


def _cut(
    parts: list[Piece], value: Any, start: tuple[int, ...], chunk: tuple[int, ...]
) -> Array:
    found = next(within(parts, start, chunk), None)
    if found is not None:
        return found
    parts[:] = [((0,) * len(chunk), _on_host(value))]  # the chunk spans several shards
    return _cut(parts, value, start, chunk)


def within(
    parts: Sequence[tuple[tuple[int, ...], Any]],
    start: tuple[int, ...],
    chunk: tuple[int, ...],
) -> Iterator[Array]:
    """Yield a chunk from each of the pieces that hold it whole."""
    for begin, piece in parts:
        low = [at - base for at, base in zip(start, begin, strict=True)]
        high = [at + size for at, size in zip(low, chunk, strict=True)]
        if all(at >= 0 for at in low) and all(
            at <= size for at, size in zip(high, piece.shape, strict=True)
        ):
            yield np.asarray(piece)[tuple(map(slice, low, high))]


def _on_host(value: Any) -> Array:
    return np.asarray(without_keys(value))
