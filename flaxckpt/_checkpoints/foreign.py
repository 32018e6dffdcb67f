"""A tree that another library than flaxckpt stored: plain Orbax, or one with files."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from flaxckpt._files.foreign_tree import ForeignTree, kind_of
from flaxckpt._files.formats import read
from flaxckpt._orbax.engine import storable
from flaxckpt._orbax.foreign import host_form, read_foreign, read_leaves, tree_of_forms
from flaxckpt._trees.describe import describe
from flaxckpt._trees.ties import PyTree


def foreign_tree(
    path: Path, like: PyTree, *, weights_only: bool, in_part: bool = False
) -> ForeignTree:
    """Describe what another library stored.

    Args:
        path: The directory of a checkpoint of plain Orbax, or a file.
        like: The wanted tree.
        weights_only: Whether items of plain Orbax that hold no weights may be left out.
        in_part: Whether only some leaves of the tree may be read.
    """
    if path.is_file():
        return read(path, like)
    if in_part and (found := _described(path)) is not None:
        return found
    tree = read_foreign(path, like, weights_only=weights_only)
    layout, values = describe(tree, storable)
    return ForeignTree(layout, lambda index, _: values[index])


def _described(path: Path) -> ForeignTree | None:
    """Describe a tree of plain Orbax whose leaves are read once it is known which.

    None if it has to be read whole.
    """
    forms = jax.tree.leaves(tree := tree_of_forms(path))
    if not forms:
        return None
    stand_ins = list(map(host_form, forms))
    layout, known = describe(
        jax.tree.unflatten(jax.tree.structure(tree), stand_ins), storable
    )
    if len(known) != len(forms):
        return None
    leaves = [
        dataclasses.replace(leaf, kind=kind_of(leaf.dtype))
        if getattr(form, "sharding_metadata", None) is not None
        else leaf
        for leaf, form in zip(layout.leaves, forms, strict=True)
    ]
    values: dict[int, Any] = {}
    return ForeignTree(
        dataclasses.replace(layout, leaves=tuple(leaves)),
        lambda index, _: values[index],
        lambda indexes: values.update(read_leaves(path, indexes)),
    )
