"""Many small values packed into a few arrays, bit for bit.

Each operand costs a callback some 40 microseconds, so `_program.stream` packs what it
hands over. `plan` takes the sizes and dtypes from here; `programs` packs for itself.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SMALL_BYTES = 64 * 2**10  # arrays up to this size are packed
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# XLA may change the bits of other dtypes where it joins arrays, or fail.
PACKED = frozenset(
    [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
    + ["bool", "bfloat16", "float16", "float32", "float64"]
)


class Packing:
    """Packs values in a program, and unpacks them on the host.

    Small values whose elements have the same size are joined into one array of words.
    """

    def __init__(self, values: Sequence[jax.Array]) -> None:
        """Group the values.

        Args:
            values: Arrays, traced values, or `jax.ShapeDtypeStruct`s.
        """
        self._kinds = [(value.shape, np.dtype(value.dtype)) for value in values]
        self._alone: list[int] = []
        self._groups: dict[int, list[int]] = {}
        for index, (shape, dtype) in enumerate(self._kinds):
            if _is_part_of_byte(dtype):
                self._alone.append(index)
                continue
            small = math.prod(shape) * dtype.itemsize <= SMALL_BYTES
            if small and dtype.name in PACKED:
                self._groups.setdefault(dtype.itemsize, []).append(index)
            else:
                self._alone.append(index)

    def pack(self, values: Sequence[jax.Array]) -> list[jax.Array]:
        """Join the small values, in a program; the others follow, one by one."""
        packs = [
            jnp.concatenate([_words(values[index]) for index in indices])
            for indices in self._groups.values()
        ]
        return packs + [_in_bytes(values[index]) for index in self._alone]

    def unpack(self, arrays: Sequence[Any]) -> list[np.ndarray[Any, Any]]:
        """Return the values in order, most of them as views of the packed arrays."""
        found: dict[int, np.ndarray[Any, Any]] = {}
        taken = iter(arrays)
        for indices in self._groups.values():
            words, at = np.asarray(next(taken)), 0
            for index in indices:
                shape, dtype = self._kinds[index]
                size = math.prod(shape)
                found[index] = words[at : at + size].view(dtype).reshape(shape)
                at += size
        for index in self._alone:
            found[index] = np.asarray(next(taken))
            dtype = self._kinds[index][1]
            if _is_part_of_byte(dtype):
                found[index] = found[index].astype(dtype)
        return [found[index] for index in range(len(self._kinds))]


def _is_part_of_byte(dtype: Any) -> bool:
    """Tell whether elements are narrower than a byte: XLA packs several into one."""
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits < 8
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 8


def _in_bytes(value: jax.Array) -> jax.Array:
    """Widen elements narrower than a byte, exactly, so that the host can read them."""
    dtype = value.dtype
    if not _is_part_of_byte(dtype):
        return value
    if jnp.issubdtype(dtype, jnp.floating):
        return value.astype(jnp.bfloat16)
    is_signed = jnp.issubdtype(dtype, jnp.signedinteger)
    return value.astype(jnp.int8 if is_signed else jnp.uint8)


def _words(value: jax.Array) -> jax.Array:
    flat = jnp.asarray(value).reshape(-1)
    if flat.dtype == jnp.bool_:
        return flat.astype(jnp.uint8)
    return jax.lax.bitcast_convert_type(flat, _WORDS[flat.dtype.itemsize])
