"""Keep the best of an NNX model and its optimizer, and resume where a run was left.

    python examples/nnx_model.py [DIRECTORY]

Run it twice with the same directory: the second time it finds all epochs done.
"""

import sys
import tempfile

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import flaxckpt

EPOCHS = 6


class Classifier(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


@nnx.jit
def train_step(model, optimizer, images, labels):
    def loss_of(model):
        logits = model(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, grads = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def accuracy(model, images, labels):
    return jnp.mean(model(images).argmax(axis=-1) == labels)


def main(directory):
    digits = load_digits()
    images = jnp.asarray(digits.data / 16, jnp.float32)
    labels = jnp.asarray(digits.target, jnp.int32)
    model = Classifier(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    with flaxckpt.ModelCheckpoint(
        f"{directory}/best", "val_accuracy", save_best_only=True, save_last=True
    ) as ckpt:
        # All that a step depends on: weights, statistics, dropout's key, moments.
        tree = {"model": model, "optimizer": optimizer}
        tree, state, first = ckpt.resume(tree)  # in place
        if first:
            print(f"resumed after epoch {first}")
        for epoch in range(first, EPOCHS):
            order = np.random.default_rng(epoch).permutation(1497)[:1472] + 300
            model.train()
            for rows in order.reshape(-1, 32):
                loss = train_step(model, optimizer, images[rows], labels[rows])
            model.eval()
            logs = {
                "loss": loss,
                "val_accuracy": accuracy(model, images[:300], labels[:300]),
            }
            state = ckpt.update(state, tree, logs, epoch)
            print(f"epoch {epoch + 1}: val_accuracy {logs['val_accuracy']:.3f}")

    best = ckpt.best
    print(f"best: epoch {best.epoch + 1}, {best.logs['val_accuracy']:.3f}")
    fresh = Classifier(nnx.Rngs(9))
    fresh.eval()
    wanted = nnx.state(fresh, nnx.Any(nnx.Param, nnx.BatchStat))
    weights = flaxckpt.load_weights(best.path, {"model": wanted})
    nnx.update(fresh, weights["model"])
    print(f"loaded again: {accuracy(fresh, images[:300], labels[:300]):.3f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(temporary)
