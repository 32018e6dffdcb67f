"""The decision: settings, differences from Keras, and how it sits in programs."""

import pickle
import re
import subprocess
import sys
import textwrap
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flaxckpt import CheckpointState, MetricError, SettingError, step
from flaxckpt._decision.direction import direction


def decide(state, values, monitor="val_loss"):
    """Saves over epochs whose only metric has these values; None is no metric."""
    saves = []
    for epoch, value in enumerate(values):
        state, save = step(state, {} if value is None else {monitor: value}, epoch)
        saves.append(bool(save))
    return saves, state


def best_only(**settings):
    return CheckpointState.create(save_best_only=True, **settings)


# ---- vectors of Keras that stay exact (numbers of peers-callbacks.md) --------------------


def cadence(freq, batches, epochs, ids=None):
    state, saved = CheckpointState.create(save_freq=freq), []
    for epoch in range(epochs):
        for batch in ids or range(batches):
            state, save = step(state, {}, epoch, batch)
            if save:
                saved.append((epoch + 1, batch + 1))
        state, save = step(state, {}, epoch)
        assert not save
    return saved


def test_batches_are_counted_across_epochs():
    assert cadence(4, 5, 4) == [(1, 4), (2, 3), (3, 2), (4, 1), (4, 5)]  # 2
    assert cadence(15, 5, 10) == [(3, 5), (6, 5), (9, 5)]  # 3
    assert cadence(1, 2, 2) == [(1, 1), (1, 2), (2, 1), (2, 2)]  # 4
    assert cadence(2, 1, 4) == [(2, 1), (4, 1)]  # 4


def test_best_only_vectors():
    assert decide(best_only(), [0.5, 0.4, 0.4, 0.6, 0.3])[0] == [1, 1, 0, 0, 1]  # 12
    assert decide(best_only(mode="max"), [0.5, 0.5, 0.6])[0] == [1, 0, 1]  # 12
    assert decide(best_only(initial_value_threshold=0), [0.2])[0] == [0]  # 13
    state = best_only(mode="max", initial_value_threshold=-0.01)
    assert decide(state, [0])[0] == [1]  # 13
    inf = float("inf")
    assert decide(best_only(), [inf, inf, 0.5])[0] == [1, 0, 1]  # 15
    assert decide(best_only(), [-inf, -inf, -1e30])[0] == [1, 0, 0]  # 15


def test_threshold_has_no_effect_without_best_only():
    state = CheckpointState.create(initial_value_threshold=0.0)
    assert decide(state, [1.0, 2.0])[0] == [1, 1]


# ---- stated differences ----------------------------------------------------------------


def test_nan_never_improves_and_never_becomes_best():
    nan = float("nan")
    saves, state = decide(best_only(), [nan, 0.5, nan, 0.4])
    assert saves == [0, 1, 0, 1]
    assert state.best == np.float32(0.4)
    assert decide(best_only(initial_value_threshold=1), [nan, 0.5])[0] == [0, 1]


def test_remainder_of_the_batches_is_kept():
    """Two steps in a call, a check every three: the cadence stays three."""
    assert cadence(3, 6, 2, ids=[1, 3, 5]) == [(1, 4), (1, 6), (2, 4), (2, 6)]


def test_a_new_epoch_counts_from_its_start():
    """After epoch 0's only batch, 0, epoch 1's first call is for batches 0 and 1."""
    state = CheckpointState.create(save_freq=3)
    for epoch, batch, expected in [(0, 0, False), (1, 1, True), (1, 3, False)]:
        state, save = step(state, {}, epoch, batch)
        assert bool(save) is expected
    assert int(state.seen) == 2


def test_best_only_works_by_batches_from_the_start():
    state = best_only(save_freq=1, monitor="loss")
    saves = []
    for batch, loss in enumerate([0.5, 0.6, 0.4]):
        state, save = step(state, {"loss": loss}, 0, batch)
        saves.append(bool(save))
    assert saves == [True, False, True]


def test_unknown_mode_of_an_unneeded_direction_is_no_error():
    assert decide(CheckpointState.create("custom"), [None, None])[0] == [1, 1]


def test_min_delta_asks_for_more_than_it():
    state = best_only(mode="max", min_delta=0.5)
    assert decide(state, [0.0, 0.5, 0.75, 1.0, 1.5])[0] == [1, 0, 1, 0, 1]
    assert decide(best_only(min_delta=0.5), [1.0, 0.5, 0.25])[0] == [1, 0, 1]


MISSING = (
    "Nothing is saved as the best: save_best_only needs 'val_loss', and it is not in `logs` (keys "
    "there are: 'loss'). Pass the metric, or another `monitor`."
)


def test_missing_metric_warns_once_a_run_and_saves_nothing():
    for _ in range(2):  # the second run warns again
        state = best_only()
        with pytest.warns(UserWarning, match=r"needs 'val_loss'") as caught:
            for epoch, logs in enumerate([{"loss": 1.0}, {}, None, {"val_loss": None}]):
                state, save = step(state, logs, epoch)
                assert not save
        assert [str(each.message) for each in caught] == [MISSING]
        assert caught[0].filename == __file__


