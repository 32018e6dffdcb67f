"""Keras's `.weights.h5` and `.keras` files, which are read by h5py.

Only a Keras model knows which variable is which, so this reads the arrays under the
names that they have in the file, and writes none.
"""

import functools
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from flaxckpt._disk.open import NoFileError, open_file
from flaxckpt._files.foreign_tree import ForeignTree, reading
from flaxckpt._files.library import library
from flaxckpt._files.stored_arrays import Array, StoredArray, tree_of
from flaxckpt._trees.ties import PyTree

SUFFIXES = (".h5", ".keras")
HEAD = b"\x89HDF\r\n\x1a\n"
WEIGHTS = "model.weights.h5"  # in a `.keras` file, which is a zip file
_SEPARATOR = "/"


def read(path: Path, like: PyTree) -> ForeignTree:
    """Describe the arrays of a file; each is read when it is asked for."""
    h5py = library("h5py", "keras", path)
    with reading(path):
        os.close(open_file(path))
        content: Any = path
        if zipfile.is_zipfile(path):
            content = zipfile.ZipFile(path).open(WEIGHTS)
        file = h5py.File(content, "r")
        try:
            found = dict(_below(h5py, file, ""))
        except BaseException:
            file.close()  # the error's traceback would hold it open
            raise
        arrays = {name: _described(path, dataset) for name, dataset in found.items()}
    return tree_of(path, arrays, _SEPARATOR, like)


def _below(h5py: Any, group: Any, above: str) -> Iterator[tuple[str, Any]]:
    """Yield all datasets below a group, with their names.

    Raises:
        NoFileError: If one is in another file: HDF5 would open any.
    """
    for key in group:
        name = f"{above}{key}"
        link = group.get(key, getlink=True)
        node: Any = group[key] if isinstance(link, h5py.HardLink) else None
        if isinstance(node, h5py.Group):
            yield from _below(h5py, node, f"{name}{_SEPARATOR}")
        elif isinstance(node, h5py.Dataset) and not (node.is_virtual or node.external):
            yield name, node
        else:
            raise NoFileError(f"{name} is no array in this file")


def _described(path: Path, dataset: Any) -> StoredArray:
    dtype = dataset.dtype.name
    if dataset.dtype.kind == "V":  # Keras stores bfloat16 so, and says it beside
        dtype = str(dataset.attrs.get("dtype", dtype))
    read = functools.partial(_read, dataset, dtype)
    return StoredArray(path, dtype, dataset.shape, read)


def _read(dataset: Any, dtype: str, at: Any) -> Array:
    stored = np.asarray(dataset[at])
    native = stored.astype(stored.dtype.newbyteorder("="), copy=False)
    return native.view(jnp.dtype(dtype)) if native.dtype.kind == "V" else native
