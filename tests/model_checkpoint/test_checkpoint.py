"""ModelCheckpoint: what a training loop sees."""

import inspect
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

import flaxckpt
from flaxckpt import (
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointPathError,
    CheckpointState,
    CheckpointWriteError,
    MetricError,
    ModelCheckpoint,
    SettingError,
    TemplateError,
)
from flaxckpt._decision.state import plain_state, resumed
from flaxckpt._disk.fields import signed

TREE = {"w": np.arange(3.0)}


def names(infos):
    return [info.path.name for info in infos]


def run(ckpt, losses, state=None, start=0, metric="val_loss"):
    """Train over epochs whose metric has these values."""
    state = ckpt.init() if state is None else state
    for epoch, loss in enumerate(losses, start):
        tree = {"w": np.full(3, loss)}
        state = ckpt.update(state, tree, {metric: loss, "lr": 0.5}, epoch)
    ckpt.wait()
    return state


def python(code, *arguments, check=True, **options):
    """Run Python code in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        check=check,
        timeout=120,
        capture_output=True,
        text=True,
        **options,
    )


def shown(directory):
    """What is in a directory, but for the lock."""
    return [name for name in os.listdir(directory) if not name.endswith(".lock")]


def rewrite(record, fields):
    """Change a record as if it had been written so."""
    fields.pop("sha256")
    record.write_bytes(signed(fields))


# ---- the loop --------------------------------------------------------------------------


def test_arguments_are_those_of_keras_in_their_order():
    ours = list(inspect.signature(ModelCheckpoint).parameters.values())
    theirs = list(
        inspect.signature(keras.callbacks.ModelCheckpoint).parameters.values()
    )
    for mine, its in zip(ours, theirs, strict=False):
        assert (mine.name, mine.default, mine.kind) == (its.name, its.default, its.kind)


def test_every_epoch_is_saved_with_its_record(tmp_path):
    with ModelCheckpoint(tmp_path / "a/{epoch:02d}-{val_loss:.2f}") as ckpt:
        run(ckpt, [0.5, 0.25])
        assert names(ckpt.checkpoints) == ["01-0.50", "02-0.25"]
        info = ckpt.latest
        assert (info.epoch, info.batch, info.step) == (1, None, 2)
        assert info.logs == {"val_loss": 0.25, "lr": 0.5}
        assert not info.weights_only
        assert info.path == tmp_path / "a/02-0.25"
        assert ckpt.checkpoints == flaxckpt.list_checkpoints(tmp_path)
        assert ckpt.checkpoints[0].time < ckpt.checkpoints[1].time
    assert sorted(os.listdir(tmp_path / "a")) == ["01-0.50", "02-0.25"]


def test_best_only_keeps_deciding_after_a_restart(tmp_path):
    """Keras starts anew and overwrites the best (keras#17012)."""
    path = tmp_path / "best"
    with ModelCheckpoint(path, save_best_only=True) as ckpt:
        run(ckpt, [0.5, 0.25, 0.75])
        assert ckpt.best.logs["val_loss"] == 0.25
    with ModelCheckpoint(path, save_best_only=True) as ckpt:
        found = ckpt.restore()
        assert found.state.best == 0.25
        assert found.epoch == 1
        assert found.logs == {"val_loss": 0.25, "lr": 0.5}
        run(ckpt, [0.375], found.state, found.epoch + 1)
        assert ckpt.best.epoch == 1
        run(ckpt, [0.125], found.state, found.epoch + 2)
        assert ckpt.best.epoch == 3
        np.testing.assert_array_equal(ckpt.restore().tree["w"], np.full(3, 0.125))


def test_batches_and_their_counters_are_restored(tmp_path):
    template = tmp_path / "{epoch}-{batch}"
    whole = ModelCheckpoint(tmp_path / "whole/{epoch}-{batch}", save_freq=3)
    state = whole.init()
    for epoch in range(3):
        for batch in range(4):
            state = whole.update(state, TREE, None, epoch, batch)
    whole.close()
    first = ModelCheckpoint(template, save_freq=3)
    state = first.init()
    for batch in range(4):
        state = first.update(state, TREE, None, 0, batch)
    state = first.update(state, TREE, None, 1, 0, force=True)
    first.close()
    second = ModelCheckpoint(template, save_freq=3)
    found = second.restore()
    assert (found.epoch, found.batch) == (1, 0)
    state = found.state
    for epoch in range(1, 3):
        for batch in range(4):
            if (epoch, batch) > (found.epoch, found.batch):
                state = second.update(state, TREE, None, epoch, batch)
    second.close()
    ours = [name for name in names(second.checkpoints) if name != "2-1"]
    assert ours == names(whole.checkpoints) == ["1-3", "2-2", "3-1", "3-4"]
    assert [info.step for info in whole.checkpoints] == [3, 6, 9, 12]


def test_force_and_save_ignore_the_policy(tmp_path):
    with ModelCheckpoint(tmp_path / "{epoch}", save_best_only=True) as ckpt:
        state = ckpt.update(ckpt.init(), TREE, {"val_loss": 1}, 0)
        state = ckpt.update(state, TREE, {"val_loss": 2}, 1)
        state = ckpt.update(state, TREE, {"val_loss": 3}, 2, force=True)
        assert state.best == 1
        path = ckpt.save(TREE, epoch=3, logs={"val_loss": 4}, state=state)
        assert path == tmp_path / "4"
        ckpt.wait()
        assert names(ckpt.checkpoints) == ["1", "3", "4"]
        assert ckpt.best.path.name == "1"
        assert ckpt.restore(which=path).state.best == 1
        ckpt.save(TREE, epoch=4)  # no state: goes on from what is on disk
        assert ckpt.restore().state.best == 1


def test_state_and_decision_from_a_jitted_loop(tmp_path):
    """Decide inside jit; save outside."""

    @jax.jit
    def train(state, w, epoch):
        w = w * 0.5
        state, save = flaxckpt.step(state, {"val_loss": w.sum()}, epoch)
        return state, w, save

    with ModelCheckpoint(tmp_path / "{epoch}", save_best_only=True) as ckpt:
        state, w = ckpt.init(), jnp.ones(2)
        for epoch in range(3):
            state, w, save = train(state, w, epoch)
            if save:
                ckpt.save(w, epoch, state=state, logs={"val_loss": w.sum()})
        found = ckpt.restore(like=w)
        assert found.state.best == 0.25
        assert found.tree.tolist() == [0.125, 0.125]
        ckpt.update(state, w, {"val_loss": 0.1}, 3)  # with device leaves in the state
        assert ckpt.restore().state.best == np.float32(0.1)


def test_what_is_saved_is_what_was_given(tmp_path):
    """Training may donate, delete and change what it gave as soon as it gave it."""
    donate = jax.jit(lambda x: x * 0, donate_argnums=0)
    ckpt = ModelCheckpoint(tmp_path / "{epoch}")
    state = ckpt.init()
    host = np.ones(5)
    for epoch in range(3):
        device = jnp.full((300, 300), epoch, jnp.float32)
        tree = {"device": device, "host": host, "n": [epoch]}
        state = ckpt.update(state, tree, None, epoch)
        donate(device)
        assert device.is_deleted()
        host += 1
        tree["n"][0] = -1
    ckpt.wait()
    for info in ckpt.checkpoints:
        tree = flaxckpt.load(info.path)
        assert (tree["device"] == info.epoch).all()
        assert (tree["host"] == info.epoch + 1).all()
        assert tree["n"] == [info.epoch]


def test_a_metric_that_is_not_ready_is_not_waited_for(tmp_path):
    """In steps where nothing is due, logs on devices are not looked at."""

    @jax.jit
    def slow(x):
        return jax.lax.fori_loop(0, 60, lambda _, y: jnp.tanh(y @ y), x).sum()

    x = jnp.ones((500, 500))
    loss = slow(x).block_until_ready()
    for settings in ({"save_freq": 1000}, {"save_freq": "epoch"}):
        ckpt = ModelCheckpoint(tmp_path / "{epoch}", save_best_only=True, **settings)
        state = ckpt.update(ckpt.init(), {"x": x}, {"val_loss": loss}, 0, 0)
        loss = slow(x)
        for batch in range(1, 10):
            state = ckpt.update(state, {"x": x}, {"val_loss": loss}, 0, batch)
        assert not loss.is_ready()
        loss.block_until_ready()


def test_a_save_shows_only_when_it_is_whole(tmp_path):
    """Whoever lists the directory while saves go on sees whole checkpoints only."""
    tree = {f"w{i}": jnp.full(50_000, i) for i in range(8)}
    with ModelCheckpoint(tmp_path / "only") as ckpt:
        state = ckpt.init()
        seen = set()
        for epoch in range(6):
            state = ckpt.update(state, tree, {}, epoch)
            for info in flaxckpt.list_checkpoints(tmp_path):
                seen.add(info.epoch)
                assert {each.name for each in info.path.iterdir()} >= {
                    "flaxckpt.json", "flaxckpt_leaves.json", "state"
                }  # fmt: skip
    assert len(flaxckpt.list_checkpoints(tmp_path)) == 1
    assert os.listdir(tmp_path) == ["only"]


# ---- several, and which stay -------------------------------------------------------------


def test_max_to_keep_counts_the_newest_and_spares_the_best(tmp_path):
    with ModelCheckpoint(tmp_path / "{epoch}", max_to_keep=2) as ckpt:
        run(ckpt, [0.1, 0.5, 0.4, 0.3])
        assert names(ckpt.checkpoints) == ["1", "3", "4"]
    with ModelCheckpoint(tmp_path / "x{epoch}", monitor="beta", max_to_keep=2) as ckpt:
        with pytest.warns(UserWarning, match="'beta' is better low or high"):
            run(ckpt, [0.1, 0.5, 0.4, 0.3], metric="beta")
        assert names(ckpt.checkpoints) == ["x3", "x4"]
        with pytest.raises(SettingError, match=r"'beta' .* Pass mode="):
            ckpt.best  # noqa: B018
    assert names(flaxckpt.list_checkpoints(tmp_path)) == ["1", "3", "4", "x3", "x4"]


def test_that_the_best_cannot_be_spared_is_said_once(tmp_path):
    with ModelCheckpoint(tmp_path / "{epoch}", max_to_keep=1) as ckpt:
        with pytest.warns(UserWarning, match=r"no 'val_loss', only 'loss'") as given:
            run(ckpt, [0.1, 0.5, 0.7], metric="loss")
        assert len(given) == 1
        assert names(ckpt.checkpoints) == ["3"]


@pytest.mark.parametrize(("save_freq", "batch"), [("epoch", 7), (10, None)])
def test_a_loop_in_which_nothing_is_ever_due_is_told(tmp_path, save_freq, batch):
    ckpt = ModelCheckpoint(tmp_path / "{epoch}", save_freq=save_freq)
    state = ckpt.init()
    for _ in range(3):
        state = ckpt.update(state, {"w": np.ones(2)}, None, 0, batch)
    with pytest.warns(UserWarning, match="No check was ever due"):
        ckpt.close()
    assert ckpt.checkpoints == ()


def test_a_run_that_has_not_reached_its_first_check_is_not_warned(tmp_path):
    with ModelCheckpoint(tmp_path / "{epoch}", save_freq=10) as ckpt:
        ckpt.update(ckpt.init(), {"w": np.ones(2)}, None, 0, 0)
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        state = ckpt.update(ckpt.init(), {"w": np.ones(2)}, None, 0, 0)
        ckpt.update(state, {"w": np.ones(2)}, None, 0)


def test_a_better_best_of_an_earlier_run_is_not_replaced_without_a_word(tmp_path):
    with ModelCheckpoint(tmp_path / "best", save_best_only=True) as ckpt:
        run(ckpt, [0.3, 0.2])
    again = ModelCheckpoint(tmp_path / "best", save_best_only=True)
    with pytest.warns(UserWarning, match=r"val_loss 0\.2, .* begin with ckpt\.restore"):
        run(again, [0.9])
        again.close()
    assert names(again.checkpoints) == ["best", "best.aside"]
    with ModelCheckpoint(tmp_path / "best", save_best_only=True) as ckpt:
        run(ckpt, [0.1], ckpt.restore().state)
    assert names(again.checkpoints) == ["best"]


def test_bests_that_are_nearly_equal_are_told_apart(tmp_path):
    near = np.nextafter(np.float32(0.1), np.float32(1))
    with ModelCheckpoint(tmp_path / "best", save_best_only=True) as ckpt:
        run(ckpt, [np.float32(0.1)])
    again = ModelCheckpoint(tmp_path / "best", save_best_only=True)
    message = r"val_loss 0\.1, which .* its own best is 0\.10000001\."
    with pytest.warns(UserWarning, match=message):
        run(again, [near])
        again.close()


def test_preserve_takes_policies_of_orbax(tmp_path):
    policies = ocp.training.preservation_policies
    keep = policies.AnyPreservationPolicy(
        [policies.LatestN(1), policies.EveryNSteps(3)]
    )
    with ModelCheckpoint(tmp_path / "{epoch}", preserve=keep) as ckpt:
        run(ckpt, [0.9, 0.1, 0.8, 0.7, 0.6, 0.5, 0.4])
        assert names(ckpt.checkpoints) == ["2", "3", "6", "7"]


def test_a_policy_that_fails_deletes_nothing_and_is_reported(tmp_path):
    policies = ocp.training.preservation_policies
    keep = policies.BestN(get_metric_fn=lambda logs: logs["accuracy"], n=1)
    ckpt = ModelCheckpoint(tmp_path / "{epoch}", preserve=keep)
    with pytest.raises(CheckpointError, match=r"preserve.*KeyError: 'accuracy'"):
        run(ckpt, [0.5, 0.4, 0.3])
    assert len(ckpt.checkpoints) >= 2


def test_objects_in_one_directory_mind_their_own(tmp_path):
    best = ModelCheckpoint(tmp_path / "best", save_best_only=True)
    last = ModelCheckpoint(tmp_path / "last-{epoch}", max_to_keep=1)
    run(last, [0.5, 0.6, 0.7], run(best, [0.5, 0.6, 0.7]) and None)
    assert names(best.checkpoints) == ["best"]
    assert names(last.checkpoints) == ["last-1", "last-3"]


def test_objects_save_at_the_same_time(tmp_path):
    """Orbax's saves from two threads get into each other's way, and can hang."""
    ckpts = [ModelCheckpoint(tmp_path / f"{name}{{epoch}}") for name in "abc"]
    states = [ckpt.init() for ckpt in ckpts]
    for epoch in range(8):
        for i, ckpt in enumerate(ckpts):
            states[i] = ckpt.update(states[i], {"w": np.full(9, i)}, {}, epoch)
        ckpts[0].restore()
    for i, ckpt in enumerate(ckpts):
        ckpt.close()
        assert len(ckpt.checkpoints) == 8
        for info in ckpt.checkpoints:
            assert (flaxckpt.load(info.path)["w"] == i).all()


def test_templates_with_directories_behind_fields(tmp_path):
    with ModelCheckpoint(tmp_path / "run{epoch}/model", max_to_keep=1) as ckpt:
        run(ckpt, [0.1, 0.2, 0.3])
        assert [info.path.parent.name for info in ckpt.checkpoints] == ["run1", "run3"]
        assert ckpt.checkpoints == flaxckpt.list_checkpoints(tmp_path)


def test_a_directory_can_be_moved(tmp_path):
    with ModelCheckpoint(tmp_path / "a/{epoch}", save_best_only=True) as ckpt:
        run(ckpt, [0.5, 0.25])
    (tmp_path / "a").rename(tmp_path / "b")
    moved = ModelCheckpoint(tmp_path / "b/{epoch}", save_best_only=True)
    assert moved.best.path == tmp_path / "b/2"
    assert moved.restore().state.best == 0.25


def test_the_newest_is_the_newest_saved(tmp_path):
    """After going back to an earlier epoch, and with a clock that was set back."""
    ckpt = ModelCheckpoint(tmp_path / "{epoch}")
    run(ckpt, [0.5, 0.4, 0.3])
    ckpt.close()
    record = tmp_path / "3/flaxckpt.json"
    fields = json.loads(record.read_text())
    rewrite(record, {**fields, "time": "2999-01-01T00:00:00+00:00"})
    run(ckpt, [0.6], start=1)
    assert names(ckpt.checkpoints) == ["1", "3", "2"]
    assert ckpt.restore().epoch == 1


# ---- restore -----------------------------------------------------------------------------


def test_restore_by_name(tmp_path):
    ckpt = ModelCheckpoint(tmp_path / "{epoch}")
    assert ckpt.restore() is None
    assert ckpt.restore(which="best") is None
    assert ckpt.latest is None
    assert ckpt.best is None
    run(ckpt, [0.5, 0.25, 0.75])
    assert ckpt.restore().epoch == 2
    assert ckpt.restore(which="best").epoch == 1
    assert ckpt.restore(which=tmp_path / "1").epoch == 0
    assert ckpt.restore(which=str(tmp_path / "1")).path == tmp_path / "1"
    with pytest.raises(flaxckpt.CheckpointNotFoundError, match="near it: 1, 2, 3"):
        ckpt.restore(which=tmp_path / "9")


def test_restore_sees_a_save_that_was_under_way(tmp_path):
    ckpt = ModelCheckpoint(tmp_path / "{epoch}")
    ckpt.update(ckpt.init(), TREE, {}, 0)
    assert ckpt.restore().epoch == 0


def test_another_filepath_is_another_series(tmp_path):
    run(ModelCheckpoint(tmp_path / "{epoch}"), [0.5])
    other = ModelCheckpoint(tmp_path / "{epoch:03d}")
    with pytest.warns(UserWarning, match="other filepaths") as caught:
        assert other.restore() is None
    assert str(caught[0].message) == (
        f"No checkpoint of '{tmp_path}/{{epoch:03d}}' to restore, but there are "
        "checkpoints of other filepaths: 1. Restore one of those by its path, as in "
        "restore(which=path)."
    )


def state_of(**stored):
    base = plain_state(CheckpointState.create(save_best_only=True))
    return {**base, **stored}


@pytest.mark.parametrize(
    ("settings", "stored", "durable", "best"),
    [
        ({}, state_of(best=0.5), 0.5, 0.5),
        # After a failed write: what it would have saved is not on disk.
        ({}, state_of(best=0.25), 0.5, 0.5),
        # Gone back to an earlier checkpoint: the better one is still there.
        ({}, state_of(best=0.5), 0.25, 0.25),
        ({}, state_of(best=0.5), None, 0.5),
        ({}, state_of(best=None), 0.5, 0.5),
        ({}, state_of(best=None), None, np.nan),
        # A threshold that nothing has reached.
        ({"initial_value_threshold": 0.125}, state_of(best=0.125), 0.5, 0.125),
        ({"initial_value_threshold": 1.0}, state_of(best=0.25), 0.5, 0.5),
        # Other settings than then: the best on disk.
        ({"mode": "max"}, state_of(best=0.25), 0.5, 0.5),
        ({"monitor": "loss"}, state_of(best=0.25), None, np.nan),
        ({}, state_of(save_best_only=False, best=None), 0.5, 0.5),
        ({}, None, 0.5, 0.5),
        ({}, None, None, np.nan),
        ({"save_best_only": False}, state_of(best=0.25), 0.25, np.nan),
        # In the precision of the comparison.
        ({}, state_of(best=float(np.float32(0.1))), 0.1, np.float32(0.1)),
    ],
)  # fmt: skip
def test_best_of_a_resumed_state(settings, stored, durable, best):
    fresh = CheckpointState.create(**{"save_best_only": True, **settings})
    state = resumed(fresh, stored, durable)
    np.testing.assert_array_equal(state.best, np.float32(best))
    assert state.best.dtype == np.float32
    assert jax.tree.structure(state) == jax.tree.structure(fresh)


# ---- bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"save_freq": 0}, 'save_freq=0 cannot work: pass "epoch", or a number of batches of at least 1.'),
        ({"mode": "least"}, 'mode=\'least\' cannot work: pass "auto", "min" or "max".'),
        ({"verbose": 3}, "verbose=3 cannot work: pass 0 or 1."),
        ({"max_to_keep": 0}, "max_to_keep=0 cannot work: pass a number of checkpoints of at least 1, or None for all."),
        ({"max_to_keep": True}, "max_to_keep=True cannot work: pass a number of checkpoints of at least 1, or None for all."),
        ({"preserve": 3}, "preserve=3 cannot work: pass a preservation policy, such as Orbax's LatestN(3)."),
        ({"max_to_keep": 2, "preserve": ocp.training.preservation_policies.LatestN(3)}, "max_to_keep=2 cannot work: pass it or `preserve`, not both."),
        ({"weights": "params"}, "weights='params' cannot work: pass a function from a tree to its weights."),
        ({"sync": "no"}, "sync='no' cannot work: pass True or False."),
        ({"save_weights_only": "false"}, "save_weights_only='false' cannot work: pass True or False."),
        ({"preserve": ocp.training.preservation_policies.LatestN}, f"preserve={ocp.training.preservation_policies.LatestN!r} cannot work: pass a preservation policy, such as Orbax's LatestN(3)."),
    ],
)  # fmt: skip
def test_settings_that_cannot_work(tmp_path, settings, message):
    with pytest.raises(SettingError) as caught:
        ModelCheckpoint(tmp_path / "new/{epoch}", **settings)
    assert str(caught.value) == message
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("save_top_k", "Did you mean 'preserve'?"),
        ("period", "Did you mean 'save_freq'?"),
        ("train_time_interval", "Did you mean 'save_interval_secs'?"),
        ("monitr", "Did you mean 'monitor'?"),
        ("zzz", "It takes filepath, monitor, verbose, save_best_only, save_weights_only, mode, save_freq, initial_value_threshold, min_delta, save_interval_secs, max_to_keep, preserve, overwrite, weights, save_last, save_on_preemption, on_saved, sync, snapshot, max_in_flight, compress, engine, frozen, per_process, stop_on_error, timeout_secs."),
    ],
)  # fmt: skip
def test_unknown_arguments(tmp_path, name, hint):
    with pytest.raises(TypeError) as caught:
        ModelCheckpoint(tmp_path / "{epoch}", **{name: 1})
    assert (
        str(caught.value) == f"ModelCheckpoint got an unknown argument {name!r}. {hint}"
    )