def test_missing_metric_warns_while_tracing():
    with pytest.warns(UserWarning, match=re.escape(MISSING)) as caught:
        _, save = jax.jit(step)(best_only(), {"loss": 1.0}, 0)
    assert not save
    assert len(caught) == 1


def test_missing_metric_is_no_matter_where_nothing_is_due():
    state = best_only(save_freq=2)
    state, save = step(state, {}, 0, 0)  # a warning would be an error here
    assert not save


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("value", [np.zeros((2, 3)), jnp.zeros((2, 3))])
def test_metric_that_is_no_scalar(wrap, value):
    with pytest.raises(MetricError) as caught:
        wrap(step)(best_only(), {"val_loss": value}, 0)
    assert str(caught.value) == (
        "logs['val_loss'] has shape (2, 3), and a monitored value must be a scalar. "
        "Reduce it first, say with .mean()."
    )
    assert isinstance(caught.value, ValueError)


def test_metric_that_is_no_number():
    for value in ("0.5", 1j):
        with pytest.raises(MetricError, match="must be a real number"):
            step(best_only(), {"val_loss": value}, 0)
    with pytest.raises(MetricError, match=r"has shape \(2,\)"):
        step(best_only(), {"val_loss": [0.5, 0.5]}, 0)


@pytest.mark.parametrize(
    "value",
    [1, True, np.float64(1), np.int8(1), np.bool_(True), np.array(1.0),
     jnp.bfloat16(1), jnp.float16(1), jnp.int32(1), jnp.ones((), bool)],
    ids=lambda value: f"{type(value).__name__}-{getattr(value, 'dtype', '')}",
)  # fmt: skip
def test_any_real_scalar_is_a_metric(value):
    saves, state = decide(best_only(), [value])
    assert saves == [1]
    assert state.best == 1
    assert state.best.dtype == np.float32


# ---- settings --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"save_freq": 0}, "save_freq=0 cannot work: pass \"epoch\", or a number of batches of at least 1."),
        ({"save_freq": -3}, "save_freq=-3 cannot work: pass \"epoch\", or a number of batches of at least 1."),
        ({"save_freq": True}, "save_freq=True cannot work: pass \"epoch\", or a number of batches of at least 1."),
        ({"save_freq": 2.5}, "save_freq=2.5 cannot work: pass \"epoch\", or a number of batches of at least 1."),
        ({"save_freq": "batch"}, "save_freq='batch' cannot work: pass \"epoch\", or a number of batches of at least 1."),
        ({"mode": "best"}, "mode='best' cannot work: pass \"auto\", \"min\" or \"max\"."),
        ({"monitor": ""}, "monitor='' cannot work: pass the name of a key in `logs`."),
        ({"save_best_only": 1}, "save_best_only=1 cannot work: pass True or False."),
        ({"min_delta": -0.1}, "min_delta=-0.1 cannot work: pass a number of at least 0."),
        ({"initial_value_threshold": float("nan")}, "initial_value_threshold=nan cannot work: pass a number to improve on, or None for none."),
        ({"monitor": "beta", "save_best_only": True}, "monitor='beta' cannot work: whether this metric is better low or high is not known by its name. Pass mode=\"min\" or mode=\"max\"."),
    ],
)  # fmt: skip
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(SettingError) as caught:
        CheckpointState.create(**settings)
    assert str(caught.value) == message
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name", ["epoch", "batch"])
@pytest.mark.parametrize(
    "value", [-1, 1.5, "1", jnp.float32(1), jnp.ones(2, int), 2**30]
)
def test_epoch_and_batch_are_zero_based_integers(name, value):
    call = {"epoch": 0, "batch": 0, name: value}
    with pytest.raises(
        SettingError, match=f"{name}=.* pass a zero-based integer below 2"
    ):
        step(CheckpointState.create(save_freq=2), {}, **call)


def test_numpy_integers_are_integers():
    state = CheckpointState.create(save_freq=np.int64(2))
    state, _ = step(state, {}, np.int64(0), np.uint8(0))
    state, save = step(state, {}, np.int64(0), np.uint8(1))
    assert save


def test_counters_do_not_overflow():
    state = CheckpointState.create(save_freq=1)
    for epoch in range(4):
        state, save = step(state, {}, epoch, 2**30 - 1)
        assert save
    assert int(state.batches) == 2**31 - 1
    traced, _ = jax.jit(step)(state, {}, 1, 5)
    assert int(traced.batches) == 2**31 - 1
    large = CheckpointState.create(save_freq=2**30)
    for call in (step, jax.jit(step)):
        state, save = call(large, {}, 0, 2**30 - 2)
        assert not save
        state, save = call(state, {}, 1, 2**30 - 1)
        assert save
        assert int(state.seen) == 2**30 - 1


