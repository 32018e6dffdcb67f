"""Whole trainings under `vmap`, whose members save together."""

import os
import subprocess
import sys
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flaxckpt
from flaxckpt import CheckpointError, ModelCheckpoint, TemplateError

TX = optax.adam(0.1)
SEEDS = jnp.arange(3)


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion("standard"):  # which optax needs
        yield


def make(seed):
    key = jax.random.key(seed)
    params = {"w": jax.random.normal(key, (4,))}
    return {"params": params, "opt": TX.init(params), "key": key}


def train_step(tree):
    key, drawn = jax.random.split(tree["key"])
    target = jax.random.normal(drawn, (4,))
    loss_of = lambda params: ((params["w"] - target) ** 2).mean()  # noqa: E731
    loss, grads = jax.value_and_grad(loss_of)(tree["params"])
    updates, opt = TX.update(grads, tree["opt"])
    params = optax.apply_updates(tree["params"], updates)
    return {"params": params, "opt": opt, "key": key}, loss


def train(ckpt, stop, by):
    """Train all members to a step, from what is on disk."""
    tree, state, start = ckpt.resume(jax.eval_shape(jax.vmap(make), SEEDS))
    if start.is_new:
        tree = jax.vmap(make)(SEEDS)

    def member(tree):
        def body(carry, at):
            tree, state = carry
            tree, _ = train_step(tree)
            when = {by: at} if by != "batch" else {"epoch": 0, "batch": at}
            return (tree, ckpt.update(state, tree, {}, **when)), None

        first = start.batch if by == "batch" else start
        steps = jnp.arange(first, stop)
        return jax.lax.scan(body, (tree, state), steps)[0]

    return jax.jit(jax.vmap(member, out_axes=(0, None)))(tree)


def same(one, other):
    def equal(a, b):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        return bool((a == b).all())

    return jax.tree.all(jax.tree.map(equal, one, other))


@pytest.mark.parametrize("by", ["step", "epoch", "batch"])
def test_members_are_saved_together_and_resumed_bit_for_bit(tmp_path, by):
    settings = {} if by == "epoch" else {"save_freq": 4}
    with ModelCheckpoint(tmp_path / f"whole/{{{by}}}", **settings) as ckpt:
        whole, state = train(ckpt, 11, by)
        assert state.batches.shape == ()  # the decision is one for all
    with ModelCheckpoint(tmp_path / f"parts/{{{by}}}", **settings) as ckpt:
        train(ckpt, 6, by)
    with ModelCheckpoint(tmp_path / f"parts/{{{by}}}", **settings) as ckpt:
        resumed, _ = train(ckpt, 11, by)
    assert same(resumed, whole)
    found = flaxckpt.load(ckpt.latest.path, like=whole)
    assert found["params"]["w"].shape == (3, 4)
    assert found["key"].shape == (3,)


def test_what_is_saved_is_what_each_member_alone_would_save(tmp_path):
    def one(ckpt, tree):
        def body(carry, epoch):
            tree, state = carry
            tree, _ = train_step(tree)
            return (tree, ckpt.update(state, tree, None, epoch)), None

        return jax.lax.scan(body, (tree, ckpt.init()), jnp.arange(3))[0]

    with ModelCheckpoint(tmp_path / "all/{epoch}") as ckpt:
        jax.jit(jax.vmap(lambda seed: one(ckpt, make(seed))))(SEEDS)
    for seed in range(3):
        with ModelCheckpoint(tmp_path / f"{seed}/{{epoch}}") as ckpt:
            jax.jit(lambda: one(ckpt, make(seed)))()  # noqa: B023
    for epoch in ("1", "2", "3"):
        like = jax.vmap(make)(SEEDS)
        together = flaxckpt.load(tmp_path / "all" / epoch, like)
        for seed in range(3):
            alone = flaxckpt.load(tmp_path / str(seed) / epoch, make(seed))
            assert same(jax.tree.map(lambda leaf: leaf[seed], together), alone)  # noqa: B023


