"""A worker of which one process exports what all have saved; see `pod.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import workers
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P
from workers import mesh_of, place, say

import flaxckpt


def values():
    return {
        "w": np.arange(64, dtype=np.float32).reshape(8, 8),
        "half": np.arange(8).astype(jnp.bfloat16),
        "same": np.arange(3, dtype=np.int32),
    }


def export_by_one(directory, suffix):
    """Save in all processes, export in process 1 alone, and load the file in all."""
    mesh = mesh_of(jax.device_count() // 2, 2)
    specs = {"w": P("model", "data"), "half": P(("data", "model")), "same": P()}
    tree = {name: place(each, mesh, *specs[name]) for name, each in values().items()}
    with flaxckpt.ModelCheckpoint(f"{directory}/{{epoch}}") as ckpt:
        path = ckpt.save(tree, 0)
    file = f"{directory}/m{suffix}"
    if jax.process_index() == 1:
        flaxckpt.export(path, file)
    multihost_utils.sync_global_devices("exported")
    loaded = flaxckpt.load(file, tree)
    for name, array in loaded.items():
        assert array.sharding == tree[name].sharding
        for shard in array.addressable_shards:
            assert np.array_equal(shard.data, values()[name][shard.index])
    say("same")


if __name__ == "__main__":
    workers.main(globals())
