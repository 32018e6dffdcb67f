"""Reads a checkpoint's table of leaves."""

import functools
from pathlib import Path

import jax.numpy as jnp

from flaxckpt._disk.record import is_checkpoint, read_leaves
from flaxckpt._orbax.engine import storable
from flaxckpt._runtime.collector import paused_collector
from flaxckpt._runtime.failures import in_one_line
from flaxckpt._trees.layout import Layout
from flaxckpt._trees.leaf import Leaf, key_dtype
from flaxckpt._trees.skeleton import Skeleton
from flaxckpt.errors import CheckpointCorruptError


@paused_collector()
def read_table(path: Path) -> tuple[Layout | None, Skeleton]:
    """Read a checkpoint's table of leaves: the layout, and where in it the weights are.

    Both are None if plain Orbax wrote the checkpoint.
    """
    if not is_checkpoint(path):
        return None, None
    fields = read_leaves(path)
    try:
        layout, weights = Layout.from_json(fields), fields["weights"]
        for leaf in layout.leaves:
            _check_known(leaf)
        if weights == "all":
            weights = layout.skeleton
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointCorruptError(
            str(path), f"its table of leaves does not parse ({in_one_line(error)})"
        ) from error
    return layout, weights


def _check_known(leaf: Leaf) -> None:
    """Check that a leaf's dtype is one that can be stored.

    Raises:
        ValueError: If it is not.
    """
    if leaf.kind == "key":
        if str(key_dtype(leaf.impl)) != leaf.dtype:
            raise ValueError(f"keys of {leaf.impl} are of dtype {leaf.dtype}")
    elif leaf.dtype and not (storable(leaf.dtype) and _is_name(leaf.dtype)):
        raise ValueError(f"{leaf.name} is of dtype {leaf.dtype}, which is not known")


@functools.cache
def _is_name(dtype: str) -> bool:
    """Tell whether this is the name by which a dtype is recorded, and no alias."""
    return str(jnp.dtype(dtype)) == dtype
