"""The weights of a training state: what a model needs to predict.

The functions here look through the containers of a training state for models, and for
what stands beside them. `kinds_of_parts` tells one from the other.
"""

import functools
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax

from flaxckpt._trees.kinds_of_parts import (
    LEAVES,
    METRICS,
    Picked,
    are_keys,
    is_beside,
    is_from,
    is_keras,
    is_left_out,
    is_named_beside,
    is_of_equinox,
    is_optimizer,
    is_sequence,
    is_train_state,
    is_training,
)
from flaxckpt._trees.remembered import Remembered
from flaxckpt._trees.skeleton import key_of
from flaxckpt._trees.ties import (
    MODULE,
    STATE,
    VARIABLE,
    PyTree,
    children_of,
    flatten,
    role_of,
)


def default_weights(tree: PyTree) -> PyTree:
    """Pick the weights from a tree.

    Args:
        tree: A training state.

    Returns:
        - For a `TrainState`-like object (one with `params`, and with an optimizer's
          state or a `tx`), or a dict with `params` beside an optimizer's state, a step
          count or PRNG keys: a dict of `params` and of the other fields that are
          mappings of weights, such as `batch_stats`. Linen's `Module.apply` takes it as
          variables. An object with `params` alone is a model.
        - For an NNX module or state: its state without RNG streams, optimizer state,
          metrics, caches and intermediates.
        - For the tuple of variables that Keras's stateless methods take: its first two
          entries.
        - For a dict, tuple or object that holds one of these, or an optimizer's state
          or a `CheckpointState`, and for a dict or tuple that holds PRNG keys: the
          weights of its parts, by their keys. It leaves out a part whose type shows
          that it is not weights, a part named as an optimizer's state (such as Keras's
          `optimizer_variables`), and a part named `rng`, `step`, `data` or the like
          that holds no floats. If a tuple has one part left, or if the one part left is
          a `TrainState`, the result is the weights of this part.
        - For anything else, such as Equinox modules and plain params: all of it.
    """
    picked = _pick_known(tree)
    return {} if picked is None else picked.value


def are_unknown(tree: PyTree) -> bool:
    """Tell whether a whole tree counts as weights only because no part is known."""
    picked = _pick_known(tree)
    return picked is not None and picked.value is tree and not picked.is_known


def _pick_known(node: PyTree) -> Picked | None:
    """Pick as `_pick` does, and at once if the structure was all weights before."""
    if isinstance(node, jax.Array) or role_of(node) or is_train_state(node):
        return _pick(node)
    flat = flatten(node)
    kind = flat.key, tuple(map(_kind_of, flat.leaves))
    is_known = _ALL_WEIGHTS.get(kind)
    if is_known is not None:
        return Picked(node, is_known=is_known)
    picked = _pick(node)
    if picked is not None and picked.value is node:
        _ALL_WEIGHTS.keep(kind, picked.is_known)
    return picked


_ALL_WEIGHTS = Remembered[bool](64)  # structures


def _kind_of(leaf: Any) -> Any:
    """Return all that the rules look at in a leaf."""
    is_array = hasattr(leaf, "dtype") and hasattr(leaf, "shape")
    return type(leaf), (leaf.dtype, leaf.shape) if is_array else None


def _pick(node: PyTree, *, in_model: bool = False) -> Picked | None:
    """Pick the weights of a node; None if it is known to have none.

    In a model, a part is left out only for its type, and never for its name. Outside of
    a model, each part is looked up among the remembered structures first.
    """
    if isinstance(node, jax.Array):  # first, since there may be many
        return None if is_beside(node) else Picked(node, is_known=False)
    if node is None or isinstance(node, LEAVES):
        return Picked(node, is_known=False)
    role = role_of(node)
    if role == VARIABLE:
        return Picked(node, is_training=True) if _is_nnx_weights(node) else None
    if role in (MODULE, STATE):
        state = _nnx_weights(node)
        return Picked(state, is_training=True) if state else None
    if is_beside(node):
        return None
    if is_from(type(node), "optax"):  # LookaheadParams
        return Picked(node)
    children = _children_by_name(node)
    if children is None:
        return Picked(node, is_known=False)
    fields = {name: child for name, child in children if isinstance(name, str)}
    if "params" in fields and is_training(node, fields):
        return Picked(_variables(fields), is_train_state=True, is_training=True)
    if "params" in fields and isinstance(node, Mapping):
        return Picked(node)  # Linen's variables
    if is_keras(node):
        return Picked(tuple(node[:2]), is_training=True)
    is_equinox = is_of_equinox(node)
    is_state = any(is_optimizer(name, child) for name, child in fields.items())
    in_model = in_model or (is_equinox and not is_state)
    pick = functools.partial(_pick, in_model=True) if in_model else _pick_known
    below = [(name, child, pick(child)) for name, child in children]
    is_state = is_state or any(
        not are_keys(child) if picked is None else picked.is_training
        for _, child, picked in below
    )
    # A PRNG key alone tells little, since a model may have one, too.
    is_plain = isinstance(node, Mapping) or is_sequence(node)
    has_keys = is_plain and any(
        picked is None or picked.value is not child for _, child, picked in below
    )
    if not is_state and (in_model or not has_keys):
        is_model = is_equinox or any(p and p.is_known for _, _, p in below)
        return Picked(node, is_known=is_model)
    kept = [
        (name, picked)
        for name, child, picked in below
        if picked is not None
        and not (is_state and not in_model and is_left_out(name, child, picked))
    ]
    return _put_together(node, kept, is_training=is_state)


def _put_together(
    node: PyTree, kept: list[tuple[str | int, Picked]], *, is_training: bool
) -> Picked | None:
    if not kept:
        return None
    if len(kept) == 1 and (kept[0][1].is_train_state or is_sequence(node)):
        part = kept[0][1]
        return replace(part, is_training=part.is_training or is_training)
    if is_sequence(node):
        value: Any = tuple(picked.value for _, picked in kept)
    else:
        value = {name: picked.value for name, picked in kept}
    return Picked(value, is_training=is_training)


def _variables(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return params and the collections beside them, as Linen's `apply` takes them."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if name == "params":
            found[name] = _nnx_weights(value) if role_of(value) else value
        elif role_of(value):
            state = _nnx_weights(value)
            found |= {name: state} if state else {}
        elif isinstance(value, Mapping) and not is_beside(value):
            # Beside `params`, a mapping with the name of metrics is not weights.
            is_named = name.lower() in METRICS or is_named_beside(name, value)
            if not is_named and not are_keys(value):
                found[name] = value
    return found


def _nnx_weights(node: Any) -> Any:
    nnx: Any = sys.modules["flax.nnx"]
    state = node if isinstance(node, nnx.State) else nnx.state(node)
    return nnx.filter_state(state, nnx.Not(nnx.Any(*_beside_in_nnx(nnx))))


def _is_nnx_weights(variable: Any) -> bool:
    return not isinstance(variable, _beside_in_nnx(sys.modules["flax.nnx"]))


def _beside_in_nnx(nnx: Any) -> tuple[type, ...]:
    metric = nnx.metrics.MetricState
    return nnx.RngState, nnx.optimizer.OptState, metric, nnx.Intermediate, nnx.Cache


def _children_by_name(node: PyTree) -> list[tuple[str | int, Any]] | None:
    """Return a node's children with their names or positions; None for a leaf."""
    if type(node) is dict:
        return list(node.items())
    if type(node) in (tuple, list):
        return list(enumerate(node))
    children, _ = children_of(node)
    if len(children) == 1 and not children[0][0]:
        return None
    return [(key_of(path[0]), child) for path, child in children]
