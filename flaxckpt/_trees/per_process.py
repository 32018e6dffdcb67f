"""Values that each process has for itself, such as the state of a data iterator.

The store has one array of bytes for such a leaf, with a row for each process: the
number of bytes of the value, as a 64-bit integer, and then the bytes.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from flaxckpt._trees.integers import int_of
from flaxckpt._trees.leaf import Leaf, without_keys
from flaxckpt._trees.owned_shards import as_array

_LENGTH = np.dtype("<i8")


def encoded(leaf: Leaf, value: Any) -> bytes:
    """Return a value's row, without padding."""
    array = np.asarray(as_array(without_keys(value)))
    if leaf.kind == "int":  # the processes may have small ones and large ones
        number = int_of(array)
        size = max(8, number.bit_length() // 8 + 1)
        content = number.to_bytes(size, "little", signed=True)
    elif leaf.is_bytes:
        content = array.tobytes()
    else:
        content = array.astype(leaf.stored_dtype).tobytes()
    return np.array(len(content), _LENGTH).tobytes() + content


def padded(row: bytes, width: int) -> np.ndarray[Any, Any]:
    """Return a row as u8[1, width]."""
    found = np.zeros((1, width), np.uint8)
    found[0, : len(row)] = np.frombuffer(row, np.uint8)
    return found


def decoded(leaf: Leaf, rows: np.ndarray[Any, Any], process: int) -> Any:
    """Return the value of a process, in the form in which the store has such a leaf.

    Args:
        leaf: The leaf.
        rows: The stored array, u8[processes, width].
        process: The process.

    Raises:
        ValueError: If the row is no value of such a leaf.
    """
    row = np.ascontiguousarray(rows[process])
    size = int(row[: _LENGTH.itemsize].view(_LENGTH)[0])
    content = row[_LENGTH.itemsize :].tobytes()
    if not 0 <= size <= len(content):
        raise ValueError(f"a row of {len(content)} bytes has {size} of them")
    content = content[:size]
    if leaf.kind == "int":
        return int.from_bytes(content, "little", signed=True)
    if leaf.is_bytes:
        return np.frombuffer(content, np.uint8)
    dtype = jnp.dtype(leaf.stored_dtype)
    shape = (*leaf.shape, -1) if leaf.kind == "key" else leaf.shape
    value = np.frombuffer(content, dtype).reshape(shape).copy()
    return value.item() if leaf.kind in ("bool", "float") else value
