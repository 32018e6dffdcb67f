"""What does a scan pay that carries a `Snapshot`, where nothing improves?

1000 steps of some 100 microseconds in one jitted scan with donated carry, on a state
of 10 MB in 25 arrays: `take` in each step, where none is better than the first, against
the same scan without. Beside it a `jnp.where` over the leaves, as people write it.
"""

import time

import harness
import jax
import jax.numpy as jnp

import flaxckpt


def main() -> None:
    options = harness.arguments(__doc__)
    steps = 200 if options.quick else 1000
    x = jax.random.normal(jax.random.key(1), (64, 256))
    w = jax.random.normal(jax.random.key(2), (256, 256)) / 16
    indices = jnp.arange(steps)
    tree = harness.tree_of(10)

    def step(tree, index):
        """Some 100 us of arithmetic, and a small change to one array."""
        y = x + tree["w00"][0, 0]  # or the compiler does it once for all steps
        for _ in range(work):
            y = jnp.tanh(y @ w)
        row = tree["w00"][0] + 1e-6 * y.mean()
        return {**tree, "w00": tree["w00"].at[0].set(row)}, 1.0 + index + y.mean()

    def alone(carry, index):
        tree, kept = carry
        tree, loss = step(tree, index)
        return (tree, kept), loss

    def with_take(carry, index):
        tree, snapshot = carry
        tree, loss = step(tree, index)
        return (tree, snapshot.take(True, tree, {"loss": loss}, index)), loss

    def with_where(carry, index):
        tree, (best, kept) = carry
        tree, loss = step(tree, index)
        kept = jax.tree.map(lambda a, b: jnp.where(loss < best, a, b), tree, kept)
        return (tree, (jnp.minimum(loss, best), kept)), loss

    def kept(keep):
        """Return a snapshot that is full of what is better than all that comes."""
        snapshot = flaxckpt.Snapshot.like(tree, {"loss": 0.0}, keep)
        for index in range(keep):
            snapshot = snapshot.take(True, tree, {"loss": -9.0 - index}, index)
        return snapshot

    work = work_for(lambda number: calibrated(x, w, number))
    bodies = {
        "scan alone": (alone, kept(1)),
        "with take, keep=1": (with_take, kept(1)),
        "with take, keep=3": (with_take, kept(3)),
        "with jnp.where": (with_where, (jnp.float32(-9), kept(1).trees[0])),
    }
    candidates = {name: scan(*each, tree, indices) for name, each in bodies.items()}
    for candidate in 2 * list(candidates.values()):
        candidate()
    results = harness.rounds(candidates, options.rounds)
    harness.report(f"{steps} steps, none improves", "s", results, options.json)
    base = results["scan alone"]
    harness.note(f"A step takes {min(base) / steps * 1e6:.0f} us.", options.json)
    for name in list(candidates)[1:]:
        added = harness.median_ratio(results[name], base) - 1
        harness.note(f"{name}: adds {added:+.1%}", options.json)


def scan(body, extra, tree, indices):
    """Return what runs a scan on what the run before has left, and times it."""
    run = jax.jit(lambda carry: jax.lax.scan(body, carry, indices), donate_argnums=0)
    carry = [jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), (tree, extra))]

    def measure():
        start = time.perf_counter()
        carry[0], losses = run(carry[0])
        jax.block_until_ready((carry[0], losses))
        return time.perf_counter() - start

    return measure


def calibrated(x, w, number):
    """Time a step of so many products."""

    def body(y, _):
        for _ in range(number):
            y = jnp.tanh(y @ w)
        return y, None

    run = jax.jit(lambda y: jax.lax.scan(body, y, None, length=200)[0])
    jax.block_until_ready(run(x))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(run(x))
        times.append(time.perf_counter() - start)
    return min(times) / 200


def work_for(cost, goal=1e-4):
    """Return how many products make a step of 100 microseconds."""
    return max(round(goal / (cost(2) / 2)), 1)


if __name__ == "__main__":
    main()