BRANCHES = """
import jax, jax.numpy as jnp
import flaxckpt

ckpt = flaxckpt.ModelCheckpoint("{epoch}")
state = ckpt.init()


def save(w):
    return ckpt.update(state, {"w": w}, {}, 0).seen


def by_cond(w, wants):
    return jax.lax.cond(wants, save, lambda w: 0, w)


def by_switch(w, wants):
    return jax.lax.switch(wants.astype(int), [lambda w: 0, save], w)


def within(w, wants):
    return jax.lax.cond(wants, jax.jit(lambda w: by_cond(w, True)), lambda w: 0, w)


w = jnp.ones((3, 2))
for member in (by_cond, by_switch, within):
    for wants in ([True, False, False], [False] * 3):
        try:
            jax.jit(jax.vmap(member))(w, jnp.array(wants))
        except NotImplementedError as error:  # JAX's own
            assert "not supported in vmap-of-cond" in str(error)
        else:
            raise AssertionError(member)
ckpt.wait()
assert not ckpt.checkpoints
"""


@pytest.mark.parametrize("devices", [1, 2])
def test_a_branch_that_not_all_take_saves_nothing(tmp_path, devices):
    """JAX runs all branches then, and selects what each member gets."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    result = subprocess.run(
        [sys.executable, "-c", BRANCHES],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "XLA_FLAGS": flags},
    )
    assert result.returncode == 0, result.stderr


def test_what_all_members_share_is_saved_for_each_and_what_is_no_array_once(tmp_path):
    shared = jnp.ones(2)
    with ModelCheckpoint(tmp_path / "a") as ckpt:

        def save(w):
            tree = {"w": w, "shared": shared, "n": 3, "host": np.arange(2)}
            ckpt.update(ckpt.init(), tree, None, 0)

        jax.vmap(jax.vmap(save))(jnp.ones((2, 3, 4)))
    tree = flaxckpt.load(tmp_path / "a")
    assert tree["w"].shape == (2, 3, 4)
    assert tree["shared"].shape == (2, 3, 2)
    assert tree["host"].tolist() == [0, 1]
    assert tree["n"] == 3


def test_metrics_of_members_are_left_out_with_a_warning(tmp_path):
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:

        def save(w):
            logs = {"loss": w, "rate": 0.5, "name": "x"}
            ckpt.update(ckpt.init(), {"w": w}, logs, 0)

        with pytest.warns(UserWarning, match="metrics of their own: loss"):
            jax.vmap(save)(jnp.ones(3))
    assert ckpt.latest.logs == {"rate": 0.5, "name": "x"}
    with ModelCheckpoint(tmp_path / "{loss}") as ckpt:
        with pytest.raises(TemplateError, match="no value for 'loss'"):
            jax.vmap(save)(jnp.ones(3))


def test_a_mean_over_the_members_is_recorded_and_may_choose_the_best(tmp_path):
    with ModelCheckpoint(tmp_path / "{epoch}", "loss", save_best_only=True) as ckpt:

        def member(w):
            def body(state, epoch):
                logs = {"loss": jax.lax.pmean(w[epoch], "member")}
                return ckpt.update(state, {"w": w}, logs, epoch), None

            return jax.lax.scan(body, ckpt.init(), jnp.arange(3))[0]

        losses = jnp.array([[4.0, 8.0, 2.0], [6.0, 3.0, 3.0]])  # means 5, 5.5, 2.5
        jax.jit(jax.vmap(member, axis_name="member", out_axes=None))(losses)
    assert [info.logs for info in ckpt.checkpoints] == [{"loss": 5.0}, {"loss": 2.5}]
    assert (flaxckpt.load(ckpt.best.path)["w"] == losses).all()


@pytest.mark.parametrize("kind", ["best", "force", "step", "state"])
def test_members_that_decide_for_themselves_are_told_of_slots(tmp_path, kind):
    settings = {"monitor": "loss", "save_best_only": kind == "best", "save_freq": 2}
    with ModelCheckpoint(tmp_path / "{step}", **settings) as ckpt:
        states = jax.vmap(lambda _: ckpt.init())(jnp.arange(3))

        def save(w, state):
            at = w.astype(int) if kind == "step" else 2
            force = w > 1 if kind == "force" else False
            state = state if kind == "state" else ckpt.init()
            logs = {"loss": w}
            return ckpt.update(state, {"w": w}, logs, step=at, force=force)

        for many in (jax.vmap(save), jax.jit(jax.vmap(save))):
            with pytest.raises(CheckpointError, match="Snapshot"):
                many(jnp.arange(3.0), states)
    assert not [*tmp_path.glob("[0-9]*")]


def test_each_member_keeps_its_best_by_steps(tmp_path):
    def member(w):
        def body(snapshot, step):
            loss = (w.sum() - step) ** 2
            return snapshot.take(True, {"w": w + step}, {"loss": loss}, step=step), None

        empty = flaxckpt.Snapshot.like({"w": w}, {"loss": 0.0}, keep=2)
        return jax.lax.scan(body, empty, jnp.arange(10, 50))[0]

    snapshot = jax.jit(jax.vmap(member))(jnp.array([[20.0], [30.0]]))
    with ModelCheckpoint(tmp_path / "{member}-{step}") as ckpt:
        paths = [ckpt.save_snapshot(snapshot, number) for number in range(2)]
    names = [[path.name for path in each] for each in paths]
    assert names == [["0-19", "0-20"], ["1-29", "1-30"]]
    info = flaxckpt.list_checkpoints(tmp_path)[-1]
    assert (info.step, info.epoch, info.batch) == (30, None, None)
    assert flaxckpt.load(info)["w"].tolist() == [60.0]
    (best, _) = snapshot.entries(0)
    assert (best.step, best.epoch, best.batch) == (20, None, None)


@pytest.mark.parametrize("at", [{}, {"epoch": 1, "step": 1}, {"step": -1}])
def test_a_snapshot_refuses_what_is_no_moment(at):
    snapshot = flaxckpt.Snapshot.like({"w": jnp.ones(1)}, {"loss": 0.0})
    with pytest.raises(flaxckpt.SettingError):
        snapshot.take(True, {"w": jnp.ones(1)}, {"loss": 0.0}, **at)


def test_what_is_printed_and_recorded_is_what_all_members_share(tmp_path, capsys):
    """With verbose=1, a check that saves nothing is told, too."""
    ckpt = ModelCheckpoint(tmp_path / "best", "loss", save_best_only=True, verbose=1)

    def member(w):
        def body(state, epoch):
            loss = jax.lax.pmean(w.sum(), "i") + epoch
            logs = {"loss": loss, "own": w.sum()}
            return ckpt.update(state, {"w": w}, logs, epoch), None

        return jax.lax.scan(body, ckpt.init(), jnp.arange(2))[0].seen

    with pytest.warns(UserWarning, match="metrics of their own: own"):
        jax.jit(jax.vmap(member, axis_name="i"))(jnp.ones((3, 2)))
    ckpt.close()
    assert set(ckpt.best.logs) == {"loss"}
    assert "did not improve" in capsys.readouterr().out


@pytest.mark.parametrize("has_own", [True, False])
def test_a_tree_that_all_members_share_is_saved_once(tmp_path, has_own):
    ckpt, w = ModelCheckpoint(tmp_path / "x"), jnp.ones(4)

    def member(x):
        logs = {"x": x} if has_own else {}
        return ckpt.update(ckpt.init(), {"w": w}, logs, 0).seen

    with pytest.warns(UserWarning, match="of their own") if has_own else nullcontext():
        jax.vmap(member)(jnp.ones(3))
    ckpt.close()
    assert flaxckpt.load(ckpt.latest)["w"].shape == (4,)
