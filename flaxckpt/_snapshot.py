"""Copies of a tree's arrays, so that training may donate or change its own.

Fresh memory costs 30 times more than the copying, in page faults, so the copies of one
save are donated to the next.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxckpt._state import CheckpointState, judge, with_best


def snapshot(leaves: Sequence[Any], into: Sequence[Any] = ()) -> list[Any]:
    """Copy the JAX arrays among `leaves` on their devices, each in its sharding.

    Returns at once; the copies are made in the devices' order of work. Other leaves
    are passed on.

    Args:
        leaves: Leaves of a tree.
        into: Copies of the same form that nobody needs any more, whose memory is used.
            Empty for none.
    """
    copies = list(leaves)
    for indices in _groups(leaves).values():
        arrays = [leaves[index] for index in indices]
        copy = _copier(tuple(array.sharding for array in arrays), reuse=bool(into))
        slot = [into[index] for index in indices] if into else None
        for index, array in zip(indices, copy(arrays, slot, _work())[0], strict=True):
            copies[index] = array
    return copies


def snapshot_if_better(
    state: CheckpointState,
    value: jax.Array,
    leaves: Sequence[Any],
    into: Sequence[Any],
    *,
    always: bool,
) -> tuple[CheckpointState, jax.Array, list[Any]]:
    """Judge a due check on the device, and copy only if there is something to save.

    Returns at once, without waiting for `value`.

    Args:
        state: The decision state after `tick`.
        value: The monitored value.
        leaves: Leaves of a tree, for which `is_on_one_mesh` is true with `value`.
        into: Earlier copies, of the same form; returned as they were if there is
            nothing to save, or else refilled. Empty for none.
        always: Whether to copy whatever is decided, for a slot that takes what does
            not improve.

    Returns:
        The state after `judge`, whether to save, bool[], and the copies.
    """
    indices = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]
    arrays = [leaves[index] for index in indices]
    shardings = tuple(array.sharding for array in arrays)
    into = into or snapshot(leaves)
    slot = [into[index] for index in indices]
    decider = _decider(shardings, always=always)
    best, save, found, _ = decider(state, value, arrays, slot, _work())
    copies = list(leaves)
    for index, array in zip(indices, found, strict=True):
        copies[index] = array
    return with_best(state, best), save, copies


def on_host(leaves: Sequence[Any], into: Sequence[Any] = ()) -> list[Any]:
    """Copy the JAX arrays among `leaves` to the host's memory, waiting for them."""
    reuse = into if len(into) == len(leaves) else itertools.repeat(None)
    copies: list[Any] = []
    for leaf, old in zip(leaves, reuse, strict=False):
        if isinstance(leaf, jax.Array) and not _is_key(leaf):
            view = np.asarray(leaf)
            fits = isinstance(old, np.ndarray) and (old.shape, old.dtype) == (
                view.shape,
                view.dtype,
            )
            copy = old if fits else np.empty_like(view)
            np.copyto(copy, view)
            copies.append(copy)
        else:
            copies.append(snapshot([leaf])[0])
    return copies


def fits_on_device(leaves: Sequence[Any]) -> bool:
    """Tell whether each device has room for a copy, where it says how much it has."""
    needed: dict[Any, int] = {}
    for leaf in leaves:
        if isinstance(leaf, jax.Array):
            for device in leaf.sharding.addressable_devices:
                size = leaf.nbytes // len(leaf.sharding.device_set)
                if leaf.is_fully_replicated:
                    size = leaf.nbytes
                needed[device] = needed.get(device, 0) + size
    for device, size in needed.items():
        stats: Mapping[str, int] = device.memory_stats() or {}
        if "bytes_limit" in stats:
            free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
            # What a step takes for its activations is not in use between steps.
            peak = stats.get("peak_bytes_in_use", 0) - stats.get("bytes_in_use", 0)
            if size > free - max(peak, 0):
                return False
    return True


def is_like(leaves: Sequence[Any], copies: Sequence[Any]) -> bool:
    """Tell whether `copies` are of the shapes, dtypes and shardings of `leaves`."""
    return len(leaves) == len(copies) and all(
        not isinstance(leaf, jax.Array)
        or (
            isinstance(copy, jax.Array)
            and leaf.shape == copy.shape
            and leaf.dtype == copy.dtype
            and (leaf.sharding is copy.sharding or leaf.sharding == copy.sharding)
        )
        for leaf, copy in zip(leaves, copies, strict=True)
    )


def is_on_one_mesh(leaves: Sequence[Any], *scalars: Any) -> bool:
    """Tell whether all JAX arrays are on the same devices: one program takes them."""
    return len(_groups((*leaves, *scalars))) == 1


def _groups(leaves: Sequence[Any]) -> dict[frozenset[Any], list[int]]:
    """Group arrays by devices: one call may not mix arrays of different sets."""
    groups: dict[frozenset[Any], list[int]] = {}
    last, group = None, list[int]()
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, jax.Array):
            if leaf.sharding is not last:
                last = leaf.sharding
                group = groups.setdefault(frozenset(last.device_set), [])
            group.append(index)
    return groups


def _is_key(leaf: jax.Array) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


@functools.cache
def _work() -> np.ndarray[Any, Any]:
    """Return something to reckon with, beside the copying.

    JAX on CPU runs what takes fewer than 1000 floating-point operations on the thread
    that calls it, and copying takes none.
    """
    return np.ones(1024, np.float32)


@functools.lru_cache(maxsize=16)
def _copier(shardings: tuple[jax.sharding.Sharding, ...], *, reuse: bool) -> Any:
    def copy(
        arrays: list[jax.Array], slot: list[jax.Array] | None, work: jax.Array
    ) -> tuple[list[jax.Array], jax.Array]:
        del slot  # its memory is used
        return [jnp.copy(array) for array in arrays], jnp.sum(work * work)

    return jax.jit(
        copy,
        donate_argnums=1 if reuse else (),
        keep_unused=True,
        out_shardings=(list(shardings), None),
    )


@functools.lru_cache(maxsize=16)
def _decider(shardings: tuple[jax.sharding.Sharding, ...], *, always: bool) -> Any:
    def decide(
        state: CheckpointState,
        value: jax.Array,
        arrays: list[jax.Array],
        slot: list[jax.Array],
        work: jax.Array,
    ) -> tuple[Any, Any, list[jax.Array], jax.Array]:
        state, save = judge(state, {state.monitor: value}, np.True_)
        if always:
            copies = [jnp.copy(array) for array in arrays]
        else:
            copies = jax.lax.cond(save, lambda: arrays, lambda: slot)
        return state.best, save, copies, jnp.sum(work * work)

    return jax.jit(
        decide,
        donate_argnums=3,
        keep_unused=True,
        out_shardings=(None, None, list(shardings), None),
    )
