"""Zarr 3 as Orbax writes it: each file has one shard, its index, and a checksum.

https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed
"""

import functools
import itertools
import json
import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from flaxckpt._direct.crc32c import crc32c
from flaxckpt._disk.zarr_json import parse_zarr
from flaxckpt._trees.owned_shards import is_shared, pieces

Array: TypeAlias = np.ndarray[Any, Any]
Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
STATE = "state"  # the directory in a checkpoint that holds the tree
DESCRIPTION = "zarr.json"  # of an array, beside its chunks
MANIFEST = "manifest.ocdbt"  # of a database
STRINGS = f"{STATE}/_strings.json"
ARRAYS_METADATA = "array_metadatas"  # Orbax's directory with a file for each process
NUMBERS = ("bool", "int", "float")
_ALIGNMENT = 64  # bytes; JAX on CPU takes over such memory without a copy
_USUAL_BYTES = 4096  # a larger `zarr.json` is not cached, since it may be hostile


@dataclass(frozen=True)
class ZarrArray:
    """How an array is stored: name, `zarr.json`, dtype, and the grid of its chunks.

    Of several processes, each stores some of the chunks (`own_chunks`, with the first
    index of each; None stands for all), and only process 0 has the description.
    """

    name: str
    description: bytes
    dtype: Any
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    separator: str = "/"
    own_chunks: tuple[tuple[int, ...], ...] | None = None

    @property
    def is_one_chunk(self) -> bool:
        """Whether one chunk holds the whole array."""
        return self.shape == self.chunk

    @property
    def chunk_bytes(self) -> int:
        """The size of a chunk's values."""
        return math.prod(self.chunk) * self.dtype.itemsize

    @property
    def description_key(self) -> str:
        """The key of the array's `zarr.json`."""
        return below(self.name, DESCRIPTION)

    def with_keys(self, separator: str) -> "ZarrArray":
        """Return it with chunk files in nested directories (`/`), or in one (`.`)."""
        fields = json.loads(self.description)
        fields["chunk_key_encoding"] = {"name": "default"}
        if separator == ".":
            fields["chunk_key_encoding"]["configuration"] = {"separator": separator}
        description = json.dumps(fields, separators=(",", ":")).encode()
        return replace(self, description=description, separator=separator)

    def keys(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the key of each chunk's file, and the chunk's first index by axis."""
        starts: Iterable[tuple[int, ...]] | None = self.own_chunks
        if starts is None:
            grid = [range(0, size, part) for size, part in zip(self.shape, self.chunk)]  # noqa: B905
            starts = itertools.product(*grid)
        for start in starts:
            number = [str(at // part) for at, part in zip(start, self.chunk)]  # noqa: B905
            yield below(self.name, self.separator.join(["c", *number])), start


class OtherwiseError(Exception):
    """An array is missing, or is stored in another way than is written here."""


UNREADABLE = (
    OtherwiseError,
    OSError,
    KeyError,
    ValueError,
    TypeError,
    AttributeError,  # from JSON that has another value in place of a mapping
)


def dtype_of(value: Any) -> str:
    """Return the dtype in which a leaf is stored; other processes may hold parts."""
    if is_shared(value):
        return str(value.dtype)
    return str(pieces(value)[0][1].dtype)


def parsed(name: str, description: bytes, dtype: str) -> ZarrArray:
    """Parse a `zarr.json`, for values of a dtype.

    Raises:
        OtherwiseError: If it says another dtype, or a way that is not known here.
        MalformedError: If it is no `zarr.json`.
    """
    is_usual = len(description) <= _USUAL_BYTES
    grid = _known_grid if is_usual else _grid
    shape, chunk, separator = grid(description, dtype)
    return ZarrArray(name, description, jnp.dtype(dtype), shape, chunk, separator)


def _grid(
    description: bytes, dtype: str
) -> tuple[tuple[int, ...], tuple[int, ...], str]:
    """Return shape, chunk shape and separator."""
    found = parse_zarr(description)
    codec = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": list(found.chunk),
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            "index_codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "crc32c"},
            ],
        },
    }
    for each in found.codecs:
        setting = each.get("configuration", {})
        setting.pop("index_location", None)
        for inner in setting.get("codecs", ()):  # elements of one byte have no order
            inner.setdefault("configuration", {"endian": "little"})
    pairs = zip(found.shape, found.chunk, strict=True)
    if (
        found.codecs != [codec]
        or any(size % part for size, part in pairs)
        or found.dtype != dtype
    ):
        raise OtherwiseError
    return found.shape, found.chunk, found.separator


# Arrays of one shape share a description.
_known_grid = functools.lru_cache(maxsize=1024)(_grid)


def below(name: str, file: str) -> str:
    """Return the key of a leaf's file; `name` is empty if the leaf is the tree."""
    return f"{name}/{file}" if name else file


def aligned(shape: tuple[int, ...], dtype: Any) -> Array:
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.__array_interface__["data"][0] % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def raw_bytes(array: Array) -> Bytes:
    return array.reshape(-1).view(np.uint8)


@functools.lru_cache(maxsize=256)
def trailer_of(nbytes: int) -> bytes:
    """Return the index behind a chunk: its part's offset and size, and a checksum."""
    index = struct.pack("<QQ", 0, nbytes)
    return index + struct.pack("<I", crc32c(index))
