"""A mesh with one device of each process, for arrays that all processes make alike."""

import jax
import numpy as np
from jax.sharding import Mesh

from flaxckpt._processes.messages import process_count, process_index


def mesh_of_processes() -> Mesh:
    """Return a mesh of the first device of each process, along the axis `process`."""
    devices = [_first_device(process) for process in range(process_count())]
    return Mesh(np.array(devices), ("process",))


def device_here() -> jax.Device:
    """Return the device of this process in that mesh."""
    return _first_device(process_index())


def _first_device(process: int) -> jax.Device:
    return next(each for each in jax.devices() if each.process_index == process)