def test_a_field_that_logs_lack(tmp_path):
    ckpt = ModelCheckpoint(tmp_path / "new/{epoch}-{val_loss:.2f}")
    with pytest.raises(TemplateError) as caught:
        ckpt.update(ckpt.init(), TREE, {"loss": 1.0}, 0)
    assert str(caught.value) == (
        f"filepath {str(tmp_path / 'new/{epoch}-{val_loss:.2f}')!r}: no value for "
        "'val_loss'; fields there are: epoch, loss. Put what is missing into `logs`, or "
        "take it out of the filepath."
    )
    assert not (tmp_path / "new").exists()


def test_a_file_where_a_directory_should_be(tmp_path):
    (tmp_path / "file").write_text("precious")
    for filepath in ("file/{epoch}", "file/deep/{epoch}"):
        with pytest.raises(CheckpointPathError) as caught:
            ModelCheckpoint(tmp_path / filepath)
        assert str(caught.value) == (
            f"{str(tmp_path / 'file')!r} is a file, and checkpoints need a directory "
            "there. Remove the file, or choose another filepath."
        )
    ckpt = ModelCheckpoint(tmp_path / "file")
    with pytest.raises(CheckpointPathError) as caught:
        ckpt.update(ckpt.init(), TREE, {}, 0)
    assert str(caught.value) == (
        f"{str(tmp_path / 'file')!r} is a file, and a checkpoint is a directory. Remove "
        "the file, or choose another filepath."
    )
    with pytest.raises(CheckpointPathError) as caught:
        flaxckpt.list_checkpoints(tmp_path / "file")
    assert str(caught.value) == (
        f"{str(tmp_path / 'file')!r} is a file. Pass the directory that holds the "
        "checkpoints."
    )
    assert (tmp_path / "file").read_text() == "precious"


