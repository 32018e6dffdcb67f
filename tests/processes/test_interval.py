"""Checks that are due by the clock."""

import datetime
import math
import time

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flaxckpt
from flaxckpt import CheckpointError, ModelCheckpoint, SettingError
from flaxckpt._processes.clock import Interval, calls_to_wait

TREE = {"w": np.arange(3.0)}


class Clock:
    """A clock that is set by hand."""

    now = 100.0

    def __call__(self):
        return self.now


def made(path, *args, **settings):
    """Make an object whose clock is set by hand, with an interval of 10 s."""
    ckpt = ModelCheckpoint(path, *args, save_interval_secs=10, **settings)
    clock = Clock()
    ckpt._triggers.interval = Interval(10, clock)
    return ckpt, clock


def names(ckpt):
    ckpt.wait()
    return [info.path.name for info in ckpt.checkpoints]


# ---- in one process --------------------------------------------------------------------


def test_the_first_call_begins_it():
    clock = Clock()
    interval = Interval(10, clock)
    clock.now += 50
    assert not interval.is_over()
    clock.now += 9.5
    assert not interval.is_over()
    clock.now += 0.5
    assert interval.is_over()
    assert interval.is_over()  # until it begins anew
    interval.restart()
    clock.now += 9.5
    assert not interval.is_over()


def test_the_first_call_after_it_saves(tmp_path):
    ckpt, clock = made(tmp_path / "{batch}")
    with ckpt:
        state = ckpt.init()
        for batch in range(30):  # 4 s each: what is over at 12 s begins anew then
            state = ckpt.update(state, TREE, None, 0, batch)
            clock.now += 4
        assert names(ckpt) == ["4", "7", "10", "13", "16", "19", "22", "25", "28"]
        assert ckpt.restore(TREE).batch == 27


def test_by_the_real_clock(tmp_path):
    with ModelCheckpoint(tmp_path / "{batch}", save_interval_secs=0.05) as ckpt:
        state, start, batch = ckpt.init(), time.monotonic(), 0
        while ckpt.counts.saved < 2 and time.monotonic() < start + 60:
            state = ckpt.update(state, TREE, None, 0, batch)
            batch += 1
        assert time.monotonic() - start >= 0.1
        assert 1 <= len(names(ckpt)) < batch


@pytest.mark.parametrize("how", ["due", "forced", "saved"])
def test_other_saves_begin_it_anew(tmp_path, how):
    ckpt, clock = made(tmp_path / "{epoch}")
    with ckpt:
        state = ckpt.update(ckpt.init(), TREE, None, 0, 0)
        clock.now += 9
        if how == "saved":
            ckpt.save(TREE, 0, state=state)
        else:
            batch = None if how == "due" else 1
            state = ckpt.update(state, TREE, None, 0, batch, force=how == "forced")
        for secs, saved in [(9, 1), (1, 2)]:
            clock.now += secs
            state = ckpt.update(state, TREE, None, 1, 0)
            ckpt.wait()
            assert ckpt.counts.saved == saved


def test_the_count_of_batches_goes_on(tmp_path):
    ckpt, clock = made(tmp_path / "{batch}", save_freq=5)
    with ckpt:
        state = ckpt.init()
        for batch in range(10):
            clock.now += 10 * (batch == 3)
            state = ckpt.update(state, TREE, None, 0, batch)
        assert names(ckpt) == ["4", "5", "10"]


def test_only_what_improves_is_saved_then_too(tmp_path):
    ckpt, clock = made(tmp_path / "{batch}", "loss", save_best_only=True)
    with ckpt:
        state = ckpt.init()
        for batch, loss in enumerate([0.5, 0.4, 0.6, 0.45, 0.3]):
            clock.now += 10
            state = ckpt.update(state, TREE, {"loss": loss}, 0, batch)
        assert names(ckpt) == ["2", "5"]
        assert float(state.best) == np.float32(0.3)


