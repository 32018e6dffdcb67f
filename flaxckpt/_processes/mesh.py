"""Arrays of all processes, with a part on one device of each."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flaxckpt._processes.messages import process_count, process_index


def stacked(row: np.ndarray[Any, Any]) -> jax.Array:
    """Make an array of a row of each process, in the processes' order.

    Args:
        row: The row of this process, of shape `[1, ...]`.
    """
    shape = process_count(), *row.shape[1:]
    return _of_parts(row, shape, PartitionSpec("process"))


def replicated(value: np.ndarray[Any, Any]) -> jax.Array:
    """Make an array of a value that all processes have."""
    return _of_parts(value, value.shape, PartitionSpec())


def _of_parts(
    part: np.ndarray[Any, Any], shape: tuple[int, ...], spec: PartitionSpec
) -> jax.Array:
    first = {device.process_index: device for device in reversed(jax.devices())}
    devices = [first[process] for process in range(process_count())]
    sharding = NamedSharding(Mesh(np.array(devices), ("process",)), spec)
    here = jax.device_put(part, first[process_index()])
    return jax.make_array_from_single_device_arrays(shape, sharding, [here])
