"""Copies in host memory, and a check that devices have room for another copy."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flaxckpt._copies.held import Copies
from flaxckpt._copies.memory_kinds import is_offloaded
from flaxckpt._copies.on_device import copy_on_device
from flaxckpt._trees.leaf import is_of_keys


def copied_to_host(leaves: Sequence[Any], into: Copies | None = None) -> Copies:
    """Copy the JAX arrays among `leaves` to host memory, and wait for them.

    PRNG keys are copied on their devices. Other leaves are passed on. The memory of
    `into`, copies that are no longer needed, is used where shape and dtype match.
    """
    reuse = into.beside if into is not None else []
    if len(reuse) != len(leaves):
        reuse = [None] * len(leaves)
    copies: list[Any] = []
    for leaf, old in zip(leaves, reuse, strict=True):
        if not isinstance(leaf, jax.Array) or is_of_keys(leaf.dtype):
            copies += copy_on_device([leaf]).leaves()
        else:
            copies.append(_copy_of(np.asarray(leaf), old))
    return Copies(None, [], copies)


def _copy_of(values: Any, into: Any) -> Any:
    """Copy values, into the array `into` if its shape and dtype match."""
    kind = values.shape, values.dtype
    fits = isinstance(into, np.ndarray) and (into.shape, into.dtype) == kind
    copy: Any = into if fits else np.empty_like(values)
    np.copyto(copy, values)
    return copy


def memory_of_host(
    kinds: Sequence[tuple[tuple[int, ...], Any]], reuse: Copies | None
) -> list[np.ndarray[Any, Any]]:
    """Return one host array for each shape and dtype; their contents are undefined.

    Args:
        kinds: Shapes and dtypes.
        reuse: Copies that are no longer needed, whose memory is returned if all shapes
            and dtypes match; None for new memory.
    """
    old = [] if reuse is None else [a for a in reuse.beside if a is not None]
    fits = [(array.shape, array.dtype) for array in old] == list(kinds)
    return old if fits else [np.empty(shape, dtype) for shape, dtype in kinds]


def fits_on_device(leaves: Sequence[Any]) -> bool:
    """Tell whether each device has room for a copy of `leaves`.

    A device that reports no memory limit counts as having room.
    """
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    shardings = {each.sharding for each in arrays}
    shardings -= set(filter(is_offloaded, shardings))
    devices = {device for each in shardings for device in each.addressable_devices}
    stats = {device: device.memory_stats() or {} for device in devices}
    if not any("bytes_limit" in found for found in stats.values()):
        return True
    needed = dict.fromkeys(devices, 0)
    for leaf in (each for each in arrays if each.sharding in shardings):
        size = math.prod(leaf.sharding.shard_shape(leaf.shape))
        for device in leaf.sharding.addressable_devices:
            needed[device] += leaf.nbytes * size // max(leaf.size, 1)
    return all(needed[device] <= _room(found) for device, found in stats.items())


def _room(stats: Mapping[str, int]) -> float:
    """Return the bytes that a device has room for, by its statistics of memory."""
    used = stats.get("bytes_in_use", 0)
    # A step's activations are not in use now, but will need room again.
    peak = max(stats.get("peak_bytes_in_use", 0) - used, 0)
    return stats.get("bytes_limit", math.inf) - used - peak