def test_a_directory_of_other_things_is_not_replaced(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/plot.png").write_text("precious")
    ckpt = ModelCheckpoint(tmp_path / "results")
    with pytest.raises(CheckpointPathError) as caught:
        ckpt.save(TREE, epoch=0)
    assert str(caught.value) == (
        f"{str(tmp_path / 'results')!r} is there and is no checkpoint: it would be "
        "replaced. Give the checkpoints names in it, as in "
        'filepath="directory/{epoch:02d}".'
    )
    assert (tmp_path / "results/plot.png").exists()


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        ("exp", "exp/{epoch}"),
        ("exp", "exp/deep/er/{epoch}"),
        ("exp", "exp/state/best"),
        ("{epoch}", "{epoch}/ema"),
        ("{epoch}", "{epoch}/deep/{epoch}"),
        ("{epoch}", "1/ema"),
    ],
)
def test_no_checkpoint_is_saved_in_another(tmp_path, outer, inner):
    """It would be deleted with that one."""
    with ModelCheckpoint(tmp_path / outer, max_to_keep=1) as one:
        path = one.save(TREE, 0)
        one.wait()
        before = sorted(path.rglob("*"))
        with (
            ModelCheckpoint(tmp_path / inner) as other,
            pytest.raises(CheckpointPathError, match="is a checkpoint, and") as caught,
        ):
            other.save(TREE, 0)
        assert caught.value.path == str(path)
        assert sorted(path.rglob("*")) == before


