"""Fingerprints of what is saved.

An array that is stored in one chunk has the checksum of that chunk for a digest: XXH3
of 64 bits (https://xxhash.com) of the elements in C order. It can be told only where
the whole array is at hand, at a third of the cost of the other kind.

The other kind does not depend on how an array is sharded. Its bits are taken in
words of 64 bits along its last axis. Its digest is the sum, modulo 2**64, of the words,
each plus its own upper half, and each times a coefficient that depends on the word's
index: the product, over the axes, of an odd pseudo-random number for the index along
that axis. Where an element has 64 bits, its upper half comes in by exclusive or
instead. So

- it is linear in the words' elements: pieces can be digested wherever they are, in
  any order, and added up, and what of a word another piece has counts as zero;
- a change of a single element always shows: the coefficients are odd, and so have an
  inverse modulo 2**64, and the upper half reaches the lower bits;
- several changes cancel by chance only (multilinear hashing; Carter and Wegman 1979),
  also where elements change places. It finds faults of disks and programs, and is no
  protection against somebody who wants to deceive.

numpy computes it at some 10 GB/s for any dtype, without the interpreter's lock.

Format 1 took each element for a word; its digests, which have no mark before them, can
still be computed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import xxhash

from flaxckpt._runtime.unchecked import unchecked_pool
from flaxckpt._trees.digest_formula import blockwise, by_elements, by_words
from flaxckpt._trees.leaf import without_keys
from flaxckpt._trees.owned_shards import Piece, as_array, pieces

_THREADS = 2
_MARK = "2:"  # before a digest; those of format 1 have none
_WHOLE = "3:"  # before a checksum of the whole


def digests(values: Sequence[Any]) -> list[str]:
    """Digest leaves: arrays of JAX or numpy, and Python scalars.

    Args:
        values: The leaves. Of JAX arrays, the shards on this process's devices are
            digested, one of each set of replicas.

    Returns:
        A mark of the formula, and 16 hexadecimal digits, for each.
    """
    with unchecked_pool(_THREADS, "flaxckpt-digest") as pool:
        return list(pool.map(digest, values))


def agree(values: Sequence[Any], found: Sequence[str]) -> list[bool]:
    """Tell for each leaf whether it has the digest that was recorded for it."""
    with unchecked_pool(_THREADS, "flaxckpt-digest") as pool:
        return list(pool.map(agrees, values, found))


def digest(value: Any) -> str:
    """Digest one leaf; see `digests`."""
    return f"{_MARK}{combined(pieces(value)):016x}"


def checksum(value: Any) -> str:
    """Return the checksum of a leaf's elements, all of which have to be here."""
    array = np.ascontiguousarray(as_array(without_keys(value)))
    return xxhash.xxh3_64_hexdigest(array.reshape(-1).view(np.uint8).data)


def digest_of(checksum: str) -> str:
    """Make a digest of the checksum of the whole."""
    return f"{_WHOLE}{checksum}"


def checksum_in(digest: str) -> str | None:
    """Return the checksum of the whole, if a digest is made of one."""
    return digest.removeprefix(_WHOLE) if digest.startswith(_WHOLE) else None


class Digest:
    """The digest of an array whose pieces come one by one."""

    def __init__(self) -> None:
        """Begin with none."""
        self._sum = 0

    def blocks(
        self, piece: np.ndarray[Any, Any], starts: Sequence[int]
    ) -> Iterator[np.ndarray[Any, Any]]:
        """Take in a piece, and yield each block of its memory, in the cache by then.

        Args:
            piece: The piece, contiguous.
            starts: Where in the array it begins.
        """
        self._sum += yield from blockwise(piece, starts)

    def add(self, total: int) -> None:
        """Take in pieces that were digested elsewhere."""
        self._sum += total

    @property
    def total(self) -> int:
        """The sum over the pieces that have come so far, modulo 2**64."""
        return self._sum % 2**64

    @property
    def text(self) -> str:
        """A mark of the formula, and 16 hexadecimal digits."""
        return f"{_MARK}{self.total:016x}"


def agrees(value: Any, found: str) -> bool:
    """Tell whether a leaf has the digest that was recorded for it."""
    whole = checksum_in(found)
    if whole is not None:
        return checksum(value) == whole
    return is_sum(part_of(value, found), found)


def part_of(value: Any, found: str) -> int:
    """Digest what of an array this process has, as a number.

    Args:
        value: The array.
        found: What was recorded, which tells the formula. There is none for parts
            where it is a checksum of the whole, and then no sum is what was recorded.
    """
    by = by_words if found.startswith(_MARK) else by_elements
    return combined(pieces(value), by=by)


def is_sum(total: int, found: str) -> bool:
    """Tell whether the parts of all processes add up to what was recorded."""
    return f"{total % 2**64:016x}" == found.removeprefix(_MARK)


def combined(
    pieces: Iterable[Piece],
    by: Callable[[np.ndarray[Any, Any], Sequence[int]], int] = by_words,
) -> int:
    """Add up the digests of the pieces of an array.

    Args:
        pieces: Where in the array each begins, and its elements.
        by: The formula.

    Returns:
        The digest of the whole, if the pieces cover it once.
    """
    return sum(by(piece, starts) for starts, piece in pieces) % 2**64
