"""The parts of a leaf that this process stores, as pieces on the host."""

from typing import Any, TypeAlias

import jax
import numpy as np

from flaxckpt._trees.leaf import without_keys

Piece: TypeAlias = tuple[tuple[int, ...], np.ndarray[Any, Any]]
"""Where in its array a piece begins, and its elements."""


def is_shared(value: Any) -> bool:
    """Tell whether a leaf is an array of several processes."""
    return not getattr(value, "is_fully_addressable", True)


def pieces(value: Any) -> list[Piece]:
    """Return this process's pieces of a leaf, on the host.

    They are the shards whose first replica is on this process, so that each shard is a
    piece of exactly one process. A leaf that is no JAX array is a single piece.
    """
    value = without_keys(value)
    if isinstance(value, jax.Array):
        return [
            (_start(shard, value), np.asarray(shard.data))
            for shard in value.addressable_shards
            if shard.replica_id == 0
        ]
    array = as_array(value)
    return [((0,) * array.ndim, array)]


def shards(value: Any) -> list[tuple[tuple[int, ...], Any]]:
    """Return all shards that this process has, where `pieces` has first replicas.

    A shard of a JAX array stays on its device.
    """
    value = without_keys(value)
    if not isinstance(value, jax.Array):
        return [*pieces(value)]
    return [(_start(shard, value), shard.data) for shard in value.addressable_shards]


def _start(shard: jax.Shard, value: jax.Array) -> tuple[int, ...]:
    pairs = zip(shard.index, value.shape, strict=True)
    return tuple(part.indices(size)[0] for part, size in pairs)


def as_array(value: Any) -> np.ndarray[Any, Any]:
    """Return a leaf other than a key as an array; a text becomes its bytes."""
    if isinstance(value, str):
        value = value.encode("utf-8", "surrogatepass")
    if isinstance(value, bytes):
        return np.frombuffer(value, np.uint8)
    return np.asarray(value)
