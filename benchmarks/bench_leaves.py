"""What do many small leaves cost?

100 to 10,000 leaves of 32 float32 each: how long each of the first two calls that save
blocks, and a later one; how long a later save takes until it is on disk; and how long a
restore takes. Each in a process of its own, since the first calls compile programs.
flaxckpt is there twice: saving at once, and 2 s after `init(like=...)`, as behind a
first epoch.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
import jax
import numpy as np

WAYS = ["flaxckpt", "flaxckpt, like known", "Orbax v1 save_async"]
ASKED = [
    "blocked in the first call",
    "blocked in the second call",
    "blocked in a later call",
    "until on disk",
    "restore",
]
CHILD = "child"


class Flaxckpt:
    """flaxckpt, in its default settings."""

    def __init__(self, directory: Path, like=None) -> None:
        import flaxckpt

        self._ckpt = flaxckpt.ModelCheckpoint(directory / "last")
        if like is not None:
            self._ckpt.init(like)
            time.sleep(2)

    def save(self, tree, step):
        self._ckpt.save(tree, step)

    def wait(self):
        self._ckpt.wait()

    def load(self, like):
        return self._ckpt.restore(like).tree


class OrbaxAsync:
    """Orbax's v1 `save_async` and `load`, replacing one checkpoint."""

    def __init__(self, directory: Path) -> None:
        from orbax.checkpoint import v1

        self._v1, self._path = v1, directory / "last"

    def save(self, tree, step):
        self._running = self._v1.save_async(self._path, tree, overwrite=True)

    def wait(self):
        self._running.result()

    def load(self, like):
        return self._v1.load(self._path, like)


def child(way: str, number: int, directory: Path) -> None:
    """Save and restore, and print what each step took, in ms."""
    import absl.logging

    absl.logging.set_verbosity(absl.logging.ERROR)
    values = np.random.default_rng(0).standard_normal((number, 32), np.float32)
    tree = {f"w{index:05}": jax.device_put(row) for index, row in enumerate(values)}
    like = harness.like(tree)
    known = like if way == "flaxckpt, like known" else None
    is_own = way.startswith("flaxckpt")
    saver = Flaxckpt(directory, known) if is_own else OrbaxAsync(directory)
    step = jax.jit(lambda x: x + 1)
    blocked, until = [], []
    for epoch in range(7):
        tree = jax.block_until_ready({name: step(x) for name, x in tree.items()})
        start = time.perf_counter()
        saver.save(tree, epoch)
        blocked.append((time.perf_counter() - start) * 1e3)
        saver.wait()
        until.append((time.perf_counter() - start) * 1e3)
    restores = []
    for _ in range(3):
        start = time.perf_counter()
        found = jax.block_until_ready(saver.load(like))
        restores.append((time.perf_counter() - start) * 1e3)
    assert all(map(np.array_equal, tree.values(), found.values()))
    first, second, *later = blocked
    took = [first, second, *map(statistics.median, (later, until[2:], restores))]
    print(json.dumps(dict(zip(ASKED, took, strict=True))))


def main() -> None:
    if sys.argv[1:2] == [CHILD]:
        child(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
        return
    options = harness.arguments(__doc__)
    root = Path(tempfile.mkdtemp(prefix="flaxckpt-bench-"))
    for number in (100,) if options.quick else (100, 1000, 3000, 10_000):
        found = {f"{way}: {asked}": [] for asked in ASKED for way in WAYS}

        def measured(way, number=number, found=found):
            def measure():
                directory = root / "run"
                directory.mkdir()
                command = [sys.executable, "-W", "ignore", __file__, CHILD, way]
                command += [str(number), str(directory)]
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
                shutil.rmtree(directory)
                took = json.loads(done.stdout.splitlines()[-1])
                for asked, each in took.items():
                    found[f"{way}: {asked}"].append(each)
                return 0.0

            return measure

        harness.rounds({way: measured(way) for way in WAYS}, options.rounds)
        title = f"{number} leaves of 32 float32"
        harness.report(title, "ms", found, options.json)
        for asked in ASKED:
            one, known, other = (found[f"{way}: {asked}"] for way in WAYS)
            at_once = harness.median_ratio(one, other)
            later = harness.median_ratio(known, other)
            harness.note(
                f"{asked}: {at_once:.2g} times Orbax v1 save_async, and {later:.2g} "
                "times with `like` known",
                options.json,
            )
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