def test_a_root_in_a_checkpoint_is_found_through_a_link(tmp_path):
    with ModelCheckpoint(tmp_path / "exp") as one:
        path = one.save(TREE, 0)
    (path / "more").mkdir()
    (tmp_path / "link").symlink_to(path / "more")
    with (
        ModelCheckpoint(tmp_path / "link/{epoch}") as other,
        pytest.raises(CheckpointPathError, match=r"exp' is a checkpoint, and"),
    ):
        other.save(TREE, 0)
    assert not os.listdir(path / "more")


@pytest.mark.parametrize("at", ["exp/1", "exp/deep/er/1"])
def test_a_checkpoint_with_another_one_in_it_is_not_replaced(tmp_path, at):
    with ModelCheckpoint(tmp_path / "other") as ckpt:
        other = ckpt.save(TREE, 0)
    with ModelCheckpoint(tmp_path / "exp") as ckpt:
        ckpt.save(TREE, 0)
        ckpt.wait()
        shutil.copytree(other, tmp_path / at)  # as a process without our checks may
        ckpt.save(TREE, 1)
        with pytest.raises(CheckpointPathError, match="has another checkpoint in it"):
            ckpt.wait()
        assert flaxckpt.list_checkpoints(tmp_path / "exp")[0].epoch == 0
        flaxckpt.verify(tmp_path / at)
        shutil.rmtree(tmp_path / at)
        ckpt.save(TREE, 1)
    assert flaxckpt.list_checkpoints(tmp_path / "exp")[0].epoch == 1


