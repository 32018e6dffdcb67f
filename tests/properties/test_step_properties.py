"""`step` agrees with its plain-Python twin, however it is called."""

import warnings

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import strategies
from hypothesis import given, settings
from twin import Twin

from flaxckpt import CheckpointState, step

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
    assert int(state.seen) == twin.seen
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
