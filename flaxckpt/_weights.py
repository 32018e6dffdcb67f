"""The weights of a training state: what a model needs to predict.

Looks through the containers that people put their training state in, for models and for
what is beside them. Knows the types of Flax, optax, Equinox and Keras by their modules'
names; imports none of them.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    Leaf,
    Skeleton,
    children_in,
    indices_in,
    key_of,
    skeleton_of,
    with_children,
)

PyTree: TypeAlias = Any
Weights: TypeAlias = Callable[[PyTree], PyTree]

# Names of what is beside the models in a training state. The first alone say that it is
# one: no model has parts of these names. Models have parts of all the other names, so
# those decide only together with what is there.
_STATES = frozenset(
    "opt_state opt_states optim_state optim_states optimizer_state optimizer_states "
    "optimizer_variables metrics_variables".split()
)
_OPTIMIZERS = frozenset("opt optim optimizer optimizers tx".split())
_METRICS = frozenset("metrics metric metrics_state".split())
_BESIDE = (_STATES | _OPTIMIZERS | _METRICS) | frozenset(
    "rng rngs rng_key rng_keys key keys prng prng_key seed count counter "
    "step steps global_step epoch epochs batch iteration iterations data "
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
          by its type, is called an optimizer's state, as Keras's `optimizer_variables`,
          or is called `rng`, `step`, `data` or the like and holds no floats;
        - of anything else, as Equinox modules and plain params: all of it.

        A `TrainState`-like object has an optimizer's state or a `tx`. An object with
        `params` and neither of them is a model.
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
        is_training: Whether more than PRNG keys was left out, or may have been.
    """

    value: PyTree
    is_known: bool = True
    is_train_state: bool = False
    is_training: bool = False


def _pick_known(node: PyTree) -> _Picked | None:
    """Pick as `_pick` does; of a structure that was all weights before, at once."""
    if role_of(node) or _is_train_state(node):
        return _pick(node)
    flat = flatten(node)
    kind = flat.key, tuple(map(_kind_of, flat.leaves))
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


def _kind_of(leaf: Any) -> Any:
    """Return all that is looked at of a leaf."""
    is_array = hasattr(leaf, "dtype") and hasattr(leaf, "shape")
    return type(leaf), (leaf.dtype, leaf.shape) if is_array else None


def _pick(
    node: PyTree, *, is_root: bool = True, in_model: bool = False
) -> _Picked | None:
    """Pick the weights of a node; None if it is known to be none.

    In a model, a part is left out only if its type is known, and a name says nothing.
    """
    if isinstance(node, _LEAVES):
        return _Picked(node, is_known=False)
    role = role_of(node)
    if role == VARIABLE:
        return _Picked(node, is_training=True) if _is_nnx_weights(node) else None
    if role in (MODULE, STATE):
        state = _nnx_weights(node)
        return _Picked(state, is_training=True) if state else None
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
        return _Picked(_variables(fields), is_train_state=True, is_training=True)
    if "params" in fields and isinstance(node, Mapping):
        return _Picked(node)  # Linen's variables
    if _is_keras(node):
        return _Picked(tuple(node[:2]), is_training=True)
    is_equinox = _is_equinox(node)
    is_state = any(_is_optimizer(name, child) for name, child in fields.items())
    in_model = in_model or (is_equinox and not is_state)
    if is_root and not in_model:
        pick = _pick_known
    else:
        pick = functools.partial(_pick, is_root=False, in_model=in_model)
    below = [(name, child, pick(child)) for name, child in children]
    is_state = is_state or any(
        not _are_keys(child) if picked is None else picked.is_training
        for _, child, picked in below
    )
    # A key alone says little: a model may have one, too.
    is_plain = isinstance(node, Mapping) or _is_sequence(node)
    has_keys = is_plain and any(
        picked is None or picked.value is not child for _, child, picked in below
    )
    if not is_state and (in_model or not has_keys):
        is_model = is_equinox or any(p and p.is_known for _, _, p in below)
        return _Picked(node, is_known=is_model)
    kept = [
        (name, picked)
        for name, child, picked in below
        if picked is not None
        and not (is_state and not in_model and _is_left_out(name, child, picked))
    ]
    return _put_together(node, kept, is_training=is_state)


