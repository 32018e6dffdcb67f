"""numpy's `.npz` files. Nothing is ever unpickled."""

import functools
import math
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from flaxckpt._decision.logs import has_surrogates
from flaxckpt._disk.open import NoFileError, open_file
from flaxckpt._files.foreign_tree import ForeignTree, is_numeric, reading
from flaxckpt._files.outgoing import (
    Outgoing,
    arrays_of,
    divided,
    named_leaves,
)
from flaxckpt._files.stored_arrays import Array, StoredArray, tree_of
from flaxckpt._trees.ties import PyTree

SUFFIX = ".npz"
_SEPARATOR = "/"
_MEMBER = ".npy"
_BATCH_BYTES = 256 * 2**20  # that are read at once; one array may have more
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def is_list(names: list[str]) -> bool:
    """Tell whether a zip file with members of these names is of this format."""
    return bool(names) and all(name.endswith(_MEMBER) for name in names)


def read(path: Path, like: PyTree) -> ForeignTree:
    """Describe the arrays of a file; each is read when it is asked for."""
    with reading(path):
        os.close(open_file(path))
        members = zipfile.ZipFile(path)
        arrays = {
            each.filename.removesuffix(_MEMBER): _described(path, members, each)
            for each in members.infolist()
        }
    return tree_of(path, arrays, _SEPARATOR, like)


def _described(
    path: Path, members: zipfile.ZipFile, member: zipfile.ZipInfo
) -> StoredArray:
    with members.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise NoFileError(f"{member.filename} is of version {version}")
        shape, _, dtype = _HEADERS[version](file)
        nbytes = dtype.itemsize * math.prod(shape)
        if not dtype.hasobject and file.tell() + nbytes != member.file_size:
            raise NoFileError(f"{member.filename} has not the size of its array")
    read = functools.partial(_read, members, member)
    return StoredArray(path, dtype.name, shape, read, has_parts=False)


def _read(members: zipfile.ZipFile, member: zipfile.ZipInfo, _: Any) -> Array:
    with members.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def write(outgoing: Outgoing, file: Path) -> None:
    """Write a tree to a file as `numpy.savez` does, with few arrays in memory.

    Raises:
        UnsupportedLeafError: If the format cannot hold a leaf.
        OSError: If the file cannot be written.
    """
    leaves = named_leaves(outgoing, _SEPARATOR, _problem)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as members:
        for group in divided(leaves, _BATCH_BYTES):
            for name, array in arrays_of(outgoing, group).items():
                with members.open(name + _MEMBER, "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)


def _problem(name: str, dtype: str) -> str:
    if not (is_numeric(dtype) and np.dtype(dtype).isbuiltin == 1):
        return f"is of dtype {dtype}, which .npz files cannot hold"
    if "\0" in name or has_surrogates(name):
        return f"has a name that .npz files cannot hold, {name!r}. Rename a key"
    return ""
