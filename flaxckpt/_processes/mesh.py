"""A mesh with one device of each process, for arrays that all processes make alike."""

import jax
import numpy as np
from jax.sharding import Mesh

from flaxckpt._processes.messages import process_count


def mesh_of_processes() -> Mesh:
    """Return a mesh of the first device of each process, along the axis `process`."""
    first = {device.process_index: device for device in reversed(jax.devices())}
    devices = [first[process] for process in range(process_count())]
    return Mesh(np.array(devices), ("process",))
