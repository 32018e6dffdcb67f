"""What does a scan pay that saves while it runs?

1000 steps of some 1 ms in one jitted scan, of which every 100th improves: `update` in
the scan, against the same scan without, and against one that only has the host copy the
state at those steps. Once with a small state and a step that one core computes, as
those of small networks are, and beside it what people do today: a Python loop that
looks at the metric after every step, and has Orbax save where it improves. And once
with a larger state and a step that keeps all cores busy, which then have the writing to
do, too.
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
from jax.experimental import io_callback

import flaxckpt

absl.logging.set_verbosity(absl.logging.ERROR)
EVERY = 100
TOKEN = jax.ShapeDtypeStruct((), jnp.int32)
ORBAX = ["Orbax v0 CheckpointManager", "Orbax v1 Checkpointer"]
CASES = {  # name: megabytes of state, rows and width of the products
    "1 MB, steps on one core": (1, (8, 64)),
    "10 MB, steps on all cores": (10, (128, 512)),
}


def main() -> None:
    options = harness.arguments(__doc__)
    root = Path(tempfile.mkdtemp(prefix="flaxckpt-bench-"))
    for title, (megabytes, shape) in CASES.items():
        if options.only in title:
            measure(title, harness.tree_of(megabytes), shape, root, options)
    shutil.rmtree(root)


def measure(title, tree, shape, root, options) -> None:
    steps = 200 if options.quick else 1000
    multiply = multiplier(shape)
    number = jnp.int32(products(multiply))
    indices = jnp.arange(steps)

    def step(tree, index):
        """Some 1 ms of arithmetic, and a small change to one array."""
        y = multiply(tree["w00"][0, 0], number)
        tree = {**tree, "w00": tree["w00"] + 1e-6 * y}
        return tree, jnp.where(index % EVERY == 0, -index.astype(float), 1.0)

    alone = jax.jit(lambda tree: jax.lax.scan(step, tree, indices))
    ckpt = flaxckpt.ModelCheckpoint(root / "best", "loss", save_best_only=True)

    def body(carry, index):
        tree, state = carry
        tree, loss = step(tree, index)
        return (tree, ckpt.update(state, tree, {"loss": loss}, index)), loss

    def scan(tree, state):
        return jax.lax.scan(body, (tree, state), indices)

    memory = [np.empty(leaf.shape, leaf.dtype) for leaf in tree.values()]

    def copy(leaves):
        for target, leaf in zip(memory, leaves, strict=True):
            np.copyto(target, np.asarray(leaf))
        return np.int32(0)

    def body_that_copies(tree, index):
        tree, loss = step(tree, index)
        token = jax.lax.cond(
            index % EVERY == 0,
            lambda: io_callback(copy, TOKEN, list(tree.values())),
            lambda: jnp.int32(0),
        )
        return tree, loss + token

    with_copies = jax.jit(lambda tree: jax.lax.scan(body_that_copies, tree, indices))
    with_update, one = jax.jit(scan), jax.jit(step)

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
                    way.save(current, loop.saved)
                    loop.saved += 1
            jax.block_until_ready(current)

        loop.saved = 0

        def measure():
            took = timed(loop)
            way.wait()
            return took

        return measure

    is_small = "one core" in title
    ways = peers.make_all(root, ORBAX) if is_small else {}
    scans = {
        "scan alone": lambda: timed(lambda: jax.block_until_ready(alone(tree))),
        "scan that copies": lambda: timed(
            lambda: jax.block_until_ready(with_copies(tree))
        ),
        "scan with update": run_with_update,
    }
    loops = {f"Python loop, {name}": run_loop(way) for name, way in ways.items()}
    for candidate in (scans | loops).values():
        candidate()
    results = harness.rounds(scans | loops, options.rounds)
    # What they differ by is little, and needs more rounds than the loops do.
    more = harness.rounds(scans, options.rounds if is_small else 0)
    results |= {name: results[name] + more[name] for name in scans}
    out = options.json
    saves = steps // EVERY
    harness.report(f"{title}: {steps} in one jit, {saves} save", "s", results, out)
    new, old = results["scan with update"], results["scan alone"]
    harness.note(f"A step takes {statistics.median(old) / steps * 1e3:.2f} ms.", out)
    added = harness.median_ratio(new, old) - 1
    copying = harness.median_ratio(results["scan that copies"], old) - 1
    harness.note(
        f"update adds {added:+.1%}, the copies by themselves {copying:+.1%}", out
    )
    for name in ways:
        ratio = statistics.median(new) / statistics.median(
            results[f"Python loop, {name}"]
        )
        harness.note(f"scan with update: {ratio:.2f} times the loop with {name}", out)
    for way in ways.values():
        way.close()
    ckpt.close()


def timed(function):
    harness.settle()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def multiplier(shape):
    """Make a function that computes products, as many as it is told."""
    x = jax.random.normal(jax.random.key(1), shape)
    w = jax.random.normal(jax.random.key(2), (shape[1], shape[1])) / shape[1] ** 0.5

    def multiply(start, number):
        body = lambda _, y: jnp.tanh(y @ w)  # noqa: E731
        return jax.lax.fori_loop(0, number, body, x + start).mean()

    return jax.jit(multiply)


def products(multiply, goal=1e-3):
    """Return how many products take a millisecond."""
    run = lambda: jax.block_until_ready(multiply(0.0, 2000))  # noqa: E731
    run()
    return max(round(goal / (min(timed(run) for _ in range(5)) / 2000)), 1)


if __name__ == "__main__":
    main()
