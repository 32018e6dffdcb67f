"""Rules that tell from its type and name what a part of a training state is.

They import no framework. They know the types of optax and clu by their modules' names,
ask for Flax NNX and Equinox only if these are loaded, and know Keras's states by form.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from flaxckpt._trees.leaf import is_of_keys
from flaxckpt._trees.stateful import is_stateful
from flaxckpt._trees.ties import PyTree, leaves_of, role_of

Weights: TypeAlias = Callable[[PyTree], PyTree]
# Names of the parts beside the models in a training state. A name in STATES alone tells
# that the tree is a training state, since no model has a part of this name. Models do
# have parts of the other names, so these decide only together with the part's leaves.
STATES = frozenset(
    "opt_state opt_states optim_state optim_states optimizer_state optimizer_states "
    "optimizer_variables metrics_variables".split()
)
OPTIMIZERS = frozenset("opt optim optimizer optimizers tx".split())
METRICS = frozenset("metrics metric metrics_state".split())
BESIDE = (STATES | OPTIMIZERS | METRICS) | frozenset(
    "rng rngs rng_key rng_keys key keys prng prng_key seed count counter "
    "step steps global_step epoch epochs batch iteration iterations data "
    "dataset data_state data_iterator iterator train_iter loader dataloader sampler "
    "ckpt checkpoint checkpoint_state ckpt_state loss_scale scheduler lr_scheduler "
    "env_state env_states replay_buffer buffer logs history".split()
)
LEAVES = np.ndarray | np.generic | bool | int | float | complex | str | bytes


@dataclass(frozen=True)
class Picked:
    """The weights of a part of a training state.

    Attributes:
        value: The weights.
        is_known: Whether types or names tell that these are weights.
        is_train_state: Whether they are the weights of a single `TrainState`.
        is_training: Whether anything but PRNG keys was left out, or may have been.
    """

    value: PyTree
    is_known: bool = True
    is_train_state: bool = False
    is_training: bool = False


def is_train_state(node: PyTree) -> bool:
    """Tell from the names of its fields alone whether a node is a `TrainState`."""
    if isinstance(node, jax.Array | LEAVES) or node is None or is_sequence(node):
        return False
    if isinstance(node, Mapping):
        return "params" in node and not STATES.isdisjoint(node)
    return hasattr(node, "params") and hasattr(node, "opt_state")


def is_training(node: PyTree, fields: Mapping[str, Any]) -> bool:
    """Tell whether a node with `params` is a training state, and not a model."""
    if any(
        name.lower() in STATES or is_optimizer(name, value)
        for name, value in fields.items()
    ):
        return True
    if not isinstance(node, Mapping):
        return hasattr(node, "tx")  # a field that JAX does not flatten
    return any(
        is_beside(value) or is_named_beside(name, value)
        for name, value in fields.items()
        if name != "params"
    )


def is_optimizer(name: str, node: PyTree) -> bool:
    """Tell from its type or name whether a part is an optimizer's state.

    By type it is anything that `is_beside` knows, except PRNG keys. A part with a name
    in OPTIMIZERS may be a model, so it also needs a step count among its leaves.
    """
    if not _is_node(node):
        return False
    if is_beside(node):
        return not are_keys(node)
    if role_of(node):
        return False
    name = name.lower()
    return name in STATES or (
        name in OPTIMIZERS and any(map(_is_count, leaves_of(node)))
    )


def is_left_out(name: str | int, child: PyTree, picked: Picked) -> bool:
    """Tell whether a part of a training state is left out, by name, type or place."""
    if isinstance(child, bool | int | str | bytes) or child is None:
        return True
    if not isinstance(name, str):
        return _is_bookkeeping(child)
    if name.lower() in STATES:
        return True
    # If the part is a training state itself, `picked` has only its weights.
    return not picked.is_training and is_named_beside(name, child)


def is_named_beside(name: str, node: PyTree) -> bool:
    """Tell from its name and its leaves whether a part is not weights."""
    name = name.lower()
    return name in BESIDE and is_said_beside(name, leaves_of(node))


def is_said_beside(name: str, leaves: Iterable[Any]) -> bool:
    """Tell from a name and from leaves whether a part is not weights.

    Args:
        name: The name, in lower case.
        leaves: The leaves, or their `ShapeDtypeStruct`s.
    """
    if name in STATES or (name in OPTIMIZERS and any(map(_is_count, leaves))):
        return True
    return name in BESIDE and not any(map(is_floating, leaves))


def is_floating(leaf: Any) -> bool:
    """Tell whether a leaf is a float or complex number, or an array of such numbers."""
    if isinstance(leaf, float | complex):
        return True
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and bool(jnp.issubdtype(dtype, jnp.inexact))


def is_beside(node: PyTree) -> bool:
    """Tell from its type whether a node is a part beside the weights."""
    kind = type(node)
    if isinstance(node, jax.Array):
        return is_of_keys(node.dtype)
    if is_from(kind, "flaxckpt") or is_from(kind, "clu"):
        return True
    if is_stateful(node):  # a data iterator, say; a model is no leaf
        return jax.tree_util.all_leaves([node])
    if is_from(kind, "optax"):
        return kind.__name__ != "LookaheadParams"
    return is_sequence(node) and len(node) > 0 and all(map(is_beside, node))


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


def is_keras(node: PyTree) -> bool:
    """Tell whether a tuple holds what Keras's stateless methods take, in their order.

    The optimizer's variables, in the third entry, begin with a count and a learning
    rate.
    """
    if not is_sequence(node) or len(node) not in (3, 4):
        return False
    if not all(map(is_sequence, node)):
        return False
    heads = [(getattr(x, "shape", 0), getattr(x, "dtype", None)) for x in node[2][:2]]
    return (
        len(heads) == 2
        and all(shape == () and dtype is not None for shape, dtype in heads)
        and bool(np.issubdtype(heads[0][1], np.integer))
        and bool(np.issubdtype(heads[1][1], np.floating))
    )


def is_of_equinox(node: PyTree) -> bool:
    equinox = sys.modules.get("equinox")
    return equinox is not None and isinstance(node, equinox.Module)


def is_sequence(node: PyTree) -> bool:
    return type(node) in (tuple, list)


def _is_node(node: PyTree) -> bool:
    return not (isinstance(node, jax.Array | LEAVES) or node is None)


def _is_key(node: PyTree) -> bool:
    return isinstance(node, jax.Array) and is_of_keys(node.dtype)


def are_keys(node: PyTree) -> bool:
    """Tell whether a node holds only PRNG keys, and at least one."""
    if _is_key(node):
        return True
    if is_sequence(node):
        return len(node) > 0 and all(map(are_keys, node))
    if not _is_node(node) or role_of(node) or is_beside(node):
        return False
    leaves = jax.tree_util.tree_leaves(node)
    return bool(leaves) and all(map(_is_key, leaves))


@functools.lru_cache(maxsize=4096)
def is_from(kind: type, package: str) -> bool:
    return kind.__module__.partition(".")[0] == package
