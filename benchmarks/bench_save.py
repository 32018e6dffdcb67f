"""How long until a save is on disk?

From the call to the moment when it is durable, for few large arrays and many small
ones. Only flaxckpt and "raw write + fsync" wait for the disk; the others are done when
they say so.
"""

import shutil
import tempfile
import time
from pathlib import Path

import absl.logging
import bench_loop
import harness
import peers

absl.logging.set_verbosity(absl.logging.ERROR)


def main() -> None:
    options = harness.arguments(__doc__)
    root = Path(tempfile.mkdtemp(prefix="flaxckpt-bench-"))
    trees = bench_loop.QUICK if options.quick else bench_loop.TREES
    trees = {title: tree for title, tree in trees.items() if "16 MB" not in title}
    for title, (leaves, shape) in trees.items():
        if options.only in title:
            measure(title, bench_loop.make_tree(leaves, shape), root, options)
    shutil.rmtree(root)


def measure(title, tree, root, options) -> None:
    slow = ("Keras OrbaxCheckpoint", "Orbax v1, best settings")
    left_out = slow if "of 4 KB" in title else ()
    names = options.peers or [name for name in peers.ALL if name not in left_out]
    ways = peers.make_all(root, names)
    step = 0

    def saved(way):
        def measure():
            nonlocal step
            step += 1
            harness.settle()
            start = time.perf_counter()
            way.save(tree, step)
            way.wait()
            return time.perf_counter() - start

        return measure

    saves = {name: saved(way) for name, way in ways.items()}
    for name, save in saves.items():
        for _ in range(3 if name == "flaxckpt" else 1):
            save()  # compiles, learns Orbax's form, and has a spare to write over
    results = harness.rounds(saves, options.rounds)
    harness.report(f"{title}: a save, until on disk", "s", results, options.json)
    harness.ratios(results, options.json, "raw write + fsync", "Orbax v1 Checkpointer")
    for way in ways.values():
        way.close()


if __name__ == "__main__":
    main()
