"""Scalars brought to the devices of a tree, so that one program can take them all."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from flaxckpt._copies.memory_kinds import is_offloaded


def beside(leaves: Sequence[Any], *scalars: Any) -> list[Any]:
    """Return scalars that one program takes beside a tree, without waiting for them.

    Args:
        leaves: The leaves of the tree. If none is committed to devices, the scalars
            stay where they are. So do those that are on the devices of a leaf, if the
            first scalar is; otherwise all go to the devices of the leaf that has most.
        *scalars: A JAX array of one element, or a scalar of numpy, and others.
    """
    placed = [each.sharding for each in leaves if _is_committed(each)]
    if not placed:
        return list(map(_within_programs, scalars))
    chosen = max(placed, key=lambda sharding: len(sharding.device_set))
    if isinstance(scalars[0], jax.Array):
        own = scalars[0].sharding
        if any(each.device_set == own.device_set for each in placed):
            chosen = own
    sharding = _replicated(chosen)
    return [_placed(scalar, sharding) for scalar in scalars]


def _is_committed(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and bool(getattr(leaf, "committed", True))


def _within_programs(scalar: Any) -> Any:
    """Return a scalar from a memory in which programs compute."""
    if isinstance(scalar, jax.Array) and is_offloaded(scalar.sharding):
        return _placed(scalar, _replicated(scalar.sharding))
    return scalar


def _replicated(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """Return the sharding of one whole copy on each device of another sharding."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    devices = sorted(sharding.device_set, key=lambda device: device.id)
    if len(devices) == 1:
        return SingleDeviceSharding(devices[0])
    return NamedSharding(Mesh(np.array(devices), "all"), PartitionSpec())


def _placed(scalar: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    if isinstance(scalar, jax.Array):
        is_there = scalar.sharding.is_equivalent_to(sharding, scalar.ndim)
        if is_there and not is_offloaded(scalar.sharding):
            return scalar
        scalar = scalar.addressable_data(0)
    # One by one: with `sharding`, `device_put` would need all processes to call it.
    parts = [
        jax.device_put(scalar, _default_memory(device))
        for device in sharding.addressable_devices
    ]
    return jax.make_array_from_single_device_arrays(np.shape(scalar), sharding, parts)


def _default_memory(device: Any) -> jax.sharding.Sharding:
    kind = device.default_memory().kind
    return SingleDeviceSharding(device, memory_kind=kind)
