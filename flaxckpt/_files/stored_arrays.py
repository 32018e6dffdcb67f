"""Arrays that a file stores under joined names, as a tree of nested dicts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flaxckpt._files.foreign_tree import (
    ForeignTree,
    check_depth,
    is_numeric,
    kind_of,
    reading,
)
from flaxckpt._runtime.failures import listed
from flaxckpt._trees.layout import Layout
from flaxckpt._trees.leaf import Leaf
from flaxckpt._trees.structure import structure_of
from flaxckpt._trees.ties import PyTree, flatten
from flaxckpt._trees.wanted import Wanted
from flaxckpt.errors import CheckpointError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class StoredArray:
    """An array in a file.

    Attributes:
        file: The file.
        dtype: Name of its dtype; of one that JAX does not know, any text.
        shape: Its shape.
        read: Reads the part at an index, which is `...` for the whole, into an array
            that nothing else refers to.
        has_parts: Whether it reads no more than the part.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[Any], Array]
    has_parts: bool = True


def tree_of(
    path: Path, arrays: Mapping[str, StoredArray], separator: str, like: PyTree
) -> ForeignTree:
    """Return arrays as a tree: `a.b` becomes `b` in the dict `a`.

    A name that is a path of `like` is that path, whatever separators are in its keys.
    If one name is the beginning of another, as `a` is of `a.b`, no name is split. So
    the keys on the path to an array always make its name again.

    Args:
        path: The file, for errors.
        arrays: The arrays, by their names.
        separator: What separates the keys in a name.
        like: The wanted tree.

    Raises:
        CheckpointError: If the file has dtypes that JAX does not know; names the
            arrays.
    """
    unknown = [name for name, each in arrays.items() if not is_numeric(each.dtype)]
    if unknown:
        shown = [f"{name} ({arrays[name].dtype})" for name in unknown]
        raise CheckpointError(
            f"{str(path)!r} has arrays of dtypes that JAX does not have, or that the "
            f"file does not tell: {listed(shown)}. Convert them with the library that "
            "wrote them. A .safetensors file keeps bfloat16 and float8."
        )
    with reading(path):
        tree = _nested(arrays, separator, like)
        check_depth(tree)
    flat = flatten(tree)
    structure = structure_of(flat, tree)
    ordered = [arrays[name] for name in flat.leaves]
    leaves = [
        Leaf(keys, kind_of(array.dtype), array.dtype, array.shape)
        for keys, array in zip(structure.paths, ordered, strict=True)
    ]

    def read(index: int, want: Wanted) -> Any:
        array = ordered[index]
        with reading(array.file):
            is_same = (want.leaf.kind, want.leaf.dtype) == ("jax", array.dtype)
            if want.sharding is None or not (is_same and array.has_parts):
                return array.read(...)
            return jax.make_array_from_callback(
                array.shape, want.sharding, array.read, dtype=array.dtype
            )

    return ForeignTree(Layout(structure.skeleton, tuple(leaves)), read)


def _nested(names: Mapping[str, Any], separator: str, like: PyTree) -> PyTree:
    """Nest names in dicts; the leaves are the names."""
    asked = structure_of(flatten(like), like).paths
    known = {separator.join(keys): keys for keys in asked}
    tree: dict[str, Any] = {}
    for name in names:
        *above, last = known.get(name) or name.split(separator)
        node: Any = tree
        for key in above:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                return {name: name for name in names}
        if last in node:
            return {name: name for name in names}
        node[last] = name
    return tree
