"""Evaluate each checkpoint in a process of its own, beside the training.

    python examples/recipes/peers/evaluate_beside_orbax.py [DIRECTORY]

The same as ../evaluate_beside.py with Orbax's CheckpointManager. Orbax does not
mark a run as ended, so the evaluation asks whether the process of the training lives.
"""

import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

X = jax.random.normal(jax.random.key(0), (256, 4))
Y = X @ jnp.array([1.0, -2.0, 3.0, -4.0])


def loss_of(w, rows):
    return jnp.mean((X[rows] @ w - Y[rows]) ** 2)


def train(directory):
    w = jnp.zeros(4)
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(directory, options=options) as manager:
        for epoch in range(10):
            w = w - 0.2 * jax.grad(loss_of)(w, slice(200))
            time.sleep(0.3)  # so long an epoch is
            manager.save(epoch, args=ocp.args.StandardSave({"w": w}))


def evaluate(directory, training):
    losses = {}
    like = {"w": jax.ShapeDtypeStruct((4,), jnp.float32)}
    with ocp.StandardCheckpointer() as checkpointer:
        for epoch in ocp.checkpoint_utils.checkpoints_iterator(
            directory,
            seconds_to_sleep=0.1,
            timeout=1,
            timeout_fn=lambda: training.poll() is not None,
        ):
            path = f"{directory}/{epoch}/default"
            try:
                w = checkpointer.restore(path, like)["w"]
            except FileNotFoundError:
                continue  # deleted meanwhile
            losses[epoch] = loss_of(w, slice(200, None))
    last = max(losses)
    print(f"evaluated {len(losses)} checkpoints; the last: {losses[last]:.4f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        directory, *job = sys.argv[1:] or [temporary]
        if job:
            train(directory)
        else:
            training = subprocess.Popen([sys.executable, __file__, directory, "train"])
            evaluate(directory, training)
            assert training.wait() == 0
