"""Copies of a tree's arrays, so that training may donate or change its own."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def snapshot(leaves: Sequence[Any]) -> list[Any]:
    """Copy the JAX arrays among `leaves` on their devices, each in its sharding.

    Returns at once; the copies are made in the devices' order of work. Other leaves
    are passed on.
    """
    # One call may not mix arrays of different sets of devices.
    groups: dict[frozenset[Any], list[int]] = {}
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, jax.Array):
            groups.setdefault(frozenset(leaf.sharding.device_set), []).append(index)
    copies = list(leaves)
    for indices in groups.values():
        arrays = [leaves[index] for index in indices]
        copy = _copier(tuple(array.sharding for array in arrays))
        for index, array in zip(indices, copy(arrays), strict=True):
            copies[index] = array
    return copies


@functools.lru_cache(maxsize=16)
def _copier(shardings: tuple[jax.sharding.Sharding, ...]) -> Any:
    return jax.jit(
        lambda arrays: [jnp.copy(array) for array in arrays],
        out_shardings=list(shardings),
    )
