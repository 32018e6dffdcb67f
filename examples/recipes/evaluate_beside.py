"""Evaluate each checkpoint in a process of its own, beside the training.

    python examples/recipes/evaluate_beside.py [DIRECTORY]

The training saves each epoch and keeps the two newest. The evaluation sees each
checkpoint once it is on disk, and ends when the run is marked as ended.
"""

import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp

import flaxckpt

X = jax.random.normal(jax.random.key(0), (256, 4))
Y = X @ jnp.array([1.0, -2.0, 3.0, -4.0])


def loss_of(w, rows):
    return jnp.mean((X[rows] @ w - Y[rows]) ** 2)


def train(directory):
    w = jnp.zeros(4)
    path = f"{directory}/{{epoch:02d}}"
    with flaxckpt.ModelCheckpoint(path, max_to_keep=2) as ckpt:
        state = ckpt.init()
        for epoch in range(10):
            w = w - 0.2 * jax.grad(loss_of)(w, slice(200))
            time.sleep(0.3)  # so long an epoch is
            state = ckpt.update(state, w, {}, epoch)
        ckpt.finish()


def evaluate(directory):
    losses = {}
    for info in flaxckpt.watch(directory, poll_secs=0.1):
        try:
            w = flaxckpt.load(info)
        except flaxckpt.CheckpointNotFoundError:
            continue  # deleted meanwhile
        losses[info.epoch] = loss_of(w, slice(200, None))
    last = max(losses)
    print(f"evaluated {len(losses)} checkpoints; the last: {losses[last]:.4f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        directory, *job = sys.argv[1:] or [temporary]
        if job:
            train(directory)
        else:
            training = subprocess.Popen([sys.executable, __file__, directory, "train"])
            evaluate(directory)
            assert training.wait() == 0
