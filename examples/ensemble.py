"""An ensemble of 32 members trained in one jit, each of which keeps its own best.

Each is a small network with a learning rate of its own. The program carries a
`flaxckpt.Snapshot` for each, with no callback; what they hold is saved afterwards. Run
it twice with the same directory: the second time it finds all members.
"""

import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from sklearn.datasets import load_digits

import flaxckpt

MEMBERS, EPOCHS, HIDDEN, BATCH = 32, 6, 32, 64
digits = load_digits()
IMAGES = jnp.asarray(digits.data / 16, jnp.float32)
LABELS = jnp.asarray(digits.target, jnp.int32)


def fresh(key):
    first, second = jax.random.split(key)
    return {
        "w": jax.random.normal(first, (64, HIDDEN)) / 8,
        "b": jnp.zeros(HIDDEN),
        "out": jax.random.normal(second, (HIDDEN, 10)) / HIDDEN**0.5,
    }


def logits_of(params, images):
    return jax.nn.relu(images @ params["w"] + params["b"]) @ params["out"]


def loss_of(params, images, labels):
    chances = jax.nn.log_softmax(logits_of(params, images))
    return -jnp.take_along_axis(chances, labels[:, None], axis=1).mean()


def accuracy(params):
    return jnp.mean(logits_of(params, IMAGES[:300]).argmax(axis=-1) == LABELS[:300])


def train(key, rate):
    """Train one member; return the best it was, and its accuracy in each epoch."""

    def train_step(params, rows):
        grads = jax.grad(loss_of)(params, IMAGES[rows], LABELS[rows])
        return jax.tree.map(lambda p, g: p - rate * g, params, grads), None

    def train_epoch(carry, epoch):
        params, snapshot = carry
        order = jax.random.permutation(jax.random.fold_in(key, epoch), 1497) + 300
        rows = order[: 1497 // BATCH * BATCH].reshape(-1, BATCH)
        params, _ = jax.lax.scan(train_step, params, rows)
        logs = {"val_accuracy": accuracy(params)}
        return (params, snapshot.take(True, params, logs, epoch)), logs["val_accuracy"]

    params = fresh(key)
    carry = (params, flaxckpt.Snapshot.like(params, {"val_accuracy": 0.0}))
    (_, best), history = jax.lax.scan(train_epoch, carry, jnp.arange(EPOCHS))
    return best, history


def main(directory):
    paths = [Path(directory, f"{member:02d}") for member in range(MEMBERS)]
    if all(path.exists() for path in paths):
        print(f"resumed: all {MEMBERS} members are there")
    else:
        keys = jax.random.split(jax.random.key(0), MEMBERS)
        rates = jnp.logspace(-2, 0, MEMBERS)
        snapshots, history = jax.jit(jax.vmap(train))(keys, rates)
        for epoch, best in enumerate(history.max(axis=0)):
            print(f"epoch {epoch + 1}: val_accuracy {best:.3f} is the best member's")
        with flaxckpt.ModelCheckpoint(
            f"{directory}/{{member:02d}}", monitor="val_accuracy"
        ) as ckpt:
            for member in range(MEMBERS):
                ckpt.save_snapshot(snapshots, member)

    infos = {info.logs["member"]: info for info in flaxckpt.list_checkpoints(directory)}
    assert sorted(infos) == list(range(MEMBERS))
    best = max(infos.values(), key=lambda info: info.logs["val_accuracy"])
    like = jax.eval_shape(fresh, jax.random.key(0))
    for info in infos.values():
        again = float(accuracy(flaxckpt.load(info.path, like)))
        assert abs(again - info.logs["val_accuracy"]) < 0.01, info
    assert best.logs["val_accuracy"] > 0.9
    print(f"best: {best.path.name}, {best.logs['val_accuracy']:.3f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(temporary)
