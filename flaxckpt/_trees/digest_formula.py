"""The sum behind a digest of parts: words of 64 bits, each times an odd coefficient.

The docstring of `digest` explains the formula.
"""

import functools
import threading
from collections.abc import Generator, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

Words: TypeAlias = np.ndarray[Any, np.dtype[np.uint64]]
_CHUNK = 1 << 16  # indices along an axis that share the factor of `_high`
_BLOCK = 1 << 15  # words that are folded at a time: they stay in the cache
_SHORT = 64  # a last axis shorter than this is not worth a pass of its own
_SMALL = 1 << 14  # words; the coefficients of an array up to this size are kept
_HALF = np.uint64(32)


def by_words(piece: np.ndarray[Any, Any], starts: Sequence[int]) -> int:
    """Digest a piece that begins at `starts` in its array."""
    blocks = blockwise(piece, starts)
    while True:
        try:
            next(blocks)
        except StopIteration as end:
            return end.value


def blockwise(
    piece: np.ndarray[Any, Any], starts: Sequence[int]
) -> Generator[np.ndarray[Any, Any], None, int]:
    """Digest a piece, and yield each block of its memory while that is in the cache.

    Args:
        piece: The piece, contiguous.
        starts: Where in the array the piece begins.

    Yields:
        The contiguous blocks of the piece, in order.

    Returns:
        The digest.
    """
    if not piece.ndim:
        piece, starts = piece.reshape(1), [0]
    words = _words(piece, starts[-1])
    starts = [*starts[:-1], starts[-1] * piece.dtype.itemsize // 8]
    # Pieces that share a word need a linear fold. A word of one element is not shared.
    folding = np.add if piece.dtype.itemsize < 8 else np.bitwise_xor
    if words.size <= _SMALL and not any(starts):
        yield piece
        folded = folding(words, words >> _HALF).reshape(-1)
        return int(np.vdot(folded, _all_coefficients(words.shape)))
    axes = list(range(words.ndim))
    if words.ndim > 1 and words.shape[-1] < _SHORT:
        yield piece
        return _contracted(folding(words, words >> _HALF), axes, starts)
    is_padded = words.nbytes != piece.nbytes
    if is_padded:
        yield piece
    rows = words.reshape(-1, words.shape[-1])
    sums = np.zeros(len(rows), np.uint64)
    coefficients = list(_coefficients(axes[-1], starts[-1], words.shape[-1]))
    step = max(_BLOCK // words.shape[-1], 1)
    for row in range(0, len(rows), step):
        for position, low, high in coefficients:
            block = rows[row : row + step, position : position + len(low)]
            folded = np.right_shift(block, _HALF, out=_memory(block))
            folding(folded, block, out=folded)
            sums[row : row + step] += np.einsum("ij,j->i", folded, low) * high
            if not is_padded and (step == 1 or len(coefficients) == 1):
                yield block
        if not is_padded and step > 1 and len(coefficients) > 1:
            yield rows[row : row + step]
    return _contracted(sums.reshape(words.shape[:-1]), axes[:-1], starts[:-1])


def _memory(block: Words) -> Words:
    """Return memory of this thread for up to `_BLOCK` words, in the block's shape."""
    if not hasattr(_THREAD, "memory"):
        _THREAD.memory = np.empty(_BLOCK, np.uint64)
    return _THREAD.memory[: block.size].reshape(block.shape)


_THREAD = threading.local()


def _contracted(
    words: np.ndarray[Any, Any], axes: Sequence[int], starts: Sequence[int]
) -> int:
    """Contract words with the coefficients of all axes, a long one first.

    Args:
        words: The words.
        axes: The axis of the array for each axis of `words`.
        starts: Where on each of these axes the words begin.
    """
    axes, starts = list(axes), list(starts)
    while words.ndim:
        axis = words.ndim - 1
        if words.shape[axis] < _SHORT:
            axis = int(np.argmax(words.shape))
        words = _contract(np.moveaxis(words, axis, -1), axes[axis], starts[axis])
        del axes[axis], starts[axis]
    return int(words)


def _words(piece: np.ndarray[Any, Any], start: int) -> Words:
    """Return a piece's bits in words along the last axis.

    The piece begins at `start` on that axis. Its first and last word may have elements
    of other pieces, which are zero here.
    """
    piece = np.ascontiguousarray(piece)
    size = piece.dtype.itemsize
    if size >= 8:
        return piece.view(np.uint64)
    each = 8 // size
    before, length = start % each, piece.shape[-1]
    if not before and not length % each:
        return piece.view(np.uint64)
    elements = -(-(before + length) // each) * each
    padded = np.zeros((*piece.shape[:-1], elements), f"u{size}")
    padded[..., before : before + length] = piece.view(f"u{size}")
    return padded.view(np.uint64)


@functools.lru_cache(maxsize=64)
def _all_coefficients(shape: tuple[int, ...]) -> Words:
    """Return the coefficients of all words of a small array, in C order."""
    found = np.ones((), np.uint64)
    for axis, size in enumerate(shape):
        found = np.multiply.outer(found, _low(axis)[:size] * _high(axis, 0))
    return found.reshape(-1)


def _contract(words: np.ndarray[Any, Any], axis: int, start: int) -> Words:
    """Multiply by the coefficients from `start` on, and sum over the last axis."""
    total = np.zeros(words.shape[:-1], np.uint64)
    for position, low, high in _coefficients(axis, start, words.shape[-1]):
        part = words[..., position : position + len(low)]
        with np.errstate(over="ignore"):  # modulo 2**64 is meant
            total += np.einsum("...i,i->...", part, low) * high
    return total


def _coefficients(
    axis: int, start: int, size: int
) -> Iterator[tuple[int, Words, np.uint64]]:
    """Yield the coefficients for `size` indices from `start` on, in runs.

    Yields:
        How many indices after `start` a run begins, the low factors of its
        coefficients, and the high factor that they share.
    """
    position = 0
    while position < size:
        chunk, offset = divmod(start + position, _CHUNK)
        count = min(size - position, _CHUNK - offset, _BLOCK)
        yield position, _low(axis)[offset : offset + count], _high(axis, chunk)
        position += count


@functools.lru_cache(maxsize=8)
def _low(axis: int) -> Words:
    """Return the low factors along an axis within a chunk: odd, pseudo-random."""
    return _mixed(np.arange(_CHUNK, dtype=np.uint64) + np.uint64(axis << 40)) | _ONE


@functools.lru_cache(maxsize=1024)
def _high(axis: int, chunk: int) -> np.uint64:
    """Return the high factor of one chunk of an axis: odd, pseudo-random."""
    seed = np.array([chunk + (axis << 40) + (1 << 60)], np.uint64)
    return (_mixed(seed) | _ONE)[0]


_ONE = np.uint64(1)


def _mixed(x: Words) -> Words:
    """Scatter integers over 64 bits: SplitMix64's finalizer (Steele et al. 2014)."""
    # `x` is an array: unlike a scalar, it wraps around without a warning.
    x = (x + _ONE) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