def test_retention_leaves_a_checkpoint_with_another_one_in_it(tmp_path):
    with ModelCheckpoint(tmp_path / "other") as ckpt:
        other = ckpt.save(TREE, 0)
    with ModelCheckpoint(tmp_path / "runs/{epoch}", max_to_keep=1) as ckpt:
        ckpt.save(TREE, 0)
        ckpt.wait()
        shutil.copytree(other, tmp_path / "runs/1/ema")
        ckpt.save(TREE, 1)
        with pytest.warns(UserWarning, match="has another checkpoint in it"):
            ckpt.wait()
        ckpt.save(TREE, 2)
        ckpt.wait()
    assert sorted(os.listdir(tmp_path / "runs")) == ["1", "3"]
    flaxckpt.verify(tmp_path / "runs/1/ema")


@pytest.mark.parametrize("where", ["there", "nowhere", "itself"])
def test_a_link_in_the_place_of_a_checkpoint_is_refused(tmp_path, where):
    (tmp_path / "there").mkdir()
    link = tmp_path / "best"
    link.symlink_to(link if where == "itself" else tmp_path / where)
    with ModelCheckpoint(link) as ckpt:
        with pytest.raises(
            CheckpointPathError, match="is a symbolic link, and a"
        ) as it:
            ckpt.save(TREE, 0)
        assert it.value.path == str(link)
        assert sorted(os.listdir(tmp_path)) == ["best", "there"]
        link.unlink()
        ckpt.save(TREE, 0)
    assert not os.listdir(tmp_path / "there")
    flaxckpt.verify(link)


