"""A killed run goes on bit for bit as if it had never stopped."""

import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

import flaxckpt

# A Linen model with dropout, so that a PRNG key is part of the state; two epochs' order
# of the data is drawn from the seed and the epoch. Killed for good after a batch.
PROGRAM = """
import os, signal, sys
import absl.logging
absl.logging.set_verbosity("fatal")
import flax.linen as nn
import jax, jax.numpy as jnp, numpy as np, optax
from flax.training.train_state import TrainState
import flaxckpt

directory, kill_at = sys.argv[1], int(sys.argv[2])
X = jax.random.normal(jax.random.key(1), (64, 8))
Y = jnp.sin(X.sum(1))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(16)(x))
        x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(1)(x)[:, 0]


class State(TrainState):
    key: jax.Array


@jax.jit
def train_step(state, x, y):
    def loss_fn(params):
        key = jax.random.fold_in(state.key, state.step)
        out = state.apply_fn({"params": params}, x, True, rngs={"dropout": key})
        return jnp.mean((out - y) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


net = Net()
params = net.init(jax.random.key(0), X, False)["params"]
state = State.create(
    apply_fn=net.apply, params=params, tx=optax.adam(1e-2), key=jax.random.key(7)
)
best = flaxckpt.ModelCheckpoint(directory + "/best", "loss", save_best_only=True)
last = flaxckpt.ModelCheckpoint(directory + "/{epoch}-{batch}", save_freq=3, max_to_keep=2)
decisions = {"best": best.init(), "last": last.init()}
first_epoch, first_batch = 0, 0
found = last.restore(like={"train": state, "best": decisions["best"]})
if found is not None:
    state = found.tree["train"]
    decisions = {"best": found.tree["best"], "last": found.state}
    first_epoch, first_batch = found.epoch, found.batch + 1
for epoch in range(first_epoch, 4):
    order = np.random.default_rng([3, epoch]).permutation(64).reshape(8, 8)
    for batch in range(first_batch, 8):
        rows = order[batch]
        state, loss = train_step(state, X[rows], Y[rows])
        tree = {"train": state, "best": decisions["best"]}
        decisions["last"] = last.update(decisions["last"], tree, {}, epoch, batch)
        if epoch * 8 + batch == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    first_batch = 0
    loss = jnp.mean((net.apply({"params": state.params}, X, False) - Y) ** 2)
    decisions["best"] = best.update(
        decisions["best"], state.params, {"loss": loss}, epoch
    )
best.close()
last.close()
flaxckpt.ModelCheckpoint(directory + "/final").save(state, epoch=3)
"""


def train(directory, kill_at=-1, program=PROGRAM):
    result = subprocess.run(
        [sys.executable, "-c", program, str(directory), str(kill_at)],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "XLA_FLAGS": ""},
    )
    assert result.returncode == (0 if kill_at < 0 else -signal.SIGKILL), result.stderr


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    train(directory)
    return directory


def bits(tree):
    def leaf_bits(leaf):
        if isinstance(leaf, jax.Array) and leaf.dtype == jax.random.key(0).dtype:
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf).tobytes()

    return jax.tree.map(leaf_bits, tree)


@pytest.mark.parametrize("kill_at", [0, 13, 23], ids="killed-{}".format)
def test_a_killed_run_ends_where_an_uninterrupted_one_does(
    tmp_path, uninterrupted, kill_at
):
    """Killed before the first save, in the middle of an epoch, and at an epoch's end."""
    train(tmp_path, kill_at)
    assert not (tmp_path / "final").exists()
    train(tmp_path)
    for name in ("final", "best"):
        resumed = bits(flaxckpt.load(tmp_path / name))
        assert resumed == bits(flaxckpt.load(uninterrupted / name))
    ours = flaxckpt.list_checkpoints(tmp_path)
    theirs = flaxckpt.list_checkpoints(uninterrupted)
    assert [info.path.name for info in ours] == [info.path.name for info in theirs]
    assert [info.logs for info in ours] == [info.logs for info in theirs]


def test_the_comparison_would_notice(tmp_path, uninterrupted):
    """A run that is not restored whole ends elsewhere: the test above can fail."""
    program = PROGRAM.replace('state = found.tree["train"]', "pass")
    assert program != PROGRAM
    kill = "os.kill(os.getpid()"
    train(tmp_path, 13, PROGRAM.replace(kill, f"last.wait(); {kill}"))
    train(tmp_path, program=program)
    other = bits(flaxckpt.load(tmp_path / "final")["params"])
    assert other != bits(flaxckpt.load(uninterrupted / "final")["params"])
