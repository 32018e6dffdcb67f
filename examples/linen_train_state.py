"""Train a Linen `TrainState` in one jitted scan that keeps the best on disk.

    python examples/linen_train_state.py [DIRECTORY]

Kill it, run it again with the same directory, and it ends with the same digest.
"""

import sys
import tempfile
from hashlib import sha256

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

import flaxckpt

EPOCHS = 80


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.relu(nn.Dense(256)(x)))


def cross_entropy(train, params, images, labels):
    logits = train.apply_fn({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train_epoch(train, key, images, labels):
    """Pass over the data once, in batches of 32, in an order drawn from `key`."""
    count = len(labels) // 32
    order = jax.random.permutation(key, len(labels))[: count * 32].reshape(count, 32)

    def body(train, rows):
        grads = jax.grad(cross_entropy, argnums=1)(
            train, train.params, images[rows], labels[rows]
        )
        return train.apply_gradients(grads=grads), None

    return jax.lax.scan(body, train, order)[0]


def accuracy(train, images, labels):
    logits = train.apply_fn({"params": train.params}, images)
    return jnp.mean(logits.argmax(axis=-1) == labels)


def main(directory):
    digits = load_digits()
    images = jnp.asarray(digits.data / 16, jnp.float32)
    labels = jnp.asarray(digits.target, jnp.int32)
    held_out, rest = slice(None, 300), slice(300, None)

    model, key = Classifier(), jax.random.key(0)
    params = model.init(key, images[:1])["params"]
    train = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-3))
    train = train.replace(step=jnp.zeros((), jnp.int32))  # a fixed dtype, for the scan

    with flaxckpt.ModelCheckpoint(  # keeps the best, and the newest to go on from
        f"{directory}/best", "val_accuracy", save_best_only=True, save_last=True
    ) as ckpt:
        train, state, start = ckpt.resume(train)
        print("new" if start.is_new else "resumed", "at epoch", start + 1)
        epochs = jnp.arange(start, EPOCHS)

        def body(carry, epoch):
            train, state = carry
            now = jax.random.fold_in(key, epoch)
            train = train_epoch(train, now, images[rest], labels[rest])
            logs = {"val_accuracy": accuracy(train, images[held_out], labels[held_out])}
            return (train, ckpt.update(state, train, logs, epoch)), logs["val_accuracy"]

        run = jax.jit(jax.lax.scan, static_argnums=0)  # all epochs, one program
        (train, state), history = run(body, (train, state), epochs)

    for epoch, val_accuracy in zip(epochs, history, strict=True):
        if epoch % 5 == 0:
            print(f"epoch {epoch + 1}: val_accuracy {val_accuracy:.3f}")
    best = ckpt.best
    print(f"best: epoch {best.epoch + 1}, {best.logs['val_accuracy']:.3f}")
    variables = flaxckpt.load_weights(best.path)  # as Module.apply takes them
    print("its first guess:", model.apply(variables, images[:1]).argmax())
    print("digest:", sha256(ravel_pytree(train.params)[0].tobytes()).hexdigest())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(*sys.argv[1:] or [temporary])