def test_a_link_to_nothing_above_a_checkpoint_is_called_that(tmp_path):
    (tmp_path / "runs").symlink_to("nowhere")
    match = r"runs' is a symbolic link that leads nowhere, and .* Remove the link"
    with pytest.raises(CheckpointPathError, match=match):
        ModelCheckpoint(tmp_path / "runs/{epoch}")
    ckpt = ModelCheckpoint(tmp_path / "{run}/{epoch}")
    with pytest.raises(CheckpointPathError, match=match):
        ckpt.save(TREE, 0, logs={"run": "runs"})


def test_a_link_above_a_checkpoint_is_followed(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "a").symlink_to("there")
    with ModelCheckpoint(tmp_path / "{run}/{epoch}") as ckpt:
        path = ckpt.save(TREE, 0, logs={"run": "a"})
    assert os.listdir(tmp_path / "there") == ["1"]
    flaxckpt.verify(path)


def test_another_file_system_below_the_root_is_refused(tmp_path):
    """A finished checkpoint could not be renamed to there."""
    try:
        there = tempfile.mkdtemp(dir="/dev/shm")
    except OSError:
        pytest.skip("there is one file system")
    try:
        if os.stat(there).st_dev == os.stat(tmp_path).st_dev:
            pytest.skip("there is one file system")
        (tmp_path / "a").symlink_to(there)
        ckpt = ModelCheckpoint(tmp_path / "{run}/{epoch}")
        with pytest.raises(CheckpointPathError, match="another file system") as caught:
            ckpt.save(TREE, 0, logs={"run": "a"})
        assert f"filepath='{there}/{{epoch:02d}}'" in str(caught.value)
        assert os.listdir(tmp_path) == ["a"]
    finally:
        shutil.rmtree(there)


def test_a_read_only_directory(tmp_path):
    """As another user where the tests run as root, whom no permission stops."""
    code = """
        import os, sys
        import flaxckpt, flaxckpt._model_checkpoint, numpy
        if os.getuid() == 0:
            os.setuid(65534)
        ckpt = flaxckpt.ModelCheckpoint(sys.argv[1] + "/new/{epoch}")
        assert ckpt.checkpoints == ()
        try:
            ckpt.save({"w": numpy.ones(2)}, epoch=0)
        except flaxckpt.CheckpointPathError as error:
            print(error)
    """
    directory = tmp_path / "closed"
    directory.mkdir()
    for each in (directory, *directory.parents[:3]):
        each.chmod(0o755)
    directory.chmod(0o555)
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    result = python(code, directory, check=False, env=environment)
    if "Permission denied" in result.stderr:
        pytest.skip("the interpreter's own files are closed to other users")
    assert result.stdout == (
        f"{str(directory)!r} cannot be written to. Make it writable, or choose another "
        "filepath.\n"
    ), result.stderr
    assert os.listdir(directory) == []


# ---- failures in the background --------------------------------------------------------------


class FullDisk:
    """A limit on the size of files: writes beyond it fail, as on a full disk."""

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, self.before[1]))

    def __exit__(self, *error):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


BIG = {"w": np.random.default_rng(0).normal(size=200_000)}


@pytest.mark.parametrize("call", ["update", "save", "wait", "close", "restore"])
def test_a_failed_save_is_raised_at_the_next_call_and_only_there(tmp_path, call):
    ckpt = ModelCheckpoint(tmp_path / "{epoch}")
    state = run(ckpt, [0.5])
    with FullDisk():
        state = ckpt.update(state, BIG, {}, 1)
        while not ckpt._saves.queue._errors:
            time.sleep(0.01)
    calls = {
        "update": lambda: ckpt.update(state, TREE, {}, 2),
        "save": lambda: ckpt.save(TREE, epoch=2),
        "wait": ckpt.wait,
        "close": ckpt.close,
        "restore": ckpt.restore,
    }
    with pytest.raises(CheckpointWriteError) as caught:
        calls[call]()
    assert re.fullmatch(
        rf"Saving '{tmp_path}/2' failed: .*File too large.*\. No earlier checkpoint was "
        r"touched; this one does not exist\. Training can go on and save again\.",
        str(caught.value),
        re.DOTALL,
    )
    assert caught.value.path == str(tmp_path / "2")
    assert caught.value.__cause__ is not None
    assert shown(tmp_path) == ["1"]
    run(ckpt, [0.25], state, 3)
    assert names(ckpt.checkpoints) == ["1", "4"]
    ckpt.close()


