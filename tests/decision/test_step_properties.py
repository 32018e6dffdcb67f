"""`step` agrees with its plain-Python twin, however it is called."""

import math
import tempfile
import warnings
from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import strategies
from hypothesis import given, settings
from twin import Twin

from flaxckpt import CheckpointState, ModelCheckpoint, step
from flaxckpt._decision.state import plain_state
from flaxckpt._decision.step import without_improvement

TREE = {"w": np.zeros(3, np.float32)}

STEP = jax.jit(step)


def logs_of(value, wrap=lambda x: x):
    return {"other": 1.0} if value is None else {"score": wrap(value)}


def run_twin(config, calls, dtype=np.float32):
    twin = Twin(**config, dtype=dtype)
    saves = [twin.step(logs_of(value), epoch, batch) for epoch, batch, value in calls]
    return saves, twin


def assert_state(state, twin):
    best = np.nan if twin.best is None else twin.best
    # Bits, so that signed zeros count; all NaNs are one "no best".
    np.testing.assert_array_equal(state.best, best)
    if twin.best is not None:
        assert np.asarray(state.best).tobytes() == np.asarray(twin.best).tobytes()
    assert (int(state.seen), int(state.stale)) == (twin.seen, twin.stale)
    assert plain_state(state)["met"] == (None if twin.met is None else float(twin.met))
    if twin.last is not None:
        assert (int(state.last_epoch), int(state.last_batch)) == twin.last


@given(strategies.settings(), strategies.calls())
@settings(max_examples=400)
def test_eager_on_host_values(config, calls):
    expected, twin = run_twin(config, calls)
    state, saves = CheckpointState.create(**config), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for epoch, batch, value in calls:
            state, save = step(state, logs_of(value), epoch, batch)
            assert type(save) is np.bool_
            saves.append(bool(save))
    assert saves == expected
    assert_state(state, twin)
    assert all(isinstance(leaf, np.generic) for leaf in jax.tree.leaves(state))


@given(strategies.settings(), strategies.calls())
@settings(max_examples=60)
def test_eager_on_device_values(config, calls):
    expected, twin = run_twin(config, calls)
    state, saves = CheckpointState.create(**config), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for epoch, batch, value in calls:
            batch = None if batch is None else jnp.int32(batch)
            logs = logs_of(value, jnp.float32)
            state, save = step(state, logs, jnp.int32(epoch), batch)
            saves.append(bool(save))
    assert saves == expected
    assert_state(state, twin)


@given(strategies.settings(), strategies.calls())
@settings(max_examples=40)
def test_jit(config, calls):
    expected, twin = run_twin(config, calls)
    state, saves = CheckpointState.create(**config), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for epoch, batch, value in calls:
            state, save = STEP(state, logs_of(value, np.float32), epoch, batch)
            saves.append(bool(save))
    assert saves == expected
    assert_state(state, twin)


@given(
    st.integers(1, 7).flatmap(lambda n: strategies.settings(save_freq=st.just(n))),
    strategies.calls(may_miss=False, ends=False).filter(bool),
)
@settings(max_examples=40)
def test_scan_over_batches(config, calls):
    expected, twin = run_twin(config, calls)

    def body(state, call):
        epoch, batch, value = call
        return step(state, {"score": value}, epoch, batch)

    epochs, batches, values = zip(*calls, strict=True)
    inputs = np.int32(epochs), np.int32(batches), np.float32(values)
    state, saves = jax.jit(lambda s, x: jax.lax.scan(body, s, x))(
        CheckpointState.create(**config), inputs
    )
    assert saves.tolist() == expected
    assert_state(state, twin)


