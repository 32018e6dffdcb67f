"""Stop a training that has ceased to improve, also if it was interrupted.

    python examples/recipes/peers/early_stopping_orbax.py [DIRECTORY]

The same as ../early_stopping.py with flax's `EarlyStopping`, which is saved in the
checkpoints of Orbax's CheckpointManager.
"""

import sys
import tempfile

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax.training.early_stopping import EarlyStopping

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


def loss_in(metrics):
    return metrics["val_loss"]


def train(directory, stop_before=100):
    w = jnp.zeros(48)
    moments = OPTIMIZER.init(w)
    stopping = EarlyStopping(patience=PATIENCE - 1)
    policies = ocp.checkpoint_managers
    best = policies.BestN(get_metric_fn=loss_in, reverse=True, n=1)
    options = ocp.CheckpointManagerOptions(
        best_fn=loss_in,
        best_mode="min",
        preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(1), best]),
    )
    with ocp.CheckpointManager(directory, options=options) as manager:
        epoch = 0
        if manager.latest_step() is not None:
            like = ocp.args.StandardRestore((w, moments, stopping))
            found = manager.restore(manager.latest_step(), args=like)
            w, moments, stopping = found
            epoch = manager.latest_step() + 1
        while not stopping.should_stop and epoch < stop_before:
            w, moments, loss = train_epoch(w, moments)
            stopping = stopping.update(float(loss))
            tree = ocp.args.StandardSave((w, moments, stopping))
            metrics = {"val_loss": float(loss)}
            manager.save(epoch, args=tree, metrics=metrics)
            epoch += 1
        manager.wait_until_finished()
        best = manager.best_step()
        return epoch, best, manager.metrics(best)["val_loss"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        directory = sys.argv[1] if sys.argv[1:] else temporary
        whole, best, loss = train(f"{directory}/whole")
        train(f"{directory}/interrupted", stop_before=whole - 2)
        resumed, *_ = train(f"{directory}/interrupted")
        print(f"stopped after epoch {whole}, and after a break after epoch {resumed}")
        print(f"the best: epoch {best + 1}, {loss:.3f}")
