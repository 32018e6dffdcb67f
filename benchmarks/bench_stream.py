"""What does a scan pay that saves while it runs?

1000 steps of some 1 ms in one jitted scan, of which every 100th improves, on a state of
10 MB in 25 arrays: `update` in the scan, against the same scan without. Beside it what
people do today: a Python loop that looks at the metric after every step, and has Orbax
save where it improves.
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
EVERY = 100


def main() -> None:
    options = harness.arguments(__doc__)
    steps = 200 if options.quick else 1000
    tree = harness.tree_of(10)
    x = jax.random.normal(jax.random.key(1), (128, 512))
    w = jax.random.normal(jax.random.key(2), (512, 512)) / 23
    indices = jnp.arange(steps)
    root = Path(tempfile.mkdtemp(prefix="flaxckpt-bench-"))

    def step(tree, index):
        """Some 1 ms of arithmetic, and a small change to one array."""
        y = x + tree["w00"][0, 0]  # or the compiler does it once for all steps
        for _ in range(work):
            y = jnp.tanh(y @ w)
        tree = {**tree, "w00": tree["w00"] + 1e-6 * y.mean()}
        return tree, jnp.where(index % EVERY == 0, -index.astype(float), 1.0)

    work = work_for(lambda number: calibrated(x, w, number))

    def body(carry, index):
        carry, loss = step(carry, index)
        return carry, loss

    alone = jax.jit(lambda tree: jax.lax.scan(body, tree, indices))
    ckpt = flaxckpt.ModelCheckpoint(root / "best", "loss", save_best_only=True)

    def body_with_update(carry, index):
        tree, state = carry
        tree, loss = step(tree, index)
        return (tree, ckpt.update(state, tree, {"loss": loss}, index)), loss

    with_update = jax.jit(
        lambda tree, state: jax.lax.scan(body_with_update, (tree, state), indices)
    )
    one = jax.jit(step)

    def run_alone():
        return timed(lambda: jax.block_until_ready(alone(tree)))

    def run_with_update():
        took = timed(lambda: jax.block_until_ready(with_update(tree, ckpt.init())))
        ckpt.wait()
        return took

    def run_loop(way):
        def loop():
            current, best = tree, np.inf
            for index in range(steps):
                current, loss = one(current, jnp.int32(index))
                if float(loss) < best:
                    best = float(loss)
                    if way is not None:
                        way.save(current, loop.saved)
                    loop.saved += 1
            jax.block_until_ready(current)

        loop.saved = 0

        def measure():
            took = timed(loop)
            if way is not None:
                way.wait()
            return took

        return measure

    names = ["Orbax v0 CheckpointManager", "Orbax v1 Checkpointer"]
    ways = peers.make_all(root, names)
    candidates = {"scan alone": run_alone, "scan with update": run_with_update}
    candidates["Python loop alone"] = run_loop(None)
    for name, way in ways.items():
        candidates[f"Python loop, {name}"] = run_loop(way)
    for candidate in 2 * list(candidates.values()):
        candidate()
    results = harness.rounds(candidates, options.rounds)
    harness.report(
        f"{steps} steps in one jit, {steps // EVERY} save", "s", results, options.json
    )
    median = {name: statistics.median(values) for name, values in results.items()}
    copying = copies(tree, steps // EVERY)
    harness.note(
        f"A step takes {median['scan alone'] / steps * 1e3:.2f} ms.", options.json
    )
    harness.note(f"The copies by themselves take {copying * 1e3:.1f} ms.", options.json)
    added = harness.median_ratio(results["scan with update"], results["scan alone"]) - 1
    harness.note(f"Saving from within the scan adds {added:+.1%}", options.json)
    less = statistics.median(
        (a - copying) / b - 1
        for a, b in zip(results["scan with update"], results["scan alone"], strict=True)
    )
    harness.note(f"but for the copies {less:+.1%}", options.json)
    for name in names:
        ratio = median["scan with update"] / median[f"Python loop, {name}"]
        harness.note(
            f"scan with update: {ratio:.2f} times the Python loop with {name}",
            options.json,
        )
    for way in ways.values():
        way.close()
    ckpt.close()
    shutil.rmtree(root)


def timed(function):
    harness.settle()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def calibrated(x, w, number):
    """Time a step of so many products."""

    def body(y, _):
        for _ in range(number):
            y = jnp.tanh(y @ w)
        return y, None

    run = jax.jit(lambda y: jax.lax.scan(body, y, None, length=50)[0])
    jax.block_until_ready(run(x))
    return min(timed(lambda: jax.block_until_ready(run(x))) for _ in range(5)) / 50


def work_for(cost, goal=1e-3):
    """Return how many products make a step of a millisecond."""
    return max(round(goal / (cost(4) / 4)), 1)


def copies(tree, number):
    """Time what the host has to do while the program waits: copy the state."""
    arrays = [np.asarray(leaf) for leaf in tree.values()]
    memory = [np.empty_like(array) for array in arrays]

    def copy():
        for _ in range(number):
            for target, array in zip(memory, arrays, strict=True):
                np.copyto(target, array)

    copy()
    return statistics.median(timed(copy) for _ in range(5))


if __name__ == "__main__":
    main()
