"""The weights of a training state: what a model needs to predict.

Knows the shapes of Flax's, NNX's and Equinox's trees by their modules' presence in
`sys.modules`; imports none of them.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax

from flaxckpt._tree import Layout, Skeleton, skeleton_of

PyTree: TypeAlias = Any
Weights: TypeAlias = Callable[[PyTree], PyTree]

_NOT_WEIGHTS = ("opt_state", "metrics")


def default_weights(tree: PyTree) -> PyTree:
    """Pick the weights from a tree.

    Args:
        tree: A training state.

    Returns:
        - of a `TrainState`-like object (an attribute `params`), or a dict with `params`
          and `opt_state`: a dict of `params` and of the other fields that are mappings,
          such as `batch_stats`, less `opt_state` and `metrics`: what Linen's
          `Module.apply` takes as variables;
        - of an NNX module or state: its state less RNG streams, optimizer state,
          caches and intermediates; of a tuple or mapping with NNX modules or states in
          it, the same of each that has any left (of the one, where a tuple has one);
        - of anything else, as Equinox modules and plain params: all of it.
    """
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None:
        nodes = nnx.Module, nnx.Optimizer, nnx.State
        if isinstance(tree, nodes):
            return _nnx_weights(nnx, tree)
        if isinstance(tree, Mapping):
            picked = {
                key: _nnx_weights(nnx, node)
                for key, node in tree.items()
                if isinstance(node, nodes)
            }
            picked = {key: state for key, state in picked.items() if state}
            if picked:
                return picked
        elif type(tree) in (tuple, list):
            states = [
                _nnx_weights(nnx, each) for each in tree if isinstance(each, nodes)
            ]
            states = [state for state in states if state]
            if states:
                return states[0] if len(states) == 1 else tuple(states)
    fields = _fields(tree)
    if "params" not in fields or (
        isinstance(tree, Mapping) and "opt_state" not in tree
    ):
        return tree
    return {
        name: value
        for name, value in fields.items()
        if name == "params" or (isinstance(value, Mapping) and name not in _NOT_WEIGHTS)
    }


def weights_skeleton(tree: PyTree, weights: Weights) -> Skeleton:
    """Locate the weights within a whole tree.

    Args:
        tree: The whole tree.
        weights: Picks the weights from it.

    Returns:
        The structure of the weights, with indices into the tree's leaves; None
        where the weights are not leaves of the tree but computed from them.
    """
    picked = weights(tree)
    if picked is tree:
        return skeleton_of(tree)
    indices = {id(leaf): i for i, leaf in enumerate(jax.tree_util.tree_leaves(tree))}
    found = [indices.get(id(leaf)) for leaf in jax.tree_util.tree_leaves(picked)]
    return None if None in found else _renumbered(skeleton_of(picked), found)


def plain_weights(layout: Layout) -> Skeleton:
    """Locate the weights in a tree of which only names are known, as Orbax wrote it."""
    pairs = layout.skeleton.get("dict") if isinstance(layout.skeleton, dict) else None
    children = dict(map(tuple, pairs or ()))
    if not {"params", "opt_state"} <= children.keys():
        return layout.skeleton
    return {
        "dict": [
            [name, child]
            for name, child in children.items()
            if name == "params"
            or (
                isinstance(child, dict) and "dict" in child and name not in _NOT_WEIGHTS
            )
        ]
    }


def _nnx_weights(nnx: Any, node: Any) -> Any:
    state = node if isinstance(node, nnx.State) else nnx.state(node)
    others = nnx.RngState, nnx.optimizer.OptState, nnx.Intermediate, nnx.Cache
    return nnx.filter_state(state, nnx.Not(nnx.Any(*others)))


def _fields(tree: PyTree) -> dict[str, Any]:
    """Return a node's children that have names."""
    if type(tree) is dict:
        return {name: child for name, child in tree.items() if isinstance(name, str)}
    children, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda child: child is not tree
    )
    names = [
        getattr(key[0], "name", getattr(key[0], "key", None)) if key else None
        for key, _ in children
    ]
    return {
        name: child
        for name, (_, child) in zip(names, children, strict=True)
        if isinstance(name, str)
    }


def _renumbered(skeleton: Skeleton, indices: list[int | None]) -> Skeleton:
    match skeleton:
        case int():
            return indices[skeleton]
        case {"dict": pairs}:
            return {
                "dict": [[key, _renumbered(child, indices)] for key, child in pairs]
            }
        case {"list": children}:
            return {"list": [_renumbered(child, indices) for child in children]}
        case {"tuple": children}:
            return {"tuple": [_renumbered(child, indices) for child in children]}
        case _:
            return None
