"""How much memory do saves take?

The peak of a process's resident memory over a loop with saves, less that of the same
loop without, in units of the state's size; each in a process of its own.
"""

import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import harness

NAMES = ["flaxckpt", "Orbax v1, best settings"]
CHILD = "child"


def child(name: str, megabytes: int, directory: Path) -> None:
    """Run the loop, and print the peak in MB."""
    import absl.logging

    absl.logging.set_verbosity(absl.logging.ERROR)
    import bench_loop
    import peers

    rows = megabytes * 2**20 // 25 // 4 // 1024
    tree = bench_loop.make_tree(25, (rows, 1024))
    loop = bench_loop.Loop(tree)
    way = peers.make(name, directory) if name else None
    loop.run(way)
    if way is not None:
        way.close()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    if sys.argv[1:2] == [CHILD]:
        child(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
        return
    options = harness.arguments(__doc__)
    megabytes = 25 if options.quick else 400
    root = Path(tempfile.mkdtemp(prefix="flaxckpt-bench-"))

    def peak(name):
        command = [sys.executable, "-W", "ignore", __file__, CHILD, name]
        command += [str(megabytes), str(root)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return float(done.stdout.split()[-1])

    alone: list[float] = []

    def measured(name):
        return lambda: (peak(name) - alone[-1]) / megabytes

    def without():
        alone.append(peak(""))
        return 0.0

    without()
    ways = {"without saves": without} | {name: measured(name) for name in NAMES}
    results = harness.rounds(ways, options.rounds)
    title = f"Peak memory that saves add, state of {megabytes} MB"
    harness.report(title, "times the state", results, options.json)
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
