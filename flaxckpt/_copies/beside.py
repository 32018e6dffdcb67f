"""Scalars brought to the devices of a tree, so that one program can take them all."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
)

from flaxckpt._copies.memory_kinds import is_offloaded
from flaxckpt._runtime.unchecked import replicated


def beside(leaves: Sequence[Any], *scalars: Any) -> list[Any]:
    """Return scalars that one program takes beside a tree, without waiting for them.

    Args:
        leaves: The leaves of the tree. The scalars go to the devices of one that is
            committed: one on the first scalar's devices, if there is such a leaf, or
            that with most. If none is, they go to those of a committed scalar, or
            stay where they are.
        *scalars: JAX arrays of one element, and scalars of numpy.
    """
    placed = [each.sharding for each in leaves if _is_committed(each)]
    placed = placed or [each.sharding for each in scalars if _is_committed(each)][:1]
    if not placed:
        return list(map(_within_programs, scalars))
    first = scalars[0]
    own = first.sharding.device_set if isinstance(first, jax.Array) else None
    sets = [sharding.device_set for sharding in placed]
    sizes = [(each == own, len(each)) for each in sets]
    sharding = _replicated(placed[sizes.index(max(sizes))])
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
        own = scalar.sharding
        is_there = own == sharding or (
            own.is_equivalent_to(sharding, scalar.ndim)
            and not (_is_explicit(own) or _is_explicit(sharding))
        )
        if is_there and not is_offloaded(own):
            return scalar
        scalar = scalar.addressable_data(0)
    return replicated(scalar, sharding)


def _is_explicit(sharding: jax.sharding.Sharding) -> bool:
    """Tell whether the types of arrays have the mesh: JAX adds none of two meshes."""
    mesh = getattr(sharding, "mesh", None)
    return mesh is not None and AxisType.Explicit in mesh.axis_types
