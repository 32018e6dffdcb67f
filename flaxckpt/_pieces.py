"""What of a leaf this process has, as pieces on the host."""

from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Piece: TypeAlias = tuple[tuple[int, ...], np.ndarray[Any, Any]]
"""Where in an array it begins, and its elements."""


@dataclass
class Shards:
    """Copies, on the host, of the pieces of an array of several processes.

    Attributes:
        sharding: The array's.
        pieces: Those that are here.
    """

    is_fully_addressable: ClassVar[bool] = False
    sharding: jax.sharding.Sharding
    pieces: list[Piece]


def is_shared(value: Any) -> bool:
    """Tell whether a leaf is an array of several processes, or copied from one."""
    return not getattr(value, "is_fully_addressable", True)


def pieces(value: Any) -> list[Piece]:
    """Return the pieces of a leaf that are here, each once, on the host.

    With each, where in the array it begins.
    """
    if isinstance(value, Shards):
        return value.pieces
    if isinstance(value, jax.Array):
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        return [
            (
                tuple(
                    part.indices(size)[0]
                    for part, size in zip(shard.index, value.shape, strict=True)
                ),
                np.asarray(shard.data),
            )
            for shard in value.addressable_shards
            if shard.replica_id == 0
        ]
    array = _as_array(value)
    return [((0,) * array.ndim, array)]


def _as_array(value: Any) -> np.ndarray[Any, Any]:
    if isinstance(value, str):
        value = value.encode("utf-8", "surrogatepass")
    if isinstance(value, bytes):
        return np.frombuffer(value, np.uint8)
    return np.asarray(value)
