"""Integers that int64 does not hold, as the store has them."""

from typing import Any

import numpy as np

_SIZE = 16  # integers of one use, such as a random generator's state, are stored alike


def stored_int(value: int) -> np.ndarray[Any, Any]:
    """Return an integer as u64[], or as u8[16 n], the lowest byte first, and signed."""
    if 0 <= value < 2**64:
        return np.array(value, np.uint64)
    size = _SIZE * (value.bit_length() // (8 * _SIZE) + 1)
    return np.frombuffer(value.to_bytes(size, "little", signed=True), np.uint8)


def int_of(stored: np.ndarray[Any, Any]) -> int:
    """Return the integer that is stored as a scalar or as bytes."""
    if not stored.shape:
        return int(stored)
    return int.from_bytes(stored.tobytes(), "little", signed=True)
