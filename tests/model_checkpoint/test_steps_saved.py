"""Runs that count global steps: names, what is due, resuming, retention, programs."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0
import pytest
from orbax.checkpoint.checkpoint_managers import preservation_policy

import flaxckpt
from flaxckpt import ModelCheckpoint, SettingError, TemplateError


def names(ckpt):
    return [info.path.name for info in ckpt.checkpoints]


def tree_at(step):
    return {"w": np.full(3, step, np.float32)}


def train(path, steps, **settings):
    with ModelCheckpoint(path, **settings) as ckpt:
        state = ckpt.init()
        for at in steps:
            state = ckpt.update(state, tree_at(at), {"val_loss": 1 / (at + 1)}, step=at)
    return ckpt, state


def test_the_filepath_shows_the_step_that_was_given(tmp_path):
    ckpt, _ = train(tmp_path / "{step}", range(1, 36), save_freq=10)
    assert names(ckpt) == ["10", "20", "30"]
    found = ckpt.restore()
    assert (found.epoch, found.batch, found.step) == (None, None, 30)
    assert found.tree["w"].tolist() == [30] * 3
    assert [info.step for info in flaxckpt.list_checkpoints(tmp_path)] == [10, 20, 30]
    wide, _ = train(tmp_path / "{step:06d}-{val_loss:.2f}", [4], save_freq=2)
    assert names(wide) == ["000004-0.20"]


@pytest.mark.parametrize("kind", [int, np.int64, jnp.int32])
def test_a_step_may_be_any_integer(tmp_path, kind):
    ckpt, _ = train(tmp_path / "{step}", [kind(5), kind(10)], save_freq=5)
    assert names(ckpt) == ["5", "10"]


def test_save_takes_a_step(tmp_path):
    with ModelCheckpoint(tmp_path / "{step}") as ckpt:
        path = ckpt.save(tree_at(30), step=30, logs={"loss": 1.0})
        assert path == tmp_path / "30"
    assert ckpt.restore().step == 30


def test_a_run_goes_on_counting_where_it_was(tmp_path):
    whole, state = train(tmp_path / "whole" / "{step}", range(1, 100), save_freq=10)
    path = tmp_path / "parts" / "{step}"
    train(path, range(1, 58), save_freq=10)
    with ModelCheckpoint(path, save_freq=10) as ckpt:
        found = ckpt.restore(tree_at(0))
        assert found.step == 50
        resumed = found.state
        for at in range(found.step + 1, 100):
            logs = {"val_loss": 1 / (at + 1)}
            resumed = ckpt.update(resumed, tree_at(at), logs, step=at)
    assert names(ckpt) == names(whole)
    assert jax.tree.leaves(resumed) == jax.tree.leaves(state)


def test_one_call_may_stand_for_several_steps(tmp_path):
    ckpt, _ = train(tmp_path / "{step}", range(0, 100, 7), save_freq=20)
    assert names(ckpt) == ["21", "42", "63", "84"]


def test_in_a_program_steps_count_as_outside_of_it(tmp_path):
    eager, state = train(tmp_path / "eager" / "{step}", range(1, 31), save_freq=7)
    losses = jnp.float32([1 / (at + 1) for at in range(31)])
    with ModelCheckpoint(tmp_path / "jitted" / "{step}", save_freq=7) as ckpt:

        @jax.jit
        def run(state, steps):
            def body(state, at):
                tree = {"w": jnp.full(3, at, jnp.float32)}
                return ckpt.update(state, tree, {"val_loss": losses[at]}, step=at), None

            return jax.lax.scan(body, state, steps)[0]

        traced = run(ckpt.init(), jnp.arange(1, 31))
    assert names(ckpt) == names(eager) == ["7", "14", "21", "28"]
    assert jax.tree.leaves(traced) == jax.tree.leaves(state)
    assert ckpt.restore().step == 28
    assert ckpt.restore().tree["w"].tolist() == [28] * 3


POLICIES = {
    "EveryNSteps": (preservation_policy.EveryNSteps(20), [20, 40, 60, 80]),
    "LatestN": (preservation_policy.LatestN(2), [80, 90]),
    "AnyPreservationPolicy": (
        preservation_policy.AnyPreservationPolicy(
            [preservation_policy.EveryNSteps(40), preservation_policy.LatestN(1)]
        ),
        [40, 80],
    ),
    "CustomSteps": (preservation_policy.CustomSteps([10, 30]), [10, 30]),
}
WAYS = ["by step", "by batch", "by the clock", "by hand", "by hand with a step"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("policy", POLICIES)
def test_policies_see_the_step_however_it_is_saved(tmp_path, policy, way):
    preserve, wanted = POLICIES[policy]
    by_step = way in ("by step", "by hand with a step")
    settings = {"by step": {"save_freq": 10}, "by batch": {"save_freq": 10}}
    settings = settings.get(way, {})
    if way == "by the clock":
        settings = {"save_interval_secs": 1e-9}
    path = tmp_path / ("{step}" if by_step else "{batch}")
    with ModelCheckpoint(path, preserve=preserve, **settings) as ckpt:
        state = ckpt.init()
        # Ten batches are one call where each call saves.
        strides = range(1, 91) if "save_freq" in settings else range(10, 91, 10)
        for at in strides:
            when = {"step": at} if by_step else {"epoch": 0, "batch": at - 1}
            if way.startswith("by hand"):
                ckpt.save(tree_at(at), **when)
            else:
                state = ckpt.update(state, tree_at(at), {}, **when)
            ckpt.wait()
    kept = {info.step for info in ckpt.checkpoints}
    first = {10} if way == "by the clock" else set()  # the time begins there
    assert set(wanted) - first <= kept <= {*wanted, 90}, names(ckpt)


def test_batches_are_counted_through_epochs_and_runs_where_the_clock_decides(tmp_path):
    def run(epochs, found=None):
        for epoch in epochs:
            for batch in range(5):
                when = {"epoch": epoch, "batch": batch}
                ckpt.save(tree_at(batch), **when)
        ckpt.wait()

    path = tmp_path / "{epoch}-{batch}"
    with ModelCheckpoint(path) as ckpt:
        run(range(2))
    with ModelCheckpoint(path) as ckpt:
        ckpt.restore()
        run(range(2, 4))
    assert [info.step for info in ckpt.checkpoints] == list(range(1, 21))


def test_where_the_clock_decides_batches_count_through_epochs_and_runs(tmp_path):
    def run(epochs):
        # Only the ends of epochs are due; the clock counts all batches.
        settings = {"save_interval_secs": 1e9}
        with ModelCheckpoint(tmp_path / "{epoch}", **settings) as ckpt:
            tree, state, _ = ckpt.resume(tree_at(0))
            for epoch in epochs:
                for batch in range(7):
                    batch = jnp.int32(batch) if epoch % 2 else batch
                    state = ckpt.update(state, tree, {}, epoch, batch)
                state = ckpt.update(state, tree, {}, epoch)
        return [info.step for info in ckpt.checkpoints]

    assert run(range(3)) == [7, 14, 21]
    assert run(range(3, 5)) == [7, 14, 21, 28, 35]


def test_the_clock_goes_with_global_steps(tmp_path):
    ckpt, _ = train(tmp_path / "{step}", range(1, 4), save_interval_secs=1e-9)
    assert names(ckpt) == ["2", "3"]  # the time begins with the first call


def test_a_forced_batch_counts(tmp_path):
    with ModelCheckpoint(tmp_path / "{epoch}-{batch}") as ckpt:
        state = ckpt.init()
        for batch in range(50):
            force = batch % 10 == 9
            state = ckpt.update(state, tree_at(batch), {}, 0, batch, force=force)
    assert [info.step for info in ckpt.checkpoints] == [10, 20, 30, 40, 50]


def test_restoring_another_checkpoint_does_not_count_back(tmp_path):
    with ModelCheckpoint(tmp_path / "{epoch}-{batch}", "loss") as ckpt:
        for epoch in range(3):
            for batch in range(2):
                logs = {"loss": float(epoch != 0)}
                ckpt.save(tree_at(0), epoch, batch, logs)
            ckpt.restore(which="best")
    assert [info.step for info in ckpt.checkpoints] == [1, 2, 3, 4, 5, 6]


def test_a_run_goes_on_from_a_step_that_was_saved_without_a_state(tmp_path):
    with ModelCheckpoint(tmp_path / "{step}", save_freq=10) as ckpt:
        ckpt.save(tree_at(57), step=57)
        tree, state, start = ckpt.resume(tree_at(0))
        for at in range(start, 71):
            state = ckpt.update(state, tree, {}, step=at)
    assert names(ckpt) == ["57", "60", "70"]


def test_a_better_step_is_the_best(tmp_path):
    with ModelCheckpoint(
        tmp_path / "{step}", "loss", save_best_only=True, save_freq=1, save_last=True
    ) as ckpt:
        state = ckpt.init()
        for at, loss in enumerate([3.0, 2.0, 5.0, 1.0, 4.0]):
            state = ckpt.update(state, tree_at(at), {"loss": loss}, step=at)
    assert names(ckpt) == ["1", "3"]
    assert ckpt.best.path.name == "3"
    assert ckpt.restore().step == 4
    assert ckpt.restore(which="best").step == 3


def test_messages_name_the_step(tmp_path, capsys):
    train(tmp_path / "{step}", [10], save_freq=10, verbose=1)
    assert "Step 10: saving model to" in capsys.readouterr().out


def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path):
    with ModelCheckpoint(tmp_path / "{step}") as ckpt:
        with pytest.raises(SettingError, match="save_freq"):
            ckpt.update(ckpt.init(), tree_at(1), {}, step=1)
        with pytest.raises(SettingError, match="not both"):
            ckpt.save(tree_at(1), 0, step=1)
        with pytest.raises(SettingError, match="step= for a global step"):
            ckpt.save(tree_at(1))
        with pytest.raises(SettingError, match="step= for a global step"):
            ckpt.update(ckpt.init(), tree_at(1), {})
        with pytest.raises(TemplateError, match="'step'"):
            ckpt.save(tree_at(1), epoch=0)
        for wrong in (-1, 1.0, "1", 2**31, jnp.arange(2), True):
            with pytest.raises(SettingError, match="step"):
                ckpt.save(tree_at(1), step=wrong)
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        with pytest.raises(TemplateError, match="fields there are: step"):
            ckpt.save(tree_at(1), step=1)
        with pytest.raises(TemplateError, match="has no epoch and no batch"):
            ckpt.save(tree_at(1), step=1, logs={"epoch": 3})
    assert not [*tmp_path.iterdir()]


def test_a_step_given_beside_a_key_of_logs_is_the_one_that_is_shown(tmp_path):
    with ModelCheckpoint(tmp_path / "{step}") as ckpt:
        assert ckpt.save(tree_at(1), step=7, logs={"step": 3}).name == "7"
        assert ckpt.save(tree_at(1), 0, logs={"step": 3}).name == "3"


def test_a_forced_step_saves_without_a_cadence(tmp_path):
    with ModelCheckpoint(tmp_path / "{step}") as ckpt:
        ckpt.update(ckpt.init(), tree_at(5), {}, step=5, force=True)
    assert names(ckpt) == ["5"]


def test_orbax_reads_a_checkpoint_of_a_step(tmp_path):
    train(tmp_path / "{step}", [10], save_freq=10)
    with v0.StandardCheckpointer() as reader:
        found = reader.restore(tmp_path / "10/state", tree_at(0))
    assert found["w"].tolist() == [10] * 3
