"""Parse and check the `zarr.json` of an array, and the file of all text leaves."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flaxckpt._disk.fields import (
    fail,
    list_in,
    mapping_in,
    parse_json,
    shape_in,
    shown,
    text_in,
)

_CHUNKS = 2**24  # the most chunks of one array


@dataclass(frozen=True)
class Zarr:
    """What a `zarr.json` says of an array.

    Attributes:
        shape: The array's shape.
        chunk: The shape of its chunks, positive and no larger than `shape`.
        dtype: Name of its dtype.
        separator: The character between the numbers in the name of a chunk.
        codecs: How a chunk is encoded, as JSON.
    """

    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: str
    separator: str
    codecs: list[dict[str, Any]]


def parse_zarr(data: bytes) -> Zarr:
    """Parse a `zarr.json`.

    Raises:
        MalformedError: If it is none, or describes an array that cannot exist.
    """
    fields = mapping_in(parse_json(data), "zarr.json")
    if fields.get("zarr_format") != 3 or fields.get("node_type") != "array":
        fail("it is no array of Zarr 3")
    shape = shape_in(fields, "shape")
    grid = mapping_in(fields.get("chunk_grid"), "chunk_grid")
    if grid.get("name") != "regular":
        fail("its chunk_grid is not regular")
    setting = mapping_in(grid.get("configuration"), "chunk_grid")
    chunk = _chunk_of(shape, setting)
    keys = mapping_in(fields.get("chunk_key_encoding"), "chunk_key_encoding")
    if keys.get("name") != "default":
        fail("its chunk_key_encoding is not the default")
    setting = mapping_in(keys.get("configuration", {}), "chunk_key_encoding")
    separator = setting.get("separator", "/")
    if separator not in ("/", "."):
        fail(f"its separator is {shown(separator)}")
    codecs = _codecs(fields, chunk)
    return Zarr(shape, chunk, text_in(fields, "data_type"), separator, codecs)


def parse_texts(data: bytes) -> dict[str, str]:
    """Parse the file of all text leaves; return the texts by the leaves' names."""
    texts = mapping_in(parse_json(data), "the texts")
    for value in texts.values():
        if type(value) is not str:
            fail(f"a text is {shown(value)}")
    return texts


def _chunk_of(shape: tuple[int, ...], setting: Mapping[str, Any]) -> tuple[int, ...]:
    """Check the shape of the chunks of an array, or of the parts of a chunk."""
    chunk = shape_in(setting, "chunk_shape")
    pairs = list(zip(shape, chunk, strict=False))
    if (
        len(chunk) != len(shape)
        or not all(0 < part <= max(size, 1) for size, part in pairs)
        or math.prod(-(-size // part) for size, part in pairs) > _CHUNKS
    ):
        fail(f"an array of shape {shown(shape)} has chunks of {shown(chunk)}")
    return chunk


def _codecs(fields: Mapping[str, Any], chunk: tuple[int, ...]) -> list[dict[str, Any]]:
    found = list_in(fields, "codecs")
    for codec in found:
        mapping_in(codec, "a codec")
        setting = mapping_in(codec.get("configuration", {}), "a codec")
        if text_in(codec, "name") == "sharding_indexed":
            _codecs(setting, _chunk_of(chunk, setting))
            for each in list_in(setting, "index_codecs"):
                mapping_in(each, "a codec")
    return found