def test_a_failed_replacement_leaves_the_old_one(tmp_path):
    ckpt = ModelCheckpoint(tmp_path / "best", save_best_only=True)
    state = run(ckpt, [0.5])
    with FullDisk(), pytest.raises(CheckpointWriteError):
        ckpt.update(state, BIG, {"val_loss": 0.25}, 1)
        ckpt.close()
    again = ModelCheckpoint(tmp_path / "best", save_best_only=True)
    assert again.restore().state.best == 0.5
    assert names(again.checkpoints) == ["best"]


def test_the_loop_s_own_error_is_not_hidden(tmp_path):
    ckpt = ModelCheckpoint(tmp_path / "{epoch}")
    with pytest.raises(ZeroDivisionError), ckpt:
        ckpt.update(ckpt.init(), TREE, {}, 0)
        raise ZeroDivisionError
    assert names(ckpt.checkpoints) == ["1"]  # finished all the same
    with (
        pytest.warns(
            UserWarning,
            match="A save failed, too, while another error ended the loop: Saving",
        ),
        FullDisk(),
        pytest.raises(ZeroDivisionError),
        ckpt,
    ):
        ckpt.update(ckpt.init(), BIG, {}, 1)
        raise ZeroDivisionError


EXIT = """
    import sys, absl.logging
    absl.logging.set_verbosity("fatal")
    import numpy as np, flaxckpt
    ckpt = flaxckpt.ModelCheckpoint(sys.argv[1] + "/{epoch}")
    state = ckpt.init()
    for epoch in range(3):
        state = ckpt.update(state, {"w": np.ones(1_000_000)}, {}, epoch)
    if len(sys.argv) > 2:
        import resource
        ckpt.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, -1))
        ckpt.update(state, {"w": np.random.normal(size=1_000_000)}, {}, 3)
"""


def test_a_forgotten_wait_loses_nothing(tmp_path):
    python(EXIT, tmp_path)
    assert names(flaxckpt.list_checkpoints(tmp_path)) == ["1", "2", "3"]
    assert flaxckpt.load(tmp_path / "3")["w"].shape == (1_000_000,)


def test_an_error_that_nobody_asked_for_is_told_at_exit(tmp_path):
    result = python(EXIT, tmp_path, "fail")
    assert f"At the program's end: Saving '{tmp_path}/4' failed" in result.stderr
    assert names(flaxckpt.list_checkpoints(tmp_path)) == ["1", "2", "3"]


def test_an_object_can_be_used_after_close(tmp_path):
    ckpt = ModelCheckpoint(tmp_path / "{epoch}")
    state = run(ckpt, [0.5])
    ckpt.close()
    ckpt.close()
    run(ckpt, [0.25], state, 1)
    ckpt.close()
    assert names(ckpt.checkpoints) == ["1", "2"]


def test_relative_paths_and_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    relative, home = ModelCheckpoint("a/{epoch}"), ModelCheckpoint("~/b/{epoch}")
    monkeypatch.chdir("/")
    run(relative, [0.5])
    run(home, [0.5])
    found = [info.path for info in flaxckpt.list_checkpoints(tmp_path)]
    assert sorted(found) == [tmp_path / "a/1", tmp_path / "home/b/1"]
    monkeypatch.chdir(tmp_path)
    assert flaxckpt.load("a/1").keys() == {"w"}
    assert flaxckpt.load("~/b/1").keys() == {"w"}
    assert len(flaxckpt.list_checkpoints("~/b")) == 1
    assert Path(relative.latest.path).is_absolute()


def test_arguments_in_the_wrong_place_or_form(tmp_path):
    with ModelCheckpoint(tmp_path / "{epoch}", "loss", save_best_only=True) as ckpt:
        state, tree, logs = ckpt.init(), {"w": np.zeros(2)}, {"loss": 0.5}
        with pytest.raises(
            SettingError, match=r"state=<dict> cannot work: pass what init"
        ):
            ckpt.update(tree, state, logs, 0)
        other = flaxckpt.CheckpointState.create("val_loss", save_best_only=True)
        with pytest.raises(
            SettingError, match="its monitor is 'val_loss', here 'loss'"
        ):
            ckpt.update(other, tree, logs, 0)
        with pytest.raises(
            SettingError, match="its monitor is 'val_loss', here 'loss'"
        ):
            ckpt.save(tree, 0, state=other)
        for epoch in (1.5, -1, "1", True):
            with pytest.raises(SettingError, match="zero-based integer"):
                ckpt.update(state, tree, logs, epoch)
        with pytest.raises(SettingError, match=r"batch=2\.5 cannot work"):
            ckpt.save(tree, 0, 2.5)
        with pytest.raises(
            SettingError, match="which='last' cannot work: pass \"latest\""
        ):
            ckpt.restore(which="last")
        with pytest.raises(
            SettingError, match=r"logs=0\.5 cannot work: pass a mapping"
        ):
            ckpt.save(tree, 0, None, 0.5)
        gone = jnp.float32(0.5)
        gone.delete()
        with pytest.raises(MetricError, match=r"logs\['other'\] was deleted"):
            ckpt.update(state, tree, {**logs, "other": gone}, 0)
        assert not list(tmp_path.iterdir())
        ckpt.update(state, tree, logs, jnp.int32(3))
        ckpt.wait()
        assert ckpt.latest.epoch == 3


def test_a_call_in_jit_with_arrays_from_outside(tmp_path):
    """It saves when the program runs, and `save` is refused there."""
    w = {"w": jnp.ones(4)}
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        with pytest.raises(CheckpointError, match="running JAX trace"):
            jax.jit(lambda x: (ckpt.save(w, 0), x)[1])(1.0)
        state = ckpt.init()
        run = jax.jit(lambda x: (ckpt.update(state, w, {}, 0), x)[1])
        lowered = run.lower(1.0).compile()
        assert not list(tmp_path.iterdir())
        lowered(1.0)
        ckpt.wait()
        ckpt.save(w, 1)
    assert names_in(tmp_path) == ["1", "2"]


