"""Fine-tune a trained model with a new head.

    python examples/recipes/fine_tune.py [DIRECTORY]

A classifier of five digits is trained and saved. A classifier of ten digits then takes
all of its weights but the head, and trains on.
"""

import sys
import tempfile

import jax
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import flaxckpt

IMAGES, LABELS = load_digits(return_X_y=True)
IMAGES = IMAGES.astype("float32") / 16


class Classifier(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(64, name="body")(x))
        return nn.Dense(self.classes, name="head")(x)


def make_train(classes):
    model = Classifier(classes)
    params = model.init(jax.random.key(classes), IMAGES[:1])["params"]
    return TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-2))


def loss_of(params, train, images, labels):
    logits = train.apply_fn({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def train_step(train, images, labels):
    loss, grads = jax.value_and_grad(loss_of)(train.params, train, images, labels)
    return train.apply_gradients(grads=grads), loss


def fit(train, images, labels, epochs):
    for _ in range(epochs):
        train, loss = train_step(train, images, labels)
    return train, loss


def pretrain(directory):
    few = LABELS < 5
    train, loss = fit(make_train(5), IMAGES[few], LABELS[few], epochs=50)
    with flaxckpt.ModelCheckpoint(f"{directory}/base") as ckpt:
        ckpt.save(train, epoch=49, logs={"loss": loss})


def fine_tune(directory):
    train = make_train(10)
    base = f"{directory}/base"
    loaded = flaxckpt.load_weights(base, like=train, partial=True)
    train = train.replace(params=loaded["params"])
    before = loss_of(train.params, train, IMAGES, LABELS)
    train, loss = fit(train, IMAGES, LABELS, epochs=50)
    print(f"with the new head: loss {before:.3f}, and {loss:.3f} after 50 epochs")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        directory = sys.argv[1] if sys.argv[1:] else temporary
        pretrain(directory)
        fine_tune(directory)
