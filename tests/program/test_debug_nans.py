"""Programs that run with `jax_debug_nans` and `jax_debug_infs`: no best is no NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import strategies
from hypothesis import given, settings
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from never_ready import take_metrics_for_unknown

import flaxckpt
from flaxckpt import CheckpointState, ModelCheckpoint, Snapshot, step

NAN = float("nan")
LOSSES = [0.5, 0.25, 0.75]


@pytest.fixture(autouse=True)
def checked():
    """Have JAX raise where a program gives a NaN, or an infinity."""
    with jax.debug_nans(True), jax.debug_infs(True):
        yield


def best_only(**settings):
    return CheckpointState.create(save_best_only=True, **settings)


def first(state, due=True):
    """Decide where there is no best yet, and none comes of it."""
    return step(state, {"val_loss": 0.5}, 0, None if due else 1)


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("save_freq", ["epoch", 4])
def test_a_jitted_step_that_finds_no_best(mode, save_freq):
    state = best_only(mode=mode, save_freq=save_freq)
    due, save = jax.jit(first)(state)
    none, not_due = jax.jit(first, static_argnames="due")(state, due=False)
    assert bool(save) is (save_freq == "epoch")
    assert not not_due
    assert np.isnan(float(none.best))
    assert np.isnan(np.asarray(due.best)) == (not save)
    every = CheckpointState.create()  # which never has a best
    assert np.isnan(jax.jit(first)(every)[0].best)


def test_a_scan_begins_with_no_best():
    def body(state, loss):
        return step(state, {"val_loss": loss}, 0)

    run = jax.jit(lambda state, xs: jax.lax.scan(body, state, xs))
    state, saves = run(best_only(), jnp.array(LOSSES))
    assert saves.tolist() == [True, True, False]
    assert state.best == 0.25
    state, saves = run(best_only(), jnp.zeros(0))
    assert np.isnan(state.best)


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_an_ensemble_and_a_mesh_begin_with_no_best(jit):
    states = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), best_only(save_freq=2))

    def member(state, loss):
        return step(state, {"val_loss": loss}, 0, 0)

    states, saves = jit(jax.vmap(member))(states, jnp.array(LOSSES))
    assert not saves.any()
    assert np.isnan(states.best).all()
    states, saves = jit(jax.vmap(member))(states, jnp.array(LOSSES))
    assert saves.all()
    assert states.best.tolist() == LOSSES
    mesh = jax.make_mesh((8,), ("data",))

    def shard(state, losses):
        return step(state, {"val_loss": jax.lax.pmean(losses[0], "data")}, 0, 0)

    losses = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, P("data")))
    state, save = jax.jit(
        jax.shard_map(shard, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    )(best_only(save_freq=9), losses)
    assert not save
    assert np.isnan(state.best)


def test_of_some_members_that_have_none_the_best_is_a_nan():
    states = jax.tree.map(lambda leaf: np.stack([leaf] * 2), best_only())
    has_best, value = np.array([True, False]), np.float32([0.5, 0])
    states = flaxckpt._decision.state.with_leaves(
        states, has_best=has_best, best_value=value
    )
    np.testing.assert_array_equal(states.best, np.float32([0.5, NAN]))


@given(strategies.settings(), strategies.calls())
@settings(max_examples=15)
def test_the_leaves_are_finite_whatever_the_metrics_are(config, calls):
    """A NaN in the logs, too; an infinity is the best only where it was given."""
    state, given = CheckpointState.create(**config), [config["initial_value_threshold"]]
    for epoch, batch, value in calls:
        logs = {"score": 0.0 if value is None else value}
        state, _ = step(state, logs, epoch, batch)
        if np.isfinite(state.best_value):
            state = jax.tree.map(jnp.asarray, state)  # the next call has it on devices
        given.append(logs["score"])
        best = np.asarray(state.best_value)
        assert not np.isnan(best)
        assert np.isfinite(best) or best in given
        assert bool(state.has_best) is not bool(np.isnan(state.best))


@pytest.mark.parametrize("threshold", [np.inf, -np.inf])
def test_an_infinite_threshold_is_one(threshold):
    state = best_only(initial_value_threshold=threshold)
    assert state.best == threshold
    state, save = step(state, {"val_loss": 0.5}, 0)
    assert bool(save) is (threshold > 0)


@pytest.mark.parametrize("wrap", [float, np.float32, jnp.float32])
@pytest.mark.parametrize("save_last", [False, True])
@pytest.mark.parametrize("snapshot", ["auto", "host"])
def test_update_in_a_loop(tmp_path, wrap, save_last, snapshot):
    ckpt = ModelCheckpoint(
        tmp_path / "best",
        save_best_only=True,
        save_last=save_last,
        snapshot=snapshot,
        verbose=0,
    )
    with ckpt:
        state = ckpt.init()
        for epoch, loss in enumerate(LOSSES):
            logs = {"val_loss": wrap(loss)}
            state = ckpt.update(state, {"w": jnp.full(3, loss)}, logs, epoch)
        assert float(state.best) == 0.25
        ckpt.update(state, {"w": jnp.ones(3)}, {"val_loss": NAN}, 3)
    assert ckpt.best.logs == {"val_loss": 0.25}


def test_decided_by_the_device(tmp_path, monkeypatch):
    """As where the metric is not there yet: that program's results are looked at."""
    take_metrics_for_unknown(monkeypatch)
    with ModelCheckpoint(tmp_path / "{epoch}", save_best_only=True) as ckpt:
        state = ckpt.init()
        for epoch, loss in enumerate(LOSSES):
            logs = {"val_loss": jnp.float32(loss)}
            state = ckpt.update(state, {"w": jnp.full(3, loss)}, logs, epoch)
    assert state.best == 0.25
    assert [info.epoch for info in ckpt.checkpoints] == [0, 1]


