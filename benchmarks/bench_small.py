"""What does a small model pay, that improves again and again?

25 leaves, 100 KB in all: how long a call to save blocks; and a loop of 200 steps of
2 ms in which 20 improve, saving the best to one path, against the loop without saves.
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
import numpy as np
import peers

import flaxckpt

absl.logging.set_verbosity(absl.logging.ERROR)
STEPS, STEP_SECS = 200, 0.002


def main() -> None:
    options = harness.arguments(__doc__)
    keys = jax.random.split(jax.random.key(0), 25)
    tree = {f"w{i:02}": jax.random.normal(keys[i], (32, 32)) for i in range(25)}
    root = Path(tempfile.mkdtemp(prefix="flaxckpt-bench-"))
    names = ["flaxckpt", "Orbax v1 Checkpointer", "Flax msgpack", "safetensors"]
    ways = peers.make_all(root, names)
    step = 0

    def blocked(way):
        def measure():
            nonlocal step
            times = []
            for _ in range(5):
                step += 1
                start = time.perf_counter()
                way.save(tree, step)
                times.append(time.perf_counter() - start)
                way.wait()
            return statistics.median(times) * 1e3

        return measure

    calls = {name: blocked(way) for name, way in ways.items()}
    for call in calls.values():
        call()
    results = harness.rounds(calls, options.rounds)
    harness.report("Blocked per save, 25 leaves of 4 KB", "ms", results, options.json)

    losses = np.linspace(1, 2, STEPS)
    losses[:: STEPS // 20] = np.linspace(0.9, 0.1, 20)  # 20 that improve

    def train(save):
        """Run the loop; a step is 2 ms of work that depends on the one before."""
        current = jax.tree.map(jnp.copy, tree)
        start = time.perf_counter()
        for index, loss in enumerate(losses):
            until = time.perf_counter() + STEP_SECS
            current = advance(current)
            while time.perf_counter() < until:
                pass
            save(index, current, loss)
        return time.perf_counter() - start

    advance = jax.jit(lambda t: jax.tree.map(lambda w: w * 0.999, t), donate_argnums=0)

    def alone():
        return train(lambda index, current, loss: None)

    def with_flaxckpt():
        path = root / "best"
        with flaxckpt.ModelCheckpoint(path, "loss", save_best_only=True) as ckpt:
            state = ckpt.init()

            def save(index, current, loss):
                nonlocal state
                state = ckpt.update(state, current, {"loss": loss}, index)

            return train(save)

    def with_peer(way):
        def measure():
            best = np.inf

            def save(index, current, loss):
                nonlocal best, step
                if loss < best:
                    best, step = loss, step + 1
                    way.save(current, step)

            took = train(save)
            way.wait()
            return took

        return measure

    loops = {"without saves": alone, "flaxckpt": with_flaxckpt}
    loops |= {name: with_peer(ways[name]) for name in names[1:]}
    for loop in loops.values():
        loop()
    results = harness.rounds(loops, options.rounds)
    title = f"{STEPS} steps of 2 ms, 20 of them improve"
    harness.report(title, "s", results, options.json)
    added = harness.median_ratio(results["flaxckpt"], results["without saves"]) - 1
    harness.note(f"flaxckpt adds {added:+.1%} to the loop", options.json)
    for way in ways.values():
        way.close()
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