def test_a_forgotten_state_is_told(tmp_path):
    with ModelCheckpoint(tmp_path / "best", "loss", save_best_only=True) as ckpt:
        state = ckpt.init()
        ckpt.update(state, {"w": 1}, {"loss": 0.5}, 0)
        with pytest.warns(UserWarning, match=r"Write state = ckpt\.update\(state"):
            ckpt.update(state, {"w": 1}, {"loss": 0.7}, 1)
        ckpt.update(state, {"w": 1}, {"loss": 0.8}, 2)  # once is enough
        state = ckpt.init()
        for epoch in range(3):
            state = ckpt.update(state, {"w": 1}, {"loss": 0.8}, epoch)


@pytest.mark.parametrize("loss", [0.7, 7])  # by one comparison, and by a full one
@pytest.mark.parametrize("save_best_only", [True, False])
def test_a_forgotten_state_that_counts_steps_is_told(tmp_path, save_best_only, loss):
    settings = {"save_best_only": save_best_only, "save_freq": 1}
    with ModelCheckpoint(tmp_path / "{step}", "loss", **settings) as ckpt:
        state = ckpt.update(ckpt.init(), {"w": 1}, {"loss": 0.5}, step=1)
        ckpt.update(state, {"w": 1}, {"loss": loss}, step=2)
        with pytest.warns(UserWarning, match=r"Write state = ckpt\.update\(state"):
            ckpt.update(state, {"w": 1}, {"loss": loss}, step=3)


def test_paths_and_trees_in_each_other_s_place(tmp_path):
    tree = {"w": np.zeros(2)}
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        path = ckpt.save(tree, 0)
        ckpt.wait()
        assert flaxckpt.load(ckpt.latest)["w"].shape == (2,)  # a record will do
        for call in (lambda: ckpt.restore("latest"), lambda: ckpt.restore(path),
                     lambda: flaxckpt.load(path, path)):  # fmt: skip
            with pytest.raises(SettingError, match=r"like=.*it is the wanted tree"):
                call()
        for call in (
            lambda: ckpt.restore("latest", tree),
            lambda: flaxckpt.load(tree, path),
        ):
            with pytest.raises(SettingError):
                call()
        with pytest.raises(SettingError, match=r"which=<int> cannot work"):
            ckpt.restore(which=0)
    with pytest.raises(SettingError, match="state=<tuple> cannot work"):
        flaxckpt.step(flaxckpt.step(ckpt.init(), {}, 0), {}, 0)


@pytest.mark.parametrize("value", [None, 3, b"runs", ["runs"]], ids=repr)
def test_what_is_no_path_is_refused(tmp_path, value):
    kind = f"<{type(value).__name__}> cannot work: pass the path of"
    for read in (flaxckpt.load, flaxckpt.load_weights, flaxckpt.verify):
        with pytest.raises(SettingError, match=f"path={kind} a checkpoint"):
            read(value)
    with pytest.raises(SettingError, match=f"directory={kind} a directory"):
        flaxckpt.list_checkpoints(value)
    with pytest.raises((SettingError, TemplateError), match="path"):
        ModelCheckpoint(value)


@pytest.mark.parametrize(
    "url", ["http://x/y", "file:///x", "az://b/c", "gs:///y", "s3://"]
)
def test_urls_that_cannot_be_read(tmp_path, url):
    is_ours = url.startswith(("gs", "s3"))
    problem = (
        "names no bucket" if is_ours else "is a URL of another kind than gs:// and"
    )
    ckpt = ModelCheckpoint(tmp_path / "{epoch}")
    for read in (
        flaxckpt.load,
        flaxckpt.load_weights,
        flaxckpt.verify,
        flaxckpt.list_checkpoints,
        lambda url: ckpt.restore(which=url),
    ):
        with pytest.raises(CheckpointPathError, match=f"'{url}' {problem}"):
            read(url)


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000 + "x"], ids=["name", "path"])
def test_no_checkpoint_has_a_name_that_is_too_long(tmp_path, name):
    ckpt = ModelCheckpoint(tmp_path / "{epoch}")
    for read in (
        flaxckpt.load,
        flaxckpt.load_weights,
        flaxckpt.verify,
        lambda path: ckpt.restore(which=path),
    ):
        with pytest.raises(CheckpointNotFoundError, match="No checkpoint at"):
            read(tmp_path / name)
    with pytest.raises(SettingError, match='pass "latest", "best" or the path'):
        ckpt.restore(which="x" * 300)


def test_checkpoints_of_orbax_are_named(tmp_path):
    """A run of its CheckpointManager, to go on with."""
    ocp.save(tmp_path / "7", {"w": np.zeros(2)})
    with (
        ModelCheckpoint(tmp_path / "{epoch}-{loss}") as ckpt,
        pytest.warns(UserWarning, match="checkpoints of plain Orbax: 7"),
    ):
        assert ckpt.restore() is None
    with pytest.raises(CheckpointNotFoundError, match="near it: 7"):
        flaxckpt.load(tmp_path)


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())


def test_without_syncing(tmp_path):
    with ModelCheckpoint(tmp_path / "best", sync=False) as ckpt:
        for epoch in range(2):
            ckpt.save({"w": np.full(4, epoch)}, epoch=epoch)
        assert ckpt.restore().epoch == 1
