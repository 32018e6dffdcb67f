"""A global step in place of epoch and batch: when a check is due, and what is refused."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from flaxckpt import CheckpointState, SettingError, step


def due_by_hand(steps, every):
    """Tell at which steps a check is due: add the steps up, and keep what is left."""
    seen, last, due = 0, 0, []
    for at in steps:
        if at < last:  # a new count begins
            seen, last = 0, 0
        seen += at - last
        last = at
        due.append(seen >= every)
        seen %= every
    return due


@given(st.lists(st.integers(0, 60), max_size=12), st.integers(1, 25))
def test_a_check_is_due_where_the_steps_add_up(steps, every):
    state, due = CheckpointState.create(save_freq=every), []
    for at in steps:
        state, save = step(state, {}, step=at)
        due.append(bool(save))
        assert (state.batches, state.seen) == (at, at % every)
        assert type(save) is np.bool_
    assert due == due_by_hand(steps, every)

    def body(state, at):
        return step(state, {}, step=at)

    traced, saves = jax.lax.scan(
        body, CheckpointState.create(save_freq=every), jnp.array(steps, jnp.int32)
    )
    assert saves.tolist() == due
    assert jax.tree.leaves(traced) == jax.tree.leaves(state)


@pytest.mark.parametrize(("first", "due"), [(0, [10, 20]), (1, [10, 20, 30])])
def test_each_multiple_is_due_and_step_0_is_not(first, due):
    state, found = CheckpointState.create(save_freq=10), []
    for at in range(first, first + 30):
        state, save = step(state, {}, step=at)
        found += [at] * bool(save)
    assert found == due


def test_the_best_is_compared_at_due_steps_only():
    state = CheckpointState.create("loss", save_best_only=True, save_freq=2)
    saved = []
    for at, loss in enumerate([5.0, 4.0, 3.0, 1.0, 2.0]):
        state, save = step(state, {"loss": loss}, step=at)
        saved += [at] * bool(save)
    assert saved == [2, 4]
    assert state.best == 2.0


@pytest.mark.parametrize("steps", [2**31 - 1, np.int64(7), np.int32(7), jnp.int32(7)])
def test_integers_of_all_kinds_count(steps):
    state, save = step(CheckpointState.create(save_freq=7), {}, step=steps)
    assert bool(save)
    assert int(state.batches) == int(steps)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"step": -1}, "step"),
        ({"step": 2**31}, "step"),
        ({"step": 1.5}, "step"),
        ({"step": jnp.float32(1)}, "step"),
        ({"step": jnp.arange(2)}, "step"),
        ({}, "epoch"),
        ({"step": 1, "epoch": 1}, "epoch"),
        ({"step": 1, "batch": 1}, "batch"),
        ({"batch": 1}, "epoch"),
    ],
)
def test_what_is_no_moment_is_refused(given, name):
    state = CheckpointState.create(save_freq=1)
    with pytest.raises(SettingError, match=name):
        step(state, {}, **given)


def test_a_step_where_epochs_are_due_is_refused():
    with pytest.raises(SettingError, match="save_freq"):
        step(CheckpointState.create(), {}, step=3)
