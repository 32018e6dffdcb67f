"""The weights of a training state: what a model needs to predict.

Looks through the containers that people put their training state in, for models and for
what is beside them. Knows the types of Flax, optax, Equinox and Keras by their modules'
names; imports none of them.
"""

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from flaxckpt._slots import Snapshot
from flaxckpt._state import CheckpointState
from flaxckpt._ties import (
    MODULE,
    STATE,
    VARIABLE,
    children_of,
    flatten,
    leaves_of,
    role_of,
)
from flaxckpt._tree import (
    Layout,
    Skeleton,
    children_in,
    key_of,
    skeleton_of,
    with_children,
)

PyTree: TypeAlias = Any
Weights: TypeAlias = Callable[[PyTree], PyTree]

# Names of what is beside the models in a training state. The first alone say that it is
# one: no model has parts of these names.
_OPTIMIZER = frozenset(
    "opt_state opt_states optim_state optimizer optimizers optimizer_state "
    "optimizer_states optimizer_variables metrics_variables".split()
)
_BESIDE = _OPTIMIZER | frozenset(
    "opt optim tx metrics metric metrics_state rng rngs rng_key rng_keys key keys "
    "prng prng_key seed step steps global_step epoch epochs batch iteration data "
    "dataset data_state data_iterator iterator train_iter loader dataloader sampler "
    "ckpt checkpoint checkpoint_state ckpt_state loss_scale scheduler lr_scheduler "
    "env_state env_states replay_buffer buffer logs history".split()
)
_PLAIN = 64  # structures that are remembered as all weights
_LEAVES = np.ndarray | np.generic | bool | int | float | complex | str | bytes


def default_weights(tree: PyTree) -> PyTree:
    """Pick the weights from a tree.

    Args:
        tree: A training state.

    Returns:
        - of a `TrainState`-like object (an attribute `params`), or a dict with `params`
          and an optimizer's state: a dict of `params` and of the other fields that are
          mappings, such as `batch_stats`: what Linen's `Module.apply` takes as
          variables;
        - of an NNX module or state: its state less RNG streams, optimizer state,
          metrics, caches and intermediates;
        - of a dict, tuple or object that has such things in it, or an optimizer's
          state, a `CheckpointState` or PRNG keys beside others: the weights of its
          parts, by their keys (of a tuple with one such part, or a dict whose one such
          part is a `TrainState`: that part's), without what is known not to be weights
          by its type or by its name, as Keras's `optimizer_variables`;
        - of anything else, as Equinox modules and plain params: all of it.
    """
    picked = _pick_known(tree)
    return {} if picked is None else picked.value


def are_unknown(tree: PyTree) -> bool:
    """Tell whether all of a tree passes for weights only because nothing is known."""
    picked = _pick_known(tree)
    return picked is not None and picked.value is tree and not picked.is_known


def is_weights_name(name: str) -> bool:
    """Tell whether weights may be called so, and an optimizer or metrics may not."""
    return name.lower() not in _BESIDE


@dataclass(frozen=True)
class _Picked:
    """The weights of a part of a training state.

    Attributes:
        value: The weights.
        is_known: Whether it is known by its type or names what they are.
        is_train_state: Whether they are those of one `TrainState`.
    """

    value: PyTree
    is_known: bool = True
    is_train_state: bool = False


def _pick_known(node: PyTree) -> _Picked | None:
    """Pick as `_pick` does; of a structure that was all weights before, at once."""
    if role_of(node):
        return _pick(node)
    flat = flatten(node)
    kind = flat.key, frozenset(map(type, flat.leaves))
    try:
        is_known = _ALL_WEIGHTS.get(kind)
    except TypeError:  # static data that does not hash
        return _pick(node)
    if is_known is not None:
        return _Picked(node, is_known=is_known)
    picked = _pick(node)
    if picked is not None and picked.value is node:
        if len(_ALL_WEIGHTS) >= _PLAIN:
            _ALL_WEIGHTS.clear()
        _ALL_WEIGHTS[kind] = picked.is_known
    return picked


_ALL_WEIGHTS: dict[Any, bool] = {}


