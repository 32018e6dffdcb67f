"""Arrays outside the default memory of their devices, such as offloaded state.

Programs compute in the default memory only. XLA refuses arrays in other memories in
most operations, even in a copy. `jax.device_put` takes arrays in every memory.
"""

import functools
from typing import Any

import jax
import numpy as np

_HOST = "pinned_host"


@functools.lru_cache(maxsize=1024)
def is_offloaded(sharding: jax.sharding.Sharding) -> bool:
    """Tell whether a sharding puts arrays outside the devices' default memory."""
    kind = sharding.memory_kind
    if kind is None:
        return False
    devices = sharding.addressable_devices or sharding.device_set
    return kind != next(iter(devices)).default_memory().kind


def copied(array: jax.Array) -> jax.Array:
    """Copy an array within its memory, without waiting for the copy.

    If the array spans several processes, each process copies its own shards.
    """
    if array.is_fully_addressable:
        return jax.device_put(array, array.sharding, may_alias=False)
    parts = [
        jax.device_put(part.data, part.data.sharding, may_alias=False)
        for part in array.addressable_shards
    ]
    return from_own_shards(array.shape, array.dtype, array.sharding, parts)


def copied_off_device(leaf: Any) -> Any:
    """Copy an array into the host's memory, and wait for the copy.

    An array of several processes stays one: each process copies its shards. Other
    leaves are passed on, and so are arrays of one process without elements: nothing is
    stored of them.
    """
    if not isinstance(leaf, jax.Array):
        return leaf
    if leaf.is_fully_addressable:
        return np.array(leaf) if leaf.size else leaf
    # JAX gives the shards of keys without elements the shape of the whole array.
    own = leaf.sharding.shard_shape(leaf.shape)
    with jax.enable_x64(True):  # without it, JAX narrows 64-bit dtypes
        parts = [
            jax.device_put(
                part.data if leaf.size else np.zeros(own, leaf.dtype),
                _host_memory(part.data.sharding),
                may_alias=False,
            )
            for part in leaf.addressable_shards
        ]
    sharding = _host_memory(leaf.sharding)
    return from_own_shards(leaf.shape, leaf.dtype, sharding, parts).block_until_ready()


def from_own_shards(
    shape: tuple[int, ...],
    dtype: Any,
    sharding: jax.sharding.Sharding,
    parts: list[jax.Array],
) -> jax.Array:
    """Return the array of all processes whose shards here are `parts`."""
    with jax.enable_x64(True):  # without it, JAX narrows 64-bit dtypes
        return jax.make_array_from_single_device_arrays(
            shape, sharding, parts, dtype=dtype
        )


def _host_memory(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """Return a sharding in the host's memory, if the devices reach it."""
    devices = sharding.addressable_devices or sharding.device_set
    kinds = {memory.kind for memory in next(iter(devices)).addressable_memories()}
    return sharding.with_memory_kind(_HOST) if _HOST in kinds else sharding


def zeros(shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.Array:
    """Make zeros in the memory that `sharding` names; None is the default device."""
    if sharding is None or not is_offloaded(sharding):
        return jax.numpy.zeros(shape, dtype, device=sharding)
    device = next(iter(sharding.addressable_devices))
    computed = sharding.with_memory_kind(device.default_memory().kind)
    return jax.device_put(jax.numpy.zeros(shape, dtype, device=computed), sharding)


def to_default_memory(value: jax.Array) -> jax.Array:
    """Move a traced value to the memory in which programs compute."""
    return _moved(value, jax.memory.Space.Device)


def beside(value: jax.Array, other: jax.Array) -> jax.Array:
    """Move a traced value to the memory of another value."""
    return _moved(value, _space(other))


def _moved(value: jax.Array, space: Any) -> jax.Array:
    return value if _space(value) == space else jax.device_put(value, space)


def _space(value: jax.Array) -> Any:
    return getattr(jax.typeof(value), "memory_space", jax.memory.Space.Device)


def part_of(sharding: Any, device: Any) -> jax.sharding.Sharding:
    """Return the sharding of one device's shard of an array with `sharding`."""
    return jax.sharding.SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