def _put_together(
    node: PyTree, kept: list[tuple[str | int, _Picked]], *, is_training: bool
) -> _Picked | None:
    if not kept:
        return None
    if len(kept) == 1 and (kept[0][1].is_train_state or _is_sequence(node)):
        return kept[0][1]
    if _is_sequence(node):
        value: Any = tuple(picked.value for _, picked in kept)
    else:
        value = {name: picked.value for name, picked in kept}
    return _Picked(value, is_training=is_training)


def _variables(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return params and the collections beside them, as Linen's `apply` takes them."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if name == "params":
            found[name] = _nnx_weights(value) if role_of(value) else value
        elif role_of(value):
            state = _nnx_weights(value)
            found |= {name: state} if state else {}
        elif isinstance(value, Mapping) and not _is_beside(value):
            # Where the params are named, metrics are none.
            is_named = name.lower() in _METRICS or _is_named_beside(name, value)
            if not is_named and not _are_keys(value):
                found[name] = value
    return found


def _is_train_state(node: PyTree) -> bool:
    """Tell whether a node is a `TrainState` itself, without a look at what is in it."""
    if isinstance(node, jax.Array | _LEAVES) or node is None or _is_sequence(node):
        return False
    if isinstance(node, Mapping):
        return "params" in node and not _STATES.isdisjoint(node)
    return hasattr(node, "params") and hasattr(node, "opt_state")


def _is_training(node: PyTree, fields: Mapping[str, Any]) -> bool:
    """Tell a training state with `params` from a model or variables."""
    if any(
        name.lower() in _STATES or _is_optimizer(name, value)
        for name, value in fields.items()
    ):
        return True
    if not isinstance(node, Mapping):
        return hasattr(node, "tx")  # a field that JAX does not flatten
    return any(
        _is_beside(value) or _is_named_beside(name, value)
        for name, value in fields.items()
        if name != "params"
    )


def _is_optimizer(name: str, node: PyTree) -> bool:
    """Tell whether a part is an optimizer's state, by its type or what it is called.

    A part that is called an optimizer may be a model. An optimizer counts its steps.
    """
    if _is_beside(node) and not _is_key(node):
        return True
    if not _is_node(node) or role_of(node):
        return False
    name = name.lower()
    return name in _STATES or (name in _OPTIMIZERS and _has_count(leaves_of(node)))


def _is_left_out(name: str | int, child: PyTree, picked: _Picked) -> bool:
    """Tell whether a part of a training state is left out for its name or place."""
    if isinstance(child, bool | int | str | bytes) or child is None:
        return True
    if not isinstance(name, str):
        return _is_bookkeeping(child)
    if name.lower() in _STATES:
        return True
    # Of a part that has a training state in it, the weights are picked already.
    return not picked.is_training and _is_named_beside(name, child)


def _is_named_beside(name: str, node: PyTree) -> bool:
    """Tell whether a part is no weights, by its name and by what it holds."""
    name = name.lower()
    return name in _BESIDE and _is_said_beside(name, leaves_of(node))


def _is_said_beside(name: str, leaves: Iterable[Any]) -> bool:
    """Tell by a known name and its leaves whether a part is no weights.

    Args:
        name: The name, in small letters.
        leaves: The leaves, or their `ShapeDtypeStruct`s.
    """
    if name in _STATES or (name in _OPTIMIZERS and _has_count(leaves)):
        return True
    return name in _BESIDE and not any(map(_is_floating, leaves))


def _has_count(leaves: Iterable[Any]) -> bool:
    """Tell whether leaves have a count among them, as those of optimizers do."""
    return any(_is_count(leaf) for leaf in leaves)


def _is_floating(leaf: Any) -> bool:
    """Tell whether a leaf is, or has, numbers that may be trained."""
    if isinstance(leaf, float | complex):
        return True
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and bool(jnp.issubdtype(dtype, jnp.inexact))


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
    if not isinstance(node, jax.Array | np.ndarray | np.generic) or _is_key(node):
        return False
    is_raw_key = node.dtype == np.uint32 and node.shape in ((2,), (4,))
    return is_raw_key or _is_count(node)


def _is_count(leaf: Any) -> bool:
    if isinstance(leaf, bool | str | bytes):
        return False
    if isinstance(leaf, int):
        return True
    dtype = getattr(leaf, "dtype", None)
    return (
        dtype is not None
        and getattr(leaf, "shape", None) == ()
        and bool(jnp.issubdtype(dtype, jnp.integer))
    )


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


def _are_keys(node: PyTree) -> bool:
    """Tell whether a node holds PRNG keys, and nothing else."""
    if _is_key(node):
        return True
    if not _is_node(node) or role_of(node) or _is_beside(node):
        return False
    leaves = jax.tree_util.tree_leaves(node)
    return bool(leaves) and all(map(_is_key, leaves))


@functools.lru_cache(maxsize=4096)
def _is_from(kind: type, package: str) -> bool:
    return kind.__module__.partition(".")[0] == package


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
        where the weights are not leaves of the tree but computed from them.
    """
    picked = weights(tree)
    if picked is tree:
        return skeleton_of(tree)
    leaves = leaves_of(tree) if leaves is None else leaves
    indices = {id(leaf): i for i, leaf in enumerate(leaves)}
    found = [indices.get(id(leaf)) for leaf in leaves_of(picked)]
    return None if None in found else _renumbered(skeleton_of(picked), found)


def plain_weights(layout: Layout) -> Skeleton:
    """Locate the weights in a tree of which only names are known, as Orbax wrote it."""
    return _named_weights(layout.skeleton, list(map(_sample, layout.leaves)))[0]


def _named_weights(node: Skeleton, leaves: Sequence[Any]) -> tuple[Skeleton, bool]:
    """Pick by names as `_pick` does; return, too, whether it is a `TrainState`'s."""
    pairs = children_in(node)
    fields = {str(name): child for name, child in pairs}
    if not isinstance(node, dict) or "dict" not in node:
        return node, False
    is_beside = {
        name
        for name, child in fields.items()
        if name != "params"
        and _is_said_beside(name.lower(), [leaves[i] for i in indices_in(child)])
    }
    if "params" in fields and is_beside:
        kept = {
            name: child
            for name, child in fields.items()
            if name == "params"
            or (
                name not in is_beside
                and name.lower() not in _METRICS
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
        if name.lower() in _STATES | _OPTIMIZERS
    )
    if not is_state and not any(is_train_state for _, is_train_state in below.values()):
        return node, False
    kept = {
        name: picked
        for name, picked in below.items()
        if picked[1] or name not in is_beside
    }
    kept = {n: e for n, e in kept.items() if not _is_number(e[0], leaves)}
    if len(kept) == 1 and next(iter(kept.values()))[1]:
        return next(iter(kept.values()))[0], True
    return {"dict": [[name, child] for name, (child, _) in kept.items()]}, False


def _sample(leaf: Leaf) -> Any:
    """Return a value of the kind that a leaf describes; None for text and the like."""
    if leaf.kind in ("jax", "numpy", "numpy_scalar"):
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(leaf.dtype))
    return {"bool": False, "int": 0, "float": 0.0, "complex": 0j}.get(leaf.kind)


def _is_number(node: Skeleton, leaves: Sequence[Any]) -> bool:
    """Tell whether a part is nothing, or a single number that is no float."""
    if not isinstance(node, int):
        return node is None
    sample = leaves[node]
    return not _is_floating(sample) and getattr(sample, "shape", ()) == ()


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