def test_update_in_a_program(tmp_path):
    with ModelCheckpoint(tmp_path / "{epoch}", save_best_only=True) as ckpt:

        def body(carry, loss):
            state, epoch = carry
            logs = {"val_loss": loss}
            state = ckpt.update(state, {"w": jnp.full(3, loss)}, logs, epoch)
            return (state, epoch + 1), None

        run = jax.jit(lambda state, xs: jax.lax.scan(body, (state, 0), xs)[0])
        state, _ = run(ckpt.init(), jnp.zeros(0))
        assert np.isnan(state.best)
        state, _ = run(state, jnp.array(LOSSES))
        assert state.best == 0.25
        ckpt.wait()
        assert [info.epoch for info in ckpt.checkpoints] == [0, 1]
        found = ckpt.restore()
        assert (found.state.best, found.tree["w"][0]) == (0.25, 0.25)


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("keep", [1, 3])
def test_snapshots_begin_with_nothing(mode, keep):
    tree, logs = {"w": jnp.ones(3)}, {"score": 0.0}
    empty = Snapshot.like(tree, logs, keep, mode=mode)

    def take(snapshot, save, score):
        tree = {"w": jnp.full(3, score)}
        return snapshot.take(save, tree, {"score": score}, 0)

    assert jax.jit(take)(empty, False, 0.5).entries() == []
    taken = jax.jit(take)(empty, True, 0.5)
    assert [kept.logs for kept in taken.entries()] == [{"score": 0.5}]
    many = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), empty)
    saves, scores = jnp.array([True, False]), jnp.array([0.5, 0.25])
    for vmapped in (jax.vmap(take), jax.jit(jax.vmap(take))):
        members = vmapped(many, saves, scores)
        assert [len(members.entries(i)) for i in range(2)] == [1, 0]
        members = vmapped(members, ~saves, scores)
        assert [len(members.entries(i)) for i in range(2)] == [1, 1]


def test_in_a_program_the_best_is_a_nan_only_for_who_asks():
    """`has_best` tells without one."""

    @jax.jit
    def best_or(state, other):
        return jnp.where(state.has_best, state.best, other)

    assert best_or(best_only(), 7.0) == 7
    assert best_or(best_only(initial_value_threshold=2.0), 7.0) == 2
