"""What does `step` cost in a jitted scan?

Baseline: a scan of tiny training steps whose loss is compared with nothing. Beside it
the same scan with `step` and `save_best_only`, and with the best kept by hand, the
least that any such decision can cost.
"""

import time

import harness
import jax
import jax.numpy as jnp
import numpy as np

import flaxckpt


def train_step(w, x):
    """Return new weights and the loss: an update of 16 numbers."""
    loss = jnp.sum((w - x) ** 2)
    return w - 0.01 * (w - x), loss


def plain(w, xs):
    def body(w, x):
        return train_step(w, x)

    return jax.lax.scan(body, w, xs)


def by_hand(w, xs):
    def body(carry, x):
        w, best = carry
        w, loss = train_step(w, x)
        save = loss < best
        return (w, jnp.where(save, loss, best)), (loss, save)

    return jax.lax.scan(body, (w, jnp.float32(np.inf)), xs)


def with_step(save_freq):
    first = flaxckpt.CheckpointState.create(
        "loss", save_best_only=True, save_freq=save_freq
    )

    def run(w, xs):
        def body(carry, inputs):
            w, state = carry
            index, x = inputs
            w, loss = train_step(w, x)
            batch = None if save_freq == "epoch" else index
            epoch = index if batch is None else 0
            state, save = flaxckpt.step(state, {"loss": loss}, epoch, batch)
            return (w, state), (loss, save)

        indices = jnp.arange(len(xs), dtype=jnp.int32)
        return jax.lax.scan(body, (w, first), (indices, xs))

    return run


def main() -> None:
    options = harness.arguments(__doc__)
    steps = 10_000
    xs = jax.random.normal(jax.random.key(0), (steps, 16))
    w = jnp.zeros(16)
    scans = {
        "scan alone": plain,
        "best kept by hand": by_hand,
        'step, save_freq="epoch"': with_step("epoch"),
        "step, save_freq=10": with_step(10),
    }
    repeats = 3 if options.quick else 30

    def timed(run):
        compiled = jax.jit(run).lower(w, xs).compile()
        jax.block_until_ready(compiled(w, xs))

        def measure():
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                jax.block_until_ready(compiled(w, xs))
                times.append(time.perf_counter() - start)
            return sorted(times)[len(times) // 2] / steps * 1e9

        return measure

    results = harness.rounds(
        {name: timed(run) for name, run in scans.items()}, options.rounds
    )
    harness.report("A step of a jitted scan", "ns a step", results, options.json)
    base = results.pop("scan alone")
    added = {
        name: [value - b for value, b in zip(values, base, strict=True)]
        for name, values in results.items()
    }
    harness.report("What each adds", "ns a step", added, options.json)


if __name__ == "__main__":
    main()
