"""Fingerprints of saved leaves.

There are two kinds. `xxh3:` is the digest of an array in one chunk, and is the checksum
of that chunk: the 64-bit XXH3 (https://xxhash.com) of the elements in C order. It needs
the whole array, and costs a third of the other kind.

`sum:`, the other kind, does not depend on how an array is sharded. It takes the array's
bits in words of 64 bits along the last axis. To each word it adds the word's own upper
half. If an element has 64 bits or more, it combines the two by exclusive or instead. It
then multiplies each word by a coefficient for the word's index, and sums modulo 2**64.
The coefficient is the product, over the axes, of an odd pseudo-random number for the
index along that axis. So

- the digest is linear in the elements of a word: pieces can be digested anywhere and in
  any order, and added up. A piece counts the elements of other pieces as zero;
- a change of a single element always shows: the coefficients are odd, and so have an
  inverse modulo 2**64, and the upper half of a word reaches the lower bits;
- several changes cancel only by chance (multilinear hashing; Carter and Wegman 1979),
  even where elements change places. So the digest finds faults of disks and programs.
  It does not protect against somebody who wants to deceive.

numpy computes it at some 10 GB/s for any dtype, without the interpreter's lock.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import xxhash

from flaxckpt._runtime.unchecked import unchecked_pool
from flaxckpt._trees.digest_formula import blockwise, by_words
from flaxckpt._trees.leaf import without_keys
from flaxckpt._trees.owned_shards import Piece, as_array, pieces

_THREADS = 2
# What a digest begins with, by its kind.
_WHOLE, _SUM = "xxh3:", "sum:"


def digests(values: Sequence[Any]) -> list[str]:
    """Digest leaves: arrays of JAX or numpy, and Python scalars.

    Args:
        values: The leaves. Of a JAX array of several processes, this process digests
            the shards whose first replica is on its devices.

    Returns:
        For each leaf, its digest: "sum:" and 16 hexadecimal digits.
    """
    with unchecked_pool(_THREADS, "flaxckpt-digest") as pool:
        return list(pool.map(digest, values))


def agree(values: Sequence[Any], found: Sequence[str]) -> list[bool]:
    """Tell for each leaf whether it has the digest that was recorded for it."""
    with unchecked_pool(_THREADS, "flaxckpt-digest") as pool:
        return list(pool.map(agrees, values, found))


def digest(value: Any) -> str:
    """Digest one leaf; see `digests`."""
    return digest_of_sum(sum_here(value))


def sum_here(value: Any) -> int:
    """Return the sum over this process's pieces of a leaf, a part of its digest."""
    return combined(pieces(value))


def checksum(value: Any) -> str:
    """Return the checksum of a leaf, which this process must hold as a whole."""
    array = np.ascontiguousarray(as_array(without_keys(value)))
    return xxhash.xxh3_64_hexdigest(array.reshape(-1).view(np.uint8).data)


def as_digest(checksum: str) -> str:
    """Make a digest from the checksum of a whole array."""
    return f"{_WHOLE}{checksum}"


def digest_of_sum(total: int) -> str:
    """Make a digest from the sum over the pieces of an array."""
    return f"{_SUM}{total % 2**64:016x}"


def checksum_in(digest: str) -> str | None:
    """Return the checksum of a whole array from its digest; None for another digest."""
    return digest.removeprefix(_WHOLE) if digest.startswith(_WHOLE) else None


class Digest:
    """The digest of an array whose pieces come one by one."""

    def __init__(self) -> None:
        """Begin with no pieces."""
        self._sum = 0

    def blocks(
        self, piece: np.ndarray[Any, Any], starts: Sequence[int]
    ) -> Iterator[np.ndarray[Any, Any]]:
        """Add a piece, and yield each block of its memory while that is in the cache.

        Args:
            piece: The piece, contiguous.
            starts: Where in the array the piece begins.
        """
        self._sum += yield from blockwise(piece, starts)

    @property
    def total(self) -> int:
        """The sum over the pieces so far, modulo 2**64."""
        return self._sum % 2**64

    @property
    def text(self) -> str:
        """The digest: "sum:" and 16 hexadecimal digits."""
        return digest_of_sum(self._sum)


def agrees(value: Any, found: str) -> bool:
    """Tell whether a leaf has the digest that was recorded for it."""
    whole = checksum_in(found)
    if whole is not None:
        return checksum(value) == whole
    return is_sum(sum_here(value), found)


def is_sum(total: int, found: str) -> bool:
    """Tell whether the sum over the pieces of an array is its recorded digest.

    No sum is the checksum of a whole array.
    """
    return digest_of_sum(total) == found


def combined(pieces: Iterable[Piece]) -> int:
    """Add up the digests of the pieces of an array.

    Args:
        pieces: Where in the array each piece begins, and its elements.

    Returns:
        The sum modulo 2**64: the digest of the array, if the pieces cover it once.
    """
    return sum(by_words(piece, starts) for starts, piece in pieces) % 2**64