def _pick(node: PyTree, *, is_root: bool = True) -> _Picked | None:
    """Pick the weights of a node; None if it is known to be none."""
    if isinstance(node, _LEAVES):
        return _Picked(node, is_known=False)
    role = role_of(node)
    if role == VARIABLE:
        return _Picked(node) if _is_nnx_weights(node) else None
    if role in (MODULE, STATE):
        state = _nnx_weights(node)
        return _Picked(state) if state else None
    if _is_beside(node):
        return None
    if isinstance(node, jax.Array) or node is None:
        return _Picked(node, is_known=False)
    if _is_from(type(node), "optax"):  # LookaheadParams
        return _Picked(node)
    children = _children(node)
    if children is None:
        return _Picked(node, is_known=False)
    fields = {name: child for name, child in children if isinstance(name, str)}
    if "params" in fields and _is_training(node, fields):
        return _Picked(_variables(fields), is_train_state=True)
    if "params" in fields and isinstance(node, Mapping):
        return _Picked(node)  # Linen's variables
    if _is_keras(node):
        return _Picked(tuple(node[:2]))
    pick = _pick_known if is_root else functools.partial(_pick, is_root=False)
    below = [(name, child, pick(child)) for name, child in children]
    known = any(_is_node(fields[name]) for name in _OPTIMIZER & fields.keys()) or any(
        not _is_key(child) if picked is None else picked.value is not child
        for _, child, picked in below
    )
    # A key alone says little: a model may have one, too.
    is_plain = isinstance(node, Mapping) or _is_sequence(node)
    has_keys = is_plain and any(picked is None for _, _, picked in below)
    if not (known or has_keys):
        is_model = _is_equinox(node) or any(p and p.is_known for _, _, p in below)
        return _Picked(node, is_known=is_model)
    kept = [
        (name, picked)
        for name, child, picked in below
        if picked is not None
        and not (known and isinstance(name, str) and name.lower() in _BESIDE)
        and not (known and _is_bookkeeping(child))
    ]
    return _put_together(node, kept)


def _put_together(
    node: PyTree, kept: list[tuple[str | int, _Picked]]
) -> _Picked | None:
    if not kept:
        return None
    if len(kept) == 1 and (kept[0][1].is_train_state or _is_sequence(node)):
        return kept[0][1]
    if _is_sequence(node):
        return _Picked(tuple(picked.value for _, picked in kept))
    return _Picked({name: picked.value for name, picked in kept})