# ---- as a pytree, in programs ------------------------------------------------------------


def test_state_is_a_pytree_of_scalars_with_static_settings():
    state = best_only()
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(state)]
    best = [np.float32, np.bool_]
    assert dtypes == [*best, *[np.int32] * 4, *best, np.int32]
    again = best_only()
    assert jax.tree.structure(state) == jax.tree.structure(again)
    assert hash(jax.tree.structure(state)) == hash(jax.tree.structure(again))
    assert jax.tree.structure(state) != jax.tree.structure(best_only(mode="max"))
    moved = pickle.loads(pickle.dumps(state))
    assert jax.tree.structure(moved) == jax.tree.structure(state)
    specs = jax.tree.map(lambda leaf: P(), state)  # other leaves are no error
    assert isinstance(specs, CheckpointState)


def test_the_second_call_compiles_nothing():
    traced = 0

    @jax.jit
    def jitted(state, loss, epoch):
        nonlocal traced
        traced += 1
        return step(state, {"val_loss": loss}, epoch)

    state = best_only()
    for epoch, loss in enumerate([0.5, 0.4, 0.3]):
        state, _ = jitted(state, loss, epoch)
    jitted(best_only(), 0.1, 0)  # another run, from the start
    assert traced == 1


def test_in_shard_map():
    mesh = jax.make_mesh((8,), ("data",))
    losses = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, P("data")))

    @jax.jit
    def run(state, losses):
        def inner(state, losses):
            loss = jax.lax.pmean(losses[0], "data")
            return step(state, {"val_loss": loss}, 0)

        return jax.shard_map(
            inner, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()
        )(state, losses)

    state, save = run(best_only(), losses)
    assert save
    assert state.best == 3.5
    assert save.sharding.is_fully_replicated


def compiled_scan(decide):
    """HLO of a scan of 10,000 tiny training steps, with or without the decision."""

    def train(state, w, losses):
        def body(carry, loss):
            w, state = carry
            loss = loss * w.sum()
            save = loss > 0
            if decide:
                state, save = step(state, {"val_loss": loss}, 0)
            return (w * 0.999, state), save

        return jax.lax.scan(body, (w, state), losses)

    lowered = jax.jit(train).lower(best_only(), jnp.ones(64), jnp.ones(10_000))
    text = lowered.compile().as_text()
    return re.sub(r", metadata=\{[^}]*\}|stack_frame_id=\d+", "", text)


def test_decision_in_a_scan_is_scalar_operations():
    """No callback, no transfer, and no copy of an array that was not there before."""
    text, without = compiled_scan(True), compiled_scan(False)
    operations = {*re.findall(r"[\])}] ([\w\-]+)\(", text)}
    assert "while" in operations
    assert not operations & {
        "custom-call", "infeed", "outfeed", "send", "recv", "copy-start", "async-start"
    }  # fmt: skip
    copies = r" = \w+\[(\d[\d,]*)\]\S* copy\("
    assert sorted(re.findall(copies, text)) == sorted(re.findall(copies, without))


def test_host_values_dispatch_nothing_to_jax():
    """After eager steps on host values JAX has not even looked for devices."""
    code = """
        import numpy as np
        import flaxckpt
        from jax._src import xla_bridge

        for freq in ("epoch", 2):
            state = flaxckpt.CheckpointState.create(save_best_only=True, save_freq=freq)
            for i in range(4):
                logs = {"val_loss": np.float32(1 / (i + 1))}
                state, save = flaxckpt.step(state, logs, i, None if freq == "epoch" else i)
                assert type(save) is np.bool_, type(save)
        assert not xla_bridge.backends_are_initialized()
        import jax.numpy as jnp
        jnp.zeros(())
        assert xla_bridge.backends_are_initialized()  # the probe works
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120
    )


def test_numbers_below_the_normal_count_as_zero_everywhere():
    """XLA on CPU flushes them; eager calls agree."""
    small = np.finfo(np.float32).tiny
    for call in (step, jax.jit(step)):
        state = best_only()
        state, save = call(state, {"val_loss": np.float32(small / 2)}, 0)
        assert save
        assert state.best == 0
        state, save = call(state, {"val_loss": np.float32(small / 4)}, 1)
        assert not save


def test_warning_filters_do_not_break_tracing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            step(best_only(), {}, 0)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("val_negative_log_likelihood", "min"),
        ("neg_elbo", "min"),
        ("eval/log_likelihood", "max"),
        ("neg_mean_squared_error", None),  # scikit-learn's, and better high
        ("neg_log_loss", None),
        ("inverse_accuracy", None),
        ("val_false_negative_rate", "min"),
        ("true_negatives", "max"),
        ("kid_score", "min"),
        ("perplexity_score", "min"),
        ("brier_score", "min"),
        ("judge_score", "max"),
        ("val_f1_score_2", "max"),
    ],
)
def test_directions_are_not_guessed_the_wrong_way_round(name, known):
    assert direction(name) == known
