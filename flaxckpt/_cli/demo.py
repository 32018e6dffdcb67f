"""The training behind `flaxckpt demo`: killed in mid-epoch, resumed, and compared.

Run as a module, it is the process that is killed:
`python -m flaxckpt._cli.demo DIRECTORY EPOCHS`.
"""

import functools
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training import train_state
from sklearn.datasets import load_digits

import flaxckpt

BATCH_SIZE = 64
SAVE_EVERY = 5
KILL_BATCH = 10  # counted from 0, in the middle epoch
Examples: TypeAlias = tuple[jax.Array, jax.Array]  # f32[n, 64] images, i32[n] labels


class Classifier(nn.Module):
    """One hidden layer, with state beside its weights: batch statistics and dropout."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = nn.Dense(128)(images)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.Dropout(0.3, deterministic=not train)(nn.relu(x))
        return nn.Dense(10)(x)


class TrainState(train_state.TrainState):
    """All that a training step depends on, its randomness included."""

    batch_stats: Any
    key: jax.Array


MODEL = Classifier()
OPTIMIZER = optax.adam(1e-3)


def new_state() -> TrainState:
    """Make the state at the start, the same one each time."""
    init_key, key = jax.random.split(jax.random.key(0))
    variables = MODEL.init(init_key, jnp.zeros((1, 64)), train=False)
    return TrainState.create(
        apply_fn=MODEL.apply,
        params=variables["params"],
        tx=OPTIMIZER,
        batch_stats=variables["batch_stats"],
        key=key,
    )


def digits() -> tuple[Examples, Examples]:
    """Read the handwritten digits that come with scikit-learn, split by a fixed seed.

    Returns:
        The examples to train on and those to validate with.
    """
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images = jnp.asarray(images[order] / 16, jnp.float32)
    labels = jnp.asarray(labels[order], jnp.int32)
    return (images[360:], labels[360:]), (images[:360], labels[:360])


@jax.jit
def shuffled(key: jax.Array, epoch: int, labels: jax.Array) -> jax.Array:
    """Draw an epoch's batches, i32[batches, BATCH_SIZE]: the same ones each time."""
    order = jax.random.permutation(jax.random.fold_in(key, epoch), len(labels))
    batches = len(labels) // BATCH_SIZE
    return order[: batches * BATCH_SIZE].reshape(batches, BATCH_SIZE)


@functools.partial(jax.jit, donate_argnames="state")
def train_step(state: TrainState, data: Examples, chosen: jax.Array) -> TrainState:
    """Take one step on the chosen examples; the step donates the old state."""
    images, labels = data
    dropout_key = jax.random.fold_in(jax.random.fold_in(state.key, 2**31), state.step)

    def loss_of(params: Mapping[str, Any]) -> tuple[jax.Array, Mapping[str, Any]]:
        logits, moved = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            images[chosen],
            train=True,
            rngs={"dropout": dropout_key},
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[chosen])
        return losses.mean(), moved

    grads, moved = jax.grad(loss_of, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=moved["batch_stats"])


@jax.jit
def accuracy(state: TrainState, data: Examples) -> jax.Array:
    """Return the fraction of images that the model classifies correctly, f32[]."""
    images, labels = data
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = state.apply_fn(variables, images, train=False)
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels)


def checkpoints(
    directory: Path,
) -> tuple[flaxckpt.ModelCheckpoint, flaxckpt.ModelCheckpoint]:
    """Return the object for the best models, and the one for the state to resume."""
    best = flaxckpt.ModelCheckpoint(
        directory / "{epoch:02d}-{val_accuracy:.4f}",
        monitor="val_accuracy",
        save_best_only=True,
        max_to_keep=3,
    )
    return best, flaxckpt.ModelCheckpoint(directory / "last", save_freq=SAVE_EVERY)


