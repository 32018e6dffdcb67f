"""The weights in a stored tree: which leaves they are, and the tree that they make."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flaxckpt._trees.kinds_of_parts import (
    BESIDE,
    METRICS,
    OPTIMIZERS,
    STATES,
    Weights,
    is_floating,
    is_said_beside,
)
from flaxckpt._trees.layout import Layout
from flaxckpt._trees.leaf import ARRAYS, Leaf
from flaxckpt._trees.skeleton import (
    Skeleton,
    children_in,
    indices_in,
    with_children,
)
from flaxckpt._trees.structure import skeleton_of
from flaxckpt._trees.ties import PyTree, leaves_of


def is_weights_name(name: str) -> bool:
    """Tell whether a name is not among the names of parts beside the weights."""
    return name.lower() not in BESIDE


def weights_skeleton(
    tree: PyTree, weights: Weights, leaves: Sequence[Any] | None = None
) -> Skeleton:
    """Locate the weights within a whole tree.

    Args:
        tree: The whole tree.
        weights: Picks the weights from it.
        leaves: The tree's leaves, if it is flattened already.

    Returns:
        The structure of the weights, with indices into the tree's leaves; None
        if the weights are not leaves of the tree but computed from them.
    """
    picked = weights(tree)
    if picked is tree:
        return skeleton_of(tree)
    leaves = leaves_of(tree) if leaves is None else leaves
    indices = {id(leaf): i for i, leaf in enumerate(leaves)}
    found = [indices.get(id(leaf)) for leaf in leaves_of(picked)]
    return None if None in found else _renumbered(skeleton_of(picked), found)


def plain_weights(layout: Layout) -> Skeleton:
    """Locate the weights, by names and leaves, in a tree that plain Orbax wrote."""
    return _named_weights(layout.skeleton, list(map(_sample, layout.leaves)))[0]


def _named_weights(node: Skeleton, leaves: Sequence[Any]) -> tuple[Skeleton, bool]:
    """Pick by names as `_pick` does, and tell whether it is from a `TrainState`."""
    fields = {str(name): child for name, child in children_in(node)}
    if not isinstance(node, dict) or "dict" not in node:
        return node, False
    is_beside = {
        name
        for name, child in fields.items()
        if name != "params"
        and is_said_beside(name.lower(), [leaves[i] for i in indices_in(child)])
    }
    if "params" in fields and is_beside:
        kept = {
            name: child
            for name, child in fields.items()
            if name == "params"
            or (
                name not in is_beside
                and name.lower() not in METRICS
                and isinstance(child, dict)
                and "dict" in child
            )
        }
        return {"dict": [[name, child] for name, child in kept.items()]}, True
    if "params" in fields:
        return node, False
    below = {name: _named_weights(child, leaves) for name, child in fields.items()}
    is_state = any(
        isinstance(fields[name], dict)
        for name in is_beside
        if name.lower() in STATES | OPTIMIZERS
    )
    if not is_state and not any(is_train_state for _, is_train_state in below.values()):
        return node, False
    kept = {
        name: picked
        for name, picked in below.items()
        if (picked[1] or name not in is_beside) and not _is_number(picked[0], leaves)
    }
    if len(kept) == 1 and next(iter(kept.values()))[1]:
        return next(iter(kept.values()))[0], True
    return {"dict": [[name, child] for name, (child, _) in kept.items()]}, False


def _sample(leaf: Leaf) -> Any:
    """Return an example of an array or number leaf; None for text, bytes and keys."""
    if leaf.kind in ARRAYS:
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(leaf.dtype))
    return {"bool": False, "int": 0, "float": 0.0, "complex": 0j}.get(leaf.kind)


def _is_number(node: Skeleton, leaves: Sequence[Any]) -> bool:
    """Tell whether a part is None, text, keys, or a single number that is no float."""
    if not isinstance(node, int):
        return node is None
    sample = leaves[node]
    return not is_floating(sample) and getattr(sample, "shape", ()) == ()


def _renumbered(skeleton: Skeleton, indices: list[int | None]) -> Skeleton:
    if skeleton is None or isinstance(skeleton, int):
        return None if skeleton is None else indices[skeleton]
    below = [_renumbered(child, indices) for _, child in children_in(skeleton)]
    return with_children(skeleton, below)
