"""Keep the best of a Linen `TrainState`, and resume where a run was left.

    python examples/linen_train_state.py [DIRECTORY]

Run it twice with the same directory: the second time it finds all epochs done.
"""

import sys
import tempfile

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import flaxckpt

EPOCHS = 8


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x)))


def cross_entropy(train, params, images, labels):
    logits = train.apply_fn({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
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


@jax.jit
def accuracy(train, images, labels):
    logits = train.apply_fn({"params": train.params}, images)
    return jnp.mean(logits.argmax(axis=-1) == labels)


def main(directory):
    digits = load_digits()
    images = jnp.asarray(digits.data / 16, jnp.float32)
    labels = jnp.asarray(digits.target, jnp.int32)
    held_out, rest = slice(None, 300), slice(300, None)

    model = Classifier()
    params = model.init(jax.random.key(0), images[:1])["params"]
    train = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-3))
    train = train.replace(step=jnp.zeros((), jnp.int32))  # a fixed dtype, for the scan

    with flaxckpt.ModelCheckpoint(
        f"{directory}/{{epoch:02d}}-{{val_accuracy:.3f}}",
        monitor="val_accuracy",
        max_to_keep=2,  # the two newest, and the best beside them
    ) as ckpt:
        train, state, first = ckpt.resume(train)
        if first:
            print(f"resumed after epoch {first}")
        for epoch in range(first, EPOCHS):
            key = jax.random.fold_in(jax.random.key(1), epoch)
            train = train_epoch(train, key, images[rest], labels[rest])
            logs = {"val_accuracy": accuracy(train, images[held_out], labels[held_out])}
            state = ckpt.update(state, train, logs, epoch)
            print(f"epoch {epoch + 1}: val_accuracy {logs['val_accuracy']:.3f}")

    print("kept:", ", ".join(info.path.name for info in ckpt.checkpoints))
    print("best:", ckpt.best.path.name)
    variables = flaxckpt.load_weights(ckpt.best.path)  # as Module.apply takes them
    print("its first guess:", model.apply(variables, images[:1]).argmax())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(temporary)
