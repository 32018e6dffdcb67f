"""How long does a restore take?

A state in 25 arrays, restored by each peer into arrays on the device, beside numpy
reading the same bytes from one file. All of it from the page cache. flaxckpt verifies
every leaf against its digest, which no other does; without, it is in the table too.
"""

import shutil
import tempfile
import time
from pathlib import Path

import absl.logging
import harness
import jax
import peers

absl.logging.set_verbosity(absl.logging.ERROR)
NAMES = [
    "flaxckpt",
    "Orbax v0 CheckpointManager",
    "Orbax v1 Checkpointer",
    "Orbax v1, best settings",
    "Flax msgpack",
    "safetensors",
    "raw write",
]


def main() -> None:
    options = harness.arguments(__doc__)
    megabytes = 10 if options.quick else 400
    tree = harness.tree_of(megabytes)
    like = harness.like(tree)
    root = Path(tempfile.mkdtemp(prefix="flaxckpt-bench-"))
    ways = peers.make_all(root, NAMES)
    for way in ways.values():
        way.save(tree, 1)
        way.wait()
    loads = {name: way.load for name, way in ways.items()}
    loads["flaxckpt, not verified"] = ways["flaxckpt"].load_unverified
    loads["numpy, from one file"] = loads.pop("raw write")

    def timed(load):
        def measure():
            harness.settle(megabytes)
            start = time.perf_counter()
            jax.block_until_ready(jax.tree.map(jax.numpy.asarray, load(like)))
            return time.perf_counter() - start

        return measure

    measures = {name: timed(load) for name, load in loads.items()}
    for measure in measures.values():
        measure()
    results = harness.rounds(measures, options.rounds)
    harness.report(f"Restoring {megabytes} MB", "s", results, options.json)
    harness.ratios(
        results, options.json, "Orbax v1, best settings", "numpy, from one file"
    )
    for way in ways.values():
        way.close()
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
