"""Fingerprints of arrays that do not depend on how they are sharded.

The digest of an array is the sum, modulo 2**64, of its elements' bits, each times a
coefficient that depends on the element's index: the product, over the axes, of an odd
pseudo-random number for the index along that axis. So

- pieces can be digested wherever they are, in any order, and added up;
- a change of a single element always shows: the coefficients are odd, and so have an
  inverse modulo 2**64;
- several changes cancel by chance only (multilinear hashing; Carter and Wegman 1979),
  also where elements change places. It finds faults of disks and programs, and is no
  protection against somebody who wants to deceive.

numpy computes it at some 5 GB/s for 4-byte elements, without the interpreter's lock.
"""

import functools
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Words: TypeAlias = np.ndarray[Any, np.dtype[np.uint64]]
Index: TypeAlias = tuple[slice, ...]

_CHUNK = 1 << 16  # elements of the longest axis that are digested at a time
_SHORT = 64  # a last axis shorter than this is not worth a pass of its own
_SMALL = 1 << 14  # elements of an array whose coefficients are all kept
_THREADS = 2


def digests(values: Sequence[Any]) -> list[str]:
    """Digest leaves: arrays of JAX or numpy, and Python scalars.

    Args:
        values: The leaves. Of JAX arrays, the shards on this process's devices are
            digested, one of each set of replicas.

    Returns:
        16 hexadecimal digits for each.
    """
    with ThreadPoolExecutor(_THREADS, "flaxckpt-digest") as pool:
        return list(pool.map(lambda value: f"{digest(value):016x}", values))


def digest(value: Any) -> int:
    """Digest one leaf; see `digests`."""
    if isinstance(value, jax.Array):
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        pieces = [
            (shard.index, np.asarray(shard.data))
            for shard in value.addressable_shards
            if shard.replica_id == 0
        ]
        return combined(pieces, value.shape)
    array = _as_array(value)
    return combined([((slice(None),) * array.ndim, array)], array.shape)


def combined(
    pieces: Iterable[tuple[Index, np.ndarray[Any, Any]]], shape: tuple[int, ...]
) -> int:
    """Add up the digests of the pieces of an array.

    Args:
        pieces: Where in the array each lies, and its elements.
        shape: The whole array's.

    Returns:
        The digest of the whole, if the pieces cover it once.
    """
    total = 0
    for index, piece in pieces:
        starts = [
            part.indices(size)[0] for part, size in zip(index, shape, strict=True)
        ]
        total += _digest_piece(_words(piece), starts)
    return total % 2**64


def _digest_piece(words: np.ndarray[Any, Any], starts: list[int]) -> int:
    """Contract a piece with the coefficients of its axes, the longest axis first."""
    if words.size <= _SMALL and not any(starts):
        return int(np.vdot(words.reshape(-1), _all_coefficients(words.shape)))
    starts = starts + [0] * (words.ndim - len(starts))  # complex128 has an axis more
    axes = list(range(words.ndim))  # which axis of the array each remaining one is
    while words.ndim:
        axis = words.ndim - 1
        if words.shape[axis] < _SHORT:
            axis = int(np.argmax(words.shape))
        words = _contract(np.moveaxis(words, axis, -1), axes[axis], starts[axis])
        del axes[axis], starts[axis]
    return int(words)


@functools.lru_cache(maxsize=64)
def _all_coefficients(shape: tuple[int, ...]) -> Words:
    """Coefficients of all elements of a small array, in their order."""
    found = np.ones((), np.uint64)
    for axis, size in enumerate(shape):
        found = np.multiply.outer(found, _low(axis)[:size] * _high(axis, 0))
    return found.reshape(-1)


def _contract(words: np.ndarray[Any, Any], axis: int, start: int) -> Words:
    """Sum over the last axis, times the coefficients for indices from `start` on."""
    size = words.shape[-1]
    total = np.zeros(words.shape[:-1], np.uint64)
    position = 0
    while position < size:
        chunk, offset = divmod(start + position, _CHUNK)
        count = min(size - position, _CHUNK - offset)
        low = _low(axis)[offset : offset + count]
        part = words[..., position : position + count]
        with np.errstate(over="ignore"):  # modulo 2**64 is meant
            total += np.einsum("...i,i->...", part, low) * _high(axis, chunk)
        position += count
    return total


def _words(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the elements' bits as unsigned integers, the high ones folded down.

    The folding lets a change of a high bit reach the low ones, or else changes of two
    highest bits would cancel.
    """
    array = np.asarray(array)
    if array.dtype.itemsize == 16:  # complex128
        array = np.stack([array.real, array.imag], axis=-1)
    words = array.view(f"u{array.dtype.itemsize}")
    return words ^ (words >> np.uint64(32)) if words.dtype == np.uint64 else words


def _as_array(value: Any) -> np.ndarray[Any, Any]:
    if isinstance(value, str):
        value = value.encode("utf-8")
    if isinstance(value, bytes):
        return np.frombuffer(value, np.uint8)
    return np.asarray(value)


@functools.lru_cache(maxsize=8)
def _low(axis: int) -> Words:
    """Coefficients of the indices along an axis within a chunk: odd, pseudo-random."""
    return _mixed(np.arange(_CHUNK, dtype=np.uint64) + np.uint64(axis << 40)) | _ONE


@functools.lru_cache(maxsize=1024)
def _high(axis: int, chunk: int) -> np.uint64:
    """The factor of those coefficients for one chunk: odd, pseudo-random."""
    seed = np.array([chunk + (axis << 40) + (1 << 60)], np.uint64)
    return (_mixed(seed) | _ONE)[0]


_ONE = np.uint64(1)


def _mixed(x: Words) -> Words:
    """Scatter integers over 64 bits: SplitMix64's finalizer (Steele et al. 2014)."""
    # Arrays, not scalars, come here: they wrap around without a warning.
    x = (x + _ONE) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
