"""Stop a training that has ceased to improve, also if it was interrupted.

    python examples/recipes/early_stopping.py [DIRECTORY]

`state.stale` counts the checks since the validation loss last improved. It is saved
with the state, so a run that is resumed stops at the same epoch.
"""

import sys
import tempfile

import jax
import jax.numpy as jnp
import optax

import flaxckpt

PATIENCE = 5
X = jax.random.normal(jax.random.key(0), (128, 48))
Y = X[:, 0] + jax.random.normal(jax.random.key(1), (128,)) / 2
OPTIMIZER = optax.sgd(0.1, momentum=0.5)


def loss_of(w, rows):
    return jnp.mean((X[rows] @ w - Y[rows]) ** 2)


@jax.jit
def train_epoch(w, moments):
    grads = jax.grad(loss_of)(w, slice(64))
    updates, moments = OPTIMIZER.update(grads, moments)
    w = optax.apply_updates(w, updates)
    return w, moments, loss_of(w, slice(64, None))


def train(directory, stop_before=100):
    w = jnp.zeros(48)
    tree = w, OPTIMIZER.init(w)
    path = f"{directory}/best"
    with flaxckpt.ModelCheckpoint(path, save_best_only=True, save_last=True) as ckpt:
        (w, moments), state, epoch = ckpt.resume(tree)
        while int(state.stale) < PATIENCE and epoch < stop_before:
            w, moments, loss = train_epoch(w, moments)
            state = ckpt.update(state, (w, moments), {"val_loss": loss}, epoch)
            epoch += 1
    return epoch, ckpt.best


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        directory = sys.argv[1] if sys.argv[1:] else temporary
        whole, best = train(f"{directory}/whole")
        train(f"{directory}/interrupted", stop_before=whole - 2)
        resumed, _ = train(f"{directory}/interrupted")
        print(f"stopped after epoch {whole}, and after a break after epoch {resumed}")
        print(f"the best: epoch {best.epoch + 1}, {best.logs['val_loss']:.3f}")
