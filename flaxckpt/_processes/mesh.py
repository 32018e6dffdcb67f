"""A mesh with one device of each process, for arrays that all processes make alike."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flaxckpt._processes.messages import process_count, process_index


def mesh_of_processes() -> Mesh:
    """Return a mesh of the first device of each process, along the axis `process`."""
    first = _first_devices()
    devices = [first[process] for process in range(process_count())]
    return Mesh(np.array(devices), ("process",))


def device_here() -> Any:
    """Return the device of this process in that mesh."""
    return _first_devices()[process_index()]


def _first_devices() -> dict[int, Any]:
    return {device.process_index: device for device in reversed(jax.devices())}
