"""What does a whole training pay that runs in one jit and keeps its best on disk?

195 updates of PPO on CartPole, as `examples/ppo.py` trains, in one jitted scan: with
`update` in the scan, and without. Its episodes get longer as it learns, so every few
updates one of them is the best so far, and is saved.
"""

import dataclasses
import shutil
import sys
import tempfile
import time
from pathlib import Path

import harness
import jax
import jax.numpy as jnp
import optax

import flaxckpt

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import ppo


def main() -> None:
    options = harness.arguments(__doc__)
    updates = 20 if options.quick else 195
    root = Path(tempfile.mkdtemp(prefix="flaxckpt-bench-"))
    ckpt = flaxckpt.ModelCheckpoint(
        root / "best",
        "episodic_return",
        mode="max",
        save_best_only=True,
        overwrite=True,  # each round begins anew
    )
    model, key = ppo.ActorCritic(), jax.random.key(0)
    steps = updates * ppo.PASSES * ppo.BATCHES
    train = ppo.Training.create(
        apply_fn=model.apply,
        params=model.init(key, jnp.zeros(4))["params"],
        tx=optax.adam(optax.linear_schedule(ppo.RATE, 0, steps)),
        key=key,
        envs=ppo.begin(key),
    ).replace(step=jnp.int32(0))

    def alone(train, _):
        return ppo.update(train)

    def saving(carry, epoch):
        train, returned = ppo.update(carry[0])
        logs = {"episodic_return": returned}
        return (train, ckpt.update(carry[1], train, logs, epoch)), returned

    epochs, run = jnp.arange(updates), jax.jit(jax.lax.scan, static_argnums=0)

    def timed(body, carry):
        start = time.perf_counter()
        jax.block_until_ready(run(body, carry, epochs))
        took = time.perf_counter() - start
        ckpt.wait()
        return took

    candidates = {
        "scan alone": lambda: timed(alone, train),
        "scan with update": lambda: timed(saving, (train, ckpt.init())),
    }
    for candidate in candidates.values():
        candidate()
    first = dataclasses.replace(ckpt.counts)
    results = harness.rounds(candidates, options.rounds)
    harness.report(f"PPO: {updates} updates in one jit", "s", results, options.json)
    last = ckpt.counts
    better = last.saved + last.superseded - first.saved - first.superseded
    ratio = harness.median_ratio(results["scan with update"], results["scan alone"])
    harness.note(
        f"update makes it {ratio:.3f} times as long, "
        f"and {better // options.rounds} updates are the best so far",
        options.json,
    )
    ckpt.close()
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