@given(
    strategies.settings(),
    st.integers(1, 5).flatmap(
        lambda n: st.lists(
            st.lists(strategies.metrics, min_size=n, max_size=n), min_size=1, max_size=4
        )
    ),
)
@settings(max_examples=40)
def test_vmap_over_an_ensemble(config, members):
    """Each member of a vmapped ensemble decides as it would alone."""

    def member(state, values):
        saves = []
        for index, value in enumerate(values):
            batch = None if config["save_freq"] == "epoch" else index
            state, save = step(state, {"score": value}, index // 2, batch)
            saves.append(jnp.asarray(save))
        return state, jnp.stack(saves)

    state = CheckpointState.create(**config)
    states = jax.tree.map(lambda leaf: np.stack([leaf] * len(members)), state)
    states, saves = jax.vmap(member)(states, np.float32(members))
    for index, values in enumerate(members):
        calls = [
            (i // 2, None if config["save_freq"] == "epoch" else i, value)
            for i, value in enumerate(values)
        ]
        expected, twin = run_twin(config, calls)
        assert saves[index].tolist() == expected
        assert_state(jax.tree.map(lambda leaf: leaf[index], states), twin)  # noqa: B023


@given(
    strategies.settings(),
    st.lists(st.one_of(st.floats(), strategies.metrics), min_size=1, max_size=6),
)
@settings(max_examples=40)
def test_x64_compares_in_float64(config, values):
    with jax.enable_x64(True):
        calls = [(epoch, None, value) for epoch, value in enumerate(values)]
        config["save_freq"] = "epoch"
        expected, twin = run_twin(config, calls, dtype=np.float64)
        for call in (step, STEP):
            state, saves = CheckpointState.create(**config), []
            assert state.best.dtype == np.float64
            for epoch, _, value in calls:
                state, save = call(state, {"score": np.float64(value)}, epoch)
                saves.append(bool(save))
            assert saves == expected
            assert_state(state, twin)


_EDGES = [0.0, -0.0, 1e-40, -1e-40, 1.1754944e-38, 1e-45, 0.1, 1 / 3, 1e300, -1e300]
_NUMBERS = st.one_of(st.sampled_from(_EDGES), st.floats(), st.floats(width=32))


@given(
    best=_NUMBERS,
    value=_NUMBERS,
    kind=st.sampled_from([float, np.float32, np.float64]),
    mode=st.sampled_from(["min", "max"]),
    min_delta=st.sampled_from([0.0, 1e-45, 1e-38, 0.5, 1e30]),
    wide=st.booleans(),
)
@settings(deadline=None, max_examples=2000)
def test_what_is_passed_over_is_no_new_best(best, value, kind, mode, min_delta, wide):
    with jax.enable_x64(wide), np.errstate(all="ignore"):
        state = CheckpointState.create(
            "m", mode=mode, save_best_only=True, min_delta=min_delta
        )
        state, _ = step(state, {"m": best}, 0)
        logs = {"m": kind(value)}
        if (passed := without_improvement(state, logs)) is not None:
            after, save = step(state, logs, 1)
            assert not save
            assert after.best_value.tobytes() == state.best_value.tobytes()
            assert after == passed


@pytest.mark.parametrize(
    "logs",
    [
        None, {}, {"other": 1.0}, {"m": 1}, {"m": True}, {"m": "1.0"}, {"m": None},
        {"m": 2.0, "text": "x"}, {"m": 2.0, "much": np.ones(3)}, {"m": jnp.float32(2)},
        {"m": np.float32([2.0])}, {1: 2.0, "m": 2.0}, {"m": 2.0, "\ud800": 1.0},
    ],
    ids=repr,
)  # fmt: skip
def test_what_has_to_be_looked_at_is_not_without_improvement(logs):
    state = CheckpointState.create("m", mode="min", save_best_only=True)
    state, _ = step(state, {"m": 1.0}, 0)
    assert without_improvement(state, {"m": 2.0}) is not None
    assert without_improvement(state, logs) is None


@pytest.mark.parametrize("save_freq", ["epoch", 3])
@given(data=st.data())
@settings(deadline=None, max_examples=30)
def test_updates_that_pass_over_are_those_that_do_not(save_freq, data):
    """The same states, warnings and errors, whatever the calls are."""
    logs_of = st.sampled_from(
        [{"m": x} for x in (0.5, 1.0, 2.0, np.float32(0.7), math.nan, math.inf, 1)]
        + [{"m": jnp.float32(0.6)}, {"m": 2.0, "x": np.ones(2)}, {}, {"m": "x"}]
    )
    epochs = st.sampled_from([0, 1, 2, 5, np.int64(3), -1, 2**30, True, 1.5])
    calls = data.draw(st.lists(st.tuples(logs_of, epochs, st.booleans()), max_size=12))
    told = []
    for is_plain in (True, False):
        said = []
        with tempfile.TemporaryDirectory() as directory:
            ckpt = ModelCheckpoint(
                Path(directory, "best"), "m", mode="min", save_best_only=True,
                save_freq=save_freq,
            )  # fmt: skip
            if not is_plain:
                ckpt._settings.__dict__["goes_by_best_alone"] = False
            state, older = ckpt.init(), None
            for number, (logs, epoch, is_again) in enumerate(calls):
                given = older if is_again and older is not None else state
                batch = None if save_freq == "epoch" else number
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    try:
                        after = ckpt.update(given, TREE, logs, epoch, batch)
                        older, state = given, after
                        said.append(plain_state(state))
                    except ValueError as error:
                        said.append(str(error))
                said.append([str(each.message) for each in caught])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ckpt.close()
            counts = ckpt.counts
            said.append((counts.saved + counts.superseded, counts.failed))
            said.append([(i.epoch, i.logs) for i in ckpt.checkpoints])
        told.append(repr(said))
    assert told[0] == told[1]
