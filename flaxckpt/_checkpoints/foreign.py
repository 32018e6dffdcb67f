"""A tree that another library than flaxckpt stored: plain Orbax, or one with files."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from flaxckpt._files.foreign_tree import ForeignTree
from flaxckpt._files.formats import read
from flaxckpt._orbax.engine import storable
from flaxckpt._orbax.foreign import host_form, read_foreign, read_leaves, tree_of_forms
from flaxckpt._trees.describe import describe
from flaxckpt._trees.ties import PyTree
from flaxckpt._trees.wanted import is_of_jax


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

    None if it has to be read whole: the forms do not tell PRNG keys from their data,
    nor what an array becomes whose dtype JAX does not have in its present settings.
    """
    forms = jax.tree.leaves(tree := tree_of_forms(path))
    of_jax = [form.dtype for form in forms if _is_of_jax(form)]
    if not forms or any(each == "uint32" or not is_of_jax(each) for each in of_jax):
        return None
    stand_ins = list(map(host_form, forms))
    layout, known = describe(
        jax.tree.unflatten(jax.tree.structure(tree), stand_ins), storable
    )
    if len(known) != len(forms):
        return None
    leaves = [
        dataclasses.replace(leaf, kind="jax") if _is_of_jax(form) else leaf
        for leaf, form in zip(layout.leaves, forms, strict=True)
    ]
    values: dict[int, Any] = {}
    return ForeignTree(
        dataclasses.replace(layout, leaves=tuple(leaves)),
        lambda index, _: values[index],
        lambda indexes: values.update(read_leaves(path, tree, indexes)),
    )


def _is_of_jax(form: Any) -> bool:
    """Tell whether what Orbax tells of a leaf is that of a JAX array."""
    return getattr(form, "sharding_metadata", None) is not None
