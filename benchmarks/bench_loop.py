"""Who adds a checkpoint to a training loop: what does the loop lose?

The loop is timed, not the call: a donated training step that keeps all cores busy, a
save every 10 steps. Slowdown is the wall time of the loop with saves less that without,
per save; blocked is the time in the calls to save; the longest step is in units of the
median step. The parts of one round run in turn, each in the same process.
"""

import shutil
import statistics
import tempfile
import time
from pathlib import Path

import absl.logging
import harness
import jax
import jax.numpy as jnp
import peers

absl.logging.set_verbosity(absl.logging.ERROR)
STEPS, EVERY = 20, 10
TREES = {  # name: leaves, shape
    "25 leaves of 4 MB": (25, (1024, 1024)),
    "25 leaves of 16 MB": (25, (4096, 1024)),
    "1000 leaves of 4 KB": (1000, (32, 32)),
}
# Those that are far from the best are measured where it takes little time.
FAST = ("flaxckpt", "Keras ModelCheckpoint", "safetensors", "raw write")
LEFT_OUT = {
    "of 4 MB": (),
    "of 16 MB": (
        "Flax msgpack",
        "Keras OrbaxCheckpoint",
        "Orbax v0 CheckpointManager",
        "Orbax v1 Checkpointer",
        "Keras ModelCheckpoint",
        "raw write + fsync",
    ),
    "of 4 KB": (
        "Flax msgpack",
        "Keras OrbaxCheckpoint",
        "Orbax v0 CheckpointManager",
        "Orbax v1, best settings",
        "raw write + fsync",
    ),
}
QUICK = {"25 leaves of 4 KB": (25, (32, 32))}


def make_tree(leaves, shape):
    keys = jax.random.split(jax.random.key(0), leaves)
    tree = {f"w{i:04}": jax.random.normal(keys[i], shape) for i in range(leaves)}
    return jax.block_until_ready(tree)


@jax.jit
def copy(tree):
    return jax.tree.map(jnp.copy, tree)


def make_step():
    """Make a step without large temporary arrays, whose page faults would hide all."""

    def step(tree, x):
        def update(w):
            size = min(x.shape[1], w.shape[0])
            y = jnp.tanh(x[:, :size] @ w[:size])
            return w * 0.999 + 1e-4 * y.mean(0), y.sum()

        pairs = {name: update(w) for name, w in tree.items()}
        new = {name: w for name, (w, _) in pairs.items()}
        return new, sum(loss for _, loss in pairs.values())

    return jax.jit(step, donate_argnums=0)


class Loop:
    """The training loop, with or without saves."""

    def __init__(self, tree) -> None:
        self._tree, self._step = tree, make_step()
        self._saved = 0
        self._x = jax.random.normal(jax.random.key(1), (32, 1024))

    def run(self, peer=None):
        """Run it once; return its wall time, the times of steps, and of saves."""
        tree = copy(self._tree)
        tree, loss = self._step(tree, self._x)
        jax.block_until_ready((tree, loss))
        steps, saves = [], []
        start = time.perf_counter()
        for index in range(STEPS):
            before = time.perf_counter()
            tree, loss = self._step(tree, self._x)
            loss.block_until_ready()
            if peer is not None and index % EVERY == EVERY // 2:
                called = time.perf_counter()
                self._saved += 1
                peer.save(tree, self._saved)
                saves.append(time.perf_counter() - called)
            steps.append(time.perf_counter() - before)
        jax.block_until_ready(tree)
        took = time.perf_counter() - start
        if peer is not None:
            peer.wait()
        return took, steps, saves


def main() -> None:
    options = harness.arguments(__doc__)
    root = Path(tempfile.mkdtemp(prefix="flaxckpt-bench-"))
    trees = QUICK if options.quick else TREES
    trees = {name: tree for name, tree in trees.items() if options.only in name}
    for title, (leaves, shape) in trees.items():
        measure(title, make_tree(leaves, shape), root, options)
    shutil.rmtree(root)


def measure(title, tree, root, options) -> None:
    loop = Loop(tree)
    (left_out,) = [names for part, names in LEFT_OUT.items() if part in title]
    names = options.peers or [name for name in peers.ALL if name not in left_out]
    running = peers.make_all(root, names)
    loop.run()
    baseline, rough = [], []
    slowdown = {name: [] for name in running}
    blocked = {name: [] for name in running}
    longest = {name: [] for name in running}
    for name, peer in running.items():
        for _ in range(2 if name == "flaxckpt" else 1):
            loop.run(peer)  # what is compiled and made once
    more = 1 if "of 4 MB" in title else 0
    for index in range(options.rounds + more):
        order = list(running)
        if index >= options.rounds:
            order = [name for name in running if name in FAST]
        if index % 2:
            order.reverse()
        alone, with_saves = [], {}
        for position, name in enumerate(order):
            if position % 3 == 0:
                took, times, _ = loop.run()
                alone.append(took)
                rough.append(max(times) / statistics.median(times))
            with_saves[name] = loop.run(running[name])
            harness.settle()
        for name, (took, times, saves) in with_saves.items():
            slowdown[name].append((took - statistics.median(alone)) / len(saves))
            blocked[name].append(statistics.median(saves))
            longest[name].append(max(times) / statistics.median(times))
        baseline.append(statistics.median(alone) / STEPS)
    for peer in running.values():
        peer.close()
    out = options.json
    harness.report(f"{title}: the loop loses, per save", "s", slowdown, out)
    harness.note(f"A step takes {statistics.median(baseline):.4f} s.", out)
    harness.ratios(slowdown, out, best_of(slowdown), "raw write")
    harness.report(f"{title}: blocked, per save", "s", blocked, out)
    harness.ratios(blocked, out, "Orbax v1 Checkpointer")
    longest["without saves"] = rough
    harness.report(f"{title}: longest step", "median steps", longest, out)


def best_of(slowdown):
    """Name the peer that costs the loop least, raw writes aside."""
    peers = [n for n in slowdown if n != "flaxckpt" and not n.startswith("raw")]
    return min(peers, key=lambda name: statistics.median(slowdown[name]), default="")


if __name__ == "__main__":
    main()
