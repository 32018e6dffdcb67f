"""Safetensors files: one, or several with an index as Hugging Face writes them."""

import functools
import json
import os
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from flaxckpt._decision.logs import has_surrogates
from flaxckpt._direct.zarr import aligned
from flaxckpt._disk.open import NoFileError, is_inside, open_file, read_small
from flaxckpt._files.foreign_tree import ForeignTree, reading
from flaxckpt._files.library import library
from flaxckpt._files.outgoing import (
    Outgoing,
    arrays_of,
    divided,
    named_leaves,
)
from flaxckpt._files.stored_arrays import Array, StoredArray, tree_of
from flaxckpt._trees.ties import PyTree

SUFFIX = ".safetensors"
INDEX = ".index.json"  # after the name of the file that the shards stand for
IN_DIRECTORY = "model.safetensors"  # the name that a directory is searched for
_SEPARATOR = "."
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
_METADATA = "__metadata__"  # what the header has under this name is no array


def is_head(head: bytes, size: int) -> bool:
    """Tell whether a file of `size` bytes that begins like this is of this format."""
    return head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= size - 8


def entry_of(path: Path) -> Path | None:
    """Return the file or index that a path leads to; None if there is none."""
    # These tell False, too, for a name that is too long.
    wanted = path / IN_DIRECTORY if os.path.isdir(path) else path
    index = wanted.with_name(wanted.name + INDEX)
    return next((each for each in (wanted, index) if os.path.isfile(each)), None)


def read(path: Path, like: PyTree) -> ForeignTree:
    """Describe the arrays of a file, or of the files that an index names."""
    arrays: dict[str, StoredArray] = {}
    if not path.name.endswith(INDEX):
        return tree_of(path, _arrays_in(path), _SEPARATOR, like)
    for name, names in _shards_of(path).items():
        shard = path.with_name(name)
        held = _arrays_in(shard)
        with reading(shard):
            missing = [each for each in names if each not in held]
            if missing:
                raise NoFileError(f"{missing[0]} is missing, which {path.name} names")
        arrays |= {each: held[each] for each in names}
    return tree_of(path, arrays, _SEPARATOR, like)


def _shards_of(index: Path) -> dict[str, list[str]]:
    """Return the names of the arrays in each file that an index names."""
    shards: dict[str, list[str]] = {}
    with reading(index):
        for name, file in json.loads(read_small(index))["weight_map"].items():
            if not is_inside(file):
                raise NoFileError(f"{file!r} is outside of its directory")
            shards.setdefault(file, []).append(name)
    return shards


def _arrays_in(file: Path) -> dict[str, StoredArray]:
    """Describe the arrays of one file; its header tells where they are.

    The library checks the header. Its numpy arrays lack float8, so the arrays are views
    of the mapped file.
    """
    safetensors = library("safetensors", "safetensors", file)
    with reading(file):
        os.close(open_file(file))
        with safetensors.safe_open(file, "np") as opened:
            names: list[str] = opened.keys()
        content = np.memmap(file, np.uint8, "r")
        begin = 8 + int.from_bytes(content[:8].tobytes(), "little")
        header = json.loads(content[8:begin].tobytes())
        described = {name: header[name] for name in names}
        return {
            name: StoredArray(
                file,
                _DTYPES.get(each["dtype"]) or f"{each['dtype']} of safetensors",
                tuple(each["shape"]),
                functools.partial(_part, content[begin:], each),
            )
            for name, each in described.items()
        }


def _part(content: Array, described: dict[str, Any], at: Any) -> Array:
    """Copy a part out of a mapped file, into memory that JAX takes over as it is."""
    first, last = described["data_offsets"]
    whole = content[first:last].view(jnp.dtype(_DTYPES[described["dtype"]]))
    part = whole.reshape(described["shape"])[at]
    values = aligned(part.shape, part.dtype)
    values[...] = part
    return values


def write(
    outgoing: Outgoing, directory: Path, name: str, max_shard_bytes: int | None
) -> None:
    """Write a tree to one file, or to shards and an index, in an empty directory.

    Raises:
        UnsupportedLeafError: If the format cannot hold a leaf.
        OSError: If a file cannot be written.
    """
    safetensors = library("safetensors", "safetensors", name)
    numpy = library("safetensors.numpy", "safetensors", name)
    leaves = named_leaves(outgoing, _SEPARATOR, _problem)
    shards = list(divided(leaves, max_shard_bytes))
    names = [name]
    if len(shards) > 1:
        stem, number = name.removesuffix(SUFFIX), len(shards)
        names = [f"{stem}-{i:05}-of-{number:05}{SUFFIX}" for i in range(1, number + 1)]
    for file, shard in zip(names, shards, strict=True):
        try:
            numpy.save_file(
                arrays_of(outgoing, shard), directory / file, {"format": "flax"}
            )
        except safetensors.SafetensorError as error:  # such as a full disk
            raise OSError(str(error)) from error
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(each.nbytes for each in leaves)},
            "weight_map": {
                each.name: file
                for file, shard in zip(names, shards, strict=True)
                for each in shard
            },
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (directory / f"{name}{INDEX}").write_text(text)


def _problem(name: str, dtype: str) -> str:
    if dtype not in _DTYPES.values():
        return f"is of dtype {dtype}, which safetensors files cannot hold"
    if name == _METADATA or has_surrogates(name):
        return f"has a name that safetensors files cannot hold, {name!r}. Rename a key"
    return ""


def is_shard_of(file: str, name: str) -> bool:
    """Tell whether a file's name is that of a shard of `name`."""
    stem = re.escape(name.removesuffix(SUFFIX))
    return (
        re.fullmatch(rf"{stem}-\d{{5}}-of-\d{{5}}{re.escape(SUFFIX)}", file) is not None
    )