def train(
    directory: Path, epochs: int, kill_at: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Train, from where the checkpoints in `directory` leave off.

    Args:
        directory: Where the checkpoints are.
        epochs: Epochs in all, those before a restart included.
        kill_at: Zero-based epoch and batch after which this process is killed.

    Returns:
        The training state and the decision state of the best models, as a tree.
    """
    examples, validation = digits()
    number = len(examples[1]) // BATCH_SIZE  # the remainder of an epoch is left out
    best, last = checkpoints(directory)
    state, best_state, last_state = new_state(), best.init(), last.init()
    first_epoch, first_batch = 0, 0

    # Each object restores from its own checkpoints.
    kept = best.restore(like=state, which="best")
    if kept is not None:
        best_state = kept.state
    found = last.restore(like=state)
    if found is not None:
        state, last_state = found.tree, found.state
        where = f"epoch {found.epoch + 1}"
        if found.batch is None:
            first_epoch = found.epoch + 1
        else:
            first_epoch, first_batch = found.epoch, found.batch + 1
            where = f"batch {first_batch} of {number} in {where}"
        tell(f"   restored {found.path.name!r}, saved after {where}")

    with best, last:
        for epoch in range(first_epoch, epochs):
            batches = shuffled(state.key, epoch, examples[1])
            for batch in range(first_batch, number):
                state = train_step(state, examples, batches[batch])
                last_state = last.update(last_state, state, None, epoch, batch)
                if (epoch, batch) == kill_at:
                    best.wait()  # a kill loses what is not on disk yet
                    tell(f"   epoch {epoch + 1:2}: killed after batch {batch + 1}")
                    os.kill(os.getpid(), signal.SIGKILL)
            first_batch = 0

            logs = {"val_accuracy": accuracy(state, validation)}
            before = best_state.best
            best_state = best.update(best_state, state, logs, epoch)
            news = "" if best_state.best == before else "  best so far, kept"
            shown = f"{logs['val_accuracy']:.4f}{news}"
            tell(f"   epoch {epoch + 1:2}: val_accuracy {shown}")
        # The final state is saved whatever the number of batches.
        last.update(last_state, state, None, epochs - 1, force=True)
    return {"train": state, "best": best_state}


def run(directory: Path, epochs: int) -> bool:
    """Train twice, once without and once with a kill, and compare the ends.

    Args:
        directory: Where to keep the checkpoints of both runs.
        epochs: Epochs that each run trains.

    Returns:
        Whether the runs ended with equal states and kept equally named checkpoints.
    """
    _prepare()
    smooth, broken = directory / "uninterrupted", directory / "resumed"

    tell(f"flaxckpt {flaxckpt.__version__}: checkpoints in {directory}")
    tell("\n1. Train without interruption")
    wanted = train(smooth, epochs)
    tell("\n2. Train in another process, killed in the middle of an epoch")
    command = [sys.executable, "-m", "flaxckpt._cli.demo", str(broken), str(epochs)]
    status = subprocess.run(command, check=False).returncode
    if status != -signal.SIGKILL:
        tell(f"   That process should have been killed, but it returned {status}.")
        return False
    tell("\n3. Resume from what that process left on disk")
    resumed = train(broken, epochs)

    tell("\n4. What the resumed run keeps")
    best, last = checkpoints(broken)
    for info in flaxckpt.list_checkpoints(broken):
        note = "best " * (info == best.best) + "latest" * (info == last.latest)
        tell(f"   {info.path.name:<12} epoch {info.epoch + 1:2}  {note}".rstrip())
    tell("\n5. Compare")
    unequal = differences(wanted, resumed)
    tell(f"   {len(jax.tree.leaves(wanted))} leaves of state, {len(unequal)} differ")
    for name in unequal:
        tell(f"     differs: {name}")
    kept, kept_resumed = best_names(smooth), best_names(broken)
    tell(f"   best models of the uninterrupted run: {', '.join(kept)}")
    tell(f"   best models of the resumed run:       {', '.join(kept_resumed)}")
    equal = not unequal and kept == kept_resumed
    verdict = "yes" if equal else "NO"
    tell(f"\nResumed run ended bit for bit where the uninterrupted one did: {verdict}")
    return equal


def best_names(directory: Path) -> list[str]:
    """Return the names of the best models kept, oldest first."""
    best, _ = checkpoints(directory)
    return [info.path.name for info in best.checkpoints]


def differences(one: Any, other: Any) -> list[str]:
    """Return the names of the leaves that two trees do not share bit for bit."""
    named, _ = jax.tree_util.tree_flatten_with_path(one)
    return [
        jax.tree_util.keystr(path)
        for (path, leaf), twin in zip(named, jax.tree.leaves(other), strict=True)
        if _bits(leaf) != _bits(twin)
    ]


def tell(message: str) -> None:
    """Print and flush, because two processes share the output."""
    print(message, flush=True)


def _bits(leaf: Any) -> tuple[str, tuple[int, ...], bytes]:
    """Return dtype, shape and memory of an array or PRNG key."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    return str(array.dtype), array.shape, array.tobytes()


def _prepare() -> None:
    """Use only the CPU, which two processes can share, and log only errors."""
    jax.config.update("jax_platforms", "cpu")
    logging.getLogger("absl").setLevel(logging.ERROR)


if __name__ == "__main__":
    _prepare()
    train(Path(sys.argv[1]), int(sys.argv[2]), (int(sys.argv[2]) // 2, KILL_BATCH))