def _variables(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return params and the collections beside them, as Linen's `apply` takes them."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if name == "params":
            found[name] = _nnx_weights(value) if role_of(value) else value
        elif role_of(value) and name.lower() not in _BESIDE:
            state = _nnx_weights(value)
            found |= {name: state} if state else {}
        elif isinstance(value, Mapping) and name.lower() not in _BESIDE:
            leaves = jax.tree_util.tree_leaves(value)
            if not _is_beside(value) and not (leaves and all(map(_is_key, leaves))):
                found[name] = value
    return found


def _is_training(node: PyTree, fields: Mapping[str, Any]) -> bool:
    """Tell a training state from variables: by an optimizer in it, or its type."""
    return not isinstance(node, Mapping) or any(
        name.lower() in _BESIDE or _is_beside(value) for name, value in fields.items()
    )


def _is_beside(node: PyTree) -> bool:
    """Tell by its type whether a node is no weights, but what is beside them."""
    if isinstance(node, CheckpointState | Snapshot) or _is_key(node):
        return True
    if _is_from(type(node), "optax"):
        return type(node).__name__ != "LookaheadParams"
    if _is_from(type(node), "clu"):
        return True
    return (
        type(node) in (tuple, list)
        and len(node) > 0
        and all(_is_beside(each) for each in node)
    )


def _is_bookkeeping(node: PyTree) -> bool:
    """Tell whether a leaf of a training state counts steps, or is a raw PRNG key."""
    if isinstance(node, bool | int | float | complex | str | bytes) or node is None:
        return True
    if not isinstance(node, jax.Array | np.ndarray | np.generic) or _is_key(node):
        return False
    dtype, shape = node.dtype, node.shape
    is_count = shape == () and np.issubdtype(dtype, np.integer)
    return is_count or (dtype == np.uint32 and shape in ((2,), (4,)))


def _is_keras(node: PyTree) -> bool:
    """Tell whether a tuple is what Keras's stateless methods take, in their order.

    Its optimizers' variables begin with a count and a learning rate.
    """
    if not (type(node) in (tuple, list) and len(node) in (3, 4)):
        return False
    if not all(type(each) in (tuple, list) for each in node):
        return False
    heads = [(getattr(x, "shape", 0), getattr(x, "dtype", None)) for x in node[2][:2]]
    return (
        len(heads) == 2
        and all(shape == () and dtype is not None for shape, dtype in heads)
        and bool(np.issubdtype(heads[0][1], np.integer))
        and bool(np.issubdtype(heads[1][1], np.floating))
    )


def _is_equinox(node: PyTree) -> bool:
    equinox = sys.modules.get("equinox")
    return equinox is not None and isinstance(node, equinox.Module)


def _is_sequence(node: PyTree) -> bool:
    return type(node) in (tuple, list)


def _is_node(node: PyTree) -> bool:
    return not (isinstance(node, jax.Array | _LEAVES) or node is None)


def _is_key(node: PyTree) -> bool:
    return isinstance(node, jax.Array) and bool(
        jnp.issubdtype(node.dtype, jax.dtypes.prng_key)
    )


@functools.lru_cache(maxsize=4096)
def _is_from(kind: type, package: str) -> bool:
    return kind.__module__.partition(".")[0] == package


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
    indices = {id(leaf): i for i, leaf in enumerate(leaves_of(tree))}
    found = [indices.get(id(leaf)) for leaf in leaves_of(picked)]
    return None if None in found else _renumbered(skeleton_of(picked), found)


def plain_weights(layout: Layout) -> Skeleton:
    """Locate the weights in a tree of which only names are known, as Orbax wrote it."""
    return _named_weights(layout.skeleton)[0]


def _named_weights(node: Skeleton) -> tuple[Skeleton, bool]:
    """Pick by names as `_pick` does; return, too, whether it is a `TrainState`'s."""
    pairs = children_in(node)
    fields = {str(name): child for name, child in pairs}
    if not isinstance(node, dict) or "dict" not in node:
        return node, False
    is_beside = {name for name in fields if name.lower() in _BESIDE}
    if "params" in fields and is_beside:
        kept = {
            name: child
            for name, child in fields.items()
            if name == "params"
            or (name not in is_beside and isinstance(child, dict) and "dict" in child)
        }
        return {"dict": [[name, child] for name, child in kept.items()]}, True
    if "params" in fields:
        return node, False
    below = {name: _named_weights(child) for name, child in fields.items()}
    is_state = any(isinstance(fields[name], dict) for name in _OPTIMIZER & is_beside)
    if not is_state and not any(is_train_state for _, is_train_state in below.values()):
        return node, False
    kept = {name: picked for name, picked in below.items() if name not in is_beside}
    kept = {n: e for n, e in kept.items() if not isinstance(e[0], int | None)}
    if len(kept) == 1 and next(iter(kept.values()))[1]:
        return next(iter(kept.values()))[0], True
    return {"dict": [[name, child] for name, (child, _) in kept.items()]}, False


def _nnx_weights(node: Any) -> Any:
    nnx: Any = sys.modules["flax.nnx"]
    state = node if isinstance(node, nnx.State) else nnx.state(node)
    return nnx.filter_state(state, nnx.Not(nnx.Any(*_beside_in_nnx(nnx))))


def _is_nnx_weights(variable: Any) -> bool:
    return not isinstance(variable, _beside_in_nnx(sys.modules["flax.nnx"]))


def _beside_in_nnx(nnx: Any) -> tuple[type, ...]:
    metric = nnx.metrics.MetricState
    return nnx.RngState, nnx.optimizer.OptState, metric, nnx.Intermediate, nnx.Cache


def _children(node: PyTree) -> list[tuple[str | int, Any]] | None:
    """Return a node's children with their names or positions; None of a leaf."""
    if type(node) is dict:
        return list(node.items())
    if type(node) in (tuple, list):
        return list(enumerate(node))
    children, _ = children_of(node)
    if len(children) == 1 and not children[0][0]:
        return None
    return [(key_of(path[0]), child) for path, child in children]


def _renumbered(skeleton: Skeleton, indices: list[int | None]) -> Skeleton:
    if skeleton is None or isinstance(skeleton, int):
        return None if skeleton is None else indices[skeleton]
    below = [_renumbered(child, indices) for _, child in children_in(skeleton)]
    return with_children(skeleton, below)
