"""Fine-tune a trained model with a new head.

    python examples/recipes/peers/fine_tune_orbax.py [DIRECTORY]

The same as ../fine_tune.py with Orbax's v1. A leaf of another shape is an error there,
so the program names the parts to load, and puts them into the new parameters.
"""

import sys
import tempfile

import jax
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from orbax.checkpoint import v1 as ocp
from sklearn.datasets import load_digits

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
    train, _ = fit(make_train(5), IMAGES[few], LABELS[few], epochs=50)
    ocp.save(f"{directory}/base", train)


def fine_tune(directory):
    train = make_train(10)
    context = ocp.Context()
    context.pytree_options.loading.partial_load = True
    wanted = {"params": {"body": train.params["body"]}}
    with context:
        loaded = ocp.load(f"{directory}/base", wanted)
    train = train.replace(params={**train.params, **loaded["params"]})
    before = loss_of(train.params, train, IMAGES, LABELS)
    train, loss = fit(train, IMAGES, LABELS, epochs=50)
    print(f"with the new head: loss {before:.3f}, and {loss:.3f} after 50 epochs")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        directory = sys.argv[1] if sys.argv[1:] else temporary
        pretrain(directory)
        fine_tune(directory)
