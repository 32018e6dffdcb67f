"""Scalars brought to the devices of a tree, so that one program can take them all."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding


def beside(leaves: Sequence[Any], *scalars: Any) -> list[jax.Array]:
    """Return scalars as JAX arrays on the devices of a tree, without waiting for them.

    Args:
        leaves: The leaves of the tree. The first JAX array among them tells the
            devices; if there is none, the first among the scalars does.
        *scalars: JAX arrays of shape (), and scalars of numpy.
    """
    arrays = [each for each in (*leaves, *scalars) if isinstance(each, jax.Array)]
    sharding = _replicated(arrays[0].sharding)
    return [_placed(scalar, sharding) for scalar in scalars]


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
        if scalar.sharding.is_equivalent_to(sharding, 0):
            return scalar
        scalar = scalar.addressable_data(0)
    # One by one: with `sharding`, `device_put` would need all processes to call it.
    devices = sharding.addressable_devices
    parts = [jax.device_put(scalar, device) for device in devices]
    return jax.make_array_from_single_device_arrays((), sharding, parts)