def test_without_a_metric_the_last_is_saved(tmp_path):
    ckpt, clock = made(tmp_path / "best", save_best_only=True, save_last=True)
    with ckpt:
        state = ckpt.update(ckpt.init(), TREE, {"loss": 1.0}, 0, 0)
        clock.now += 10
        state = ckpt.update(state, TREE, {"loss": 1.0}, 0, 1)  # does not warn
        ckpt.wait()
        assert ckpt.latest.path.name == "last"
        assert ckpt.restore(TREE).batch == 1
        state = ckpt.update(state, TREE, {"val_loss": 1.0}, 0)
        assert names(ckpt) == ["best"]


def test_without_a_metric_and_a_slot_it_warns(tmp_path):
    ckpt, clock = made(tmp_path / "best", save_best_only=True)
    with ckpt:
        state = ckpt.update(ckpt.init(), TREE, None, 0, 0)
        clock.now += 10
        with pytest.warns(UserWarning, match="Nothing is saved"):
            ckpt.update(state, TREE, None, 0, 1)


def test_a_save_that_failed_is_tried_again_at_the_next_call(tmp_path):
    ckpt, clock = made(tmp_path / "{loss}")
    with ckpt:
        state = ckpt.update(ckpt.init(), TREE, None, 0, 0)
        clock.now += 10
        with pytest.raises(flaxckpt.TemplateError):
            ckpt.update(state, TREE, None, 0, 1)
        ckpt.update(state, TREE, {"loss": 0.5}, 0, 2)
        assert names(ckpt) == ["0.5"]


def test_in_a_trace_it_is_refused(tmp_path):
    ckpt = ModelCheckpoint(tmp_path / "{batch}", save_interval_secs=1)
    with ckpt:

        @jax.jit
        def step(state, batch):
            return ckpt.update(state, TREE, None, 0, batch)

        with pytest.raises(CheckpointError, match="scan_in_chunks"):
            step(ckpt.init(), 3)

        @jax.jit
        def hidden(x):  # nothing of the trace is passed
            ckpt.update(ckpt.init(), TREE, None, 0, 3)
            return x

        with pytest.raises(CheckpointError, match="save_interval_secs"):
            hidden(1.0)


@pytest.mark.parametrize(
    "value",
    [True, 0, -1, math.nan, math.inf, "10", datetime.timedelta(seconds=10), [1]],
)
@pytest.mark.parametrize("name", ["save_interval_secs", "timeout_secs"])
def test_what_is_no_time_is_refused(tmp_path, value, name):
    with pytest.raises(SettingError, match=name):
        ModelCheckpoint(tmp_path / "run/{epoch}", **{name: value})
    assert not (tmp_path / "run").exists()


def test_a_run_too_short_for_it_is_no_reason_to_warn(tmp_path):
    with ModelCheckpoint(tmp_path / "{batch}", save_interval_secs=1e6) as ckpt:
        ckpt.update(ckpt.init(), TREE, None, 0, 0)
    assert not list(tmp_path.iterdir())


# ---- when several meet -----------------------------------------------------------------


@given(
    calls=st.integers(1, 10**9),
    passed=st.floats(0, 1e9),
    secs=st.floats(1e-9, 1e9),
)
def test_how_long_to_wait(calls, passed, secs):
    wait = calls_to_wait(calls, passed, secs)
    assert (wait == 0) == (passed >= secs)
    assert wait <= calls


@pytest.mark.parametrize("step", [1e-4, 0.01, 1.0, 300.0])
def test_at_a_steady_pace_it_is_over_in_time_after_few_meetings(step):
    calls, meetings, wait = 1, 0, 1
    while wait:
        wait = calls_to_wait(calls, calls * step, 600)
        meetings += 1
        calls += wait
    assert 600 <= calls * step <= 600 + step + 1e-6
    assert meetings < 100


def test_steps_that_grow_slower_do_not_make_it_many_times_as_long():
    """The first hundred are dispatched at once, the others take a second."""
    calls, wait = 1, 1
    while wait:
        now = calls * 1e-6 if calls <= 100 else calls - 100.0
        wait = calls_to_wait(calls, now, 600)
        calls += wait
    assert now < 605
