"""Slots of a `Snapshot`: the one to fill, filling it, and making it empty."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from flaxckpt._copies.memory_kinds import beside, is_offloaded, zeros
from flaxckpt._decision.scalars import flushed, improves
from flaxckpt._program.best_trees_checks import shape_dtype
from flaxckpt._trees.leaf import is_of_keys


def place_for(snapshot: Any, value: Any, xp: Any) -> tuple[Any, Any, Any]:
    """Return a value as it is compared, whether it is among the best, and its slot.

    The slot is the first empty one. If all are full, it is the slot of the worst value;
    of several equal values, of the one that was taken last.
    """
    values, order = xp.asarray(snapshot.values), xp.asarray(snapshot.order)
    empty = order < 0
    is_full = ~xp.any(empty)
    worst = xp.max(values) if snapshot.mode == "min" else xp.min(values)
    last = xp.where(values == worst, order, -1)
    at = xp.where(is_full, xp.argmax(last), xp.argmax(empty)).astype(np.int32)
    with np.errstate(all="ignore"):
        value = flushed(xp.asarray(value).astype(values.dtype), xp.where)
    return value, improves(value, worst, is_full, snapshot.mode, 0.0, xp.where), at


def noted(old: Any, new: Any, xp: Any = jnp) -> Any:
    """Return all that is kept beside the trees, with a new tree's in its slot."""

    def put(old: Any, new: Any) -> Any:
        old = xp.asarray(old)
        return xp.where(hit, xp.asarray(new).astype(old.dtype), old)

    *kept, order, logs = old
    *given, hit, new_logs = new
    with np.errstate(all="ignore"):
        return (
            *map(put, kept, given),
            put(order, xp.max(xp.asarray(order)) + 1),
            {name: put(value, new_logs[name]) for name, value in logs.items()},
        )


def put_in_program(take: Any, new: Any, old: Any) -> Any:
    """Return the new tree if `take`, else the old one, which is not copied."""

    def as_old(new: Any, old: Any) -> Any:
        return jax.tree.map(
            lambda leaf, kept: beside(jnp.asarray(leaf, dtype=kept.dtype), kept),
            new,
            old,
        )

    return jax.lax.cond(take, as_old, lambda _, old: old, new, old)


def put_in(take: Any, new: Any, old: Any) -> Any:
    """Return a copy of the new tree, which the loop may donate, or the old tree."""
    if not take:
        return old
    return jax.tree.map(_copied, new, old)


def _copied(new: Any, old: jax.Array) -> jax.Array:
    if any(isinstance(x, jax.Array) and is_offloaded(x.sharding) for x in (new, old)):
        return jax.device_put(new, old.sharding, may_alias=False)
    return jnp.array(new, dtype=old.dtype, copy=True)


def zeros_like(leaf: Any) -> Any:
    """Return zeros with a leaf's shape, dtype and sharding."""
    shape, dtype = shape_dtype(leaf)
    if is_of_keys(dtype):
        return _zero_keys(leaf)
    if isinstance(leaf, Tracer):
        return beside(jnp.zeros_like(leaf, dtype=dtype), leaf)
    return zeros(shape, dtype, _sharding(leaf))


def _zero_keys(leaf: Any) -> Any:
    impls = []

    def data_of(keys: Any) -> Any:
        impls.append(jax.random.key_impl(keys))  # which a struct of keys does not tell
        return jax.random.key_data(keys)

    data = jax.eval_shape(data_of, leaf)
    keys = jax.random.wrap_key_data(jnp.zeros(data.shape, data.dtype), impl=impls[0])
    sharding = None if isinstance(leaf, Tracer) else _sharding(leaf)
    return keys if sharding is None else jax.device_put(keys, sharding)


def _sharding(leaf: Any) -> Any:
    return getattr(leaf, "sharding", None) if getattr(leaf, "committed", True) else None
