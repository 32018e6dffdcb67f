"""What users pass as `logs`, wherever they pass it."""

import decimal
import enum
import fractions
import json
import warnings

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flaxckpt import (
    CheckpointState,
    MetricError,
    ModelCheckpoint,
    SettingError,
    Snapshot,
    TemplateError,
    step,
)
from flaxckpt._decision.logs import Unusable, find, left_out, normalized, plain_scalars

TREE = {"w": np.arange(3.0)}


class Clu:
    """A metric as those of `clu.metrics`."""

    def __init__(self, value):
        self.value = value

    def compute(self):
        return self.value


class Broken:
    def compute(self):
        raise ValueError("nothing was added yet")


class Bottomless:
    def compute(self):
        return Bottomless()


class Raising:
    """Objects of which even looking for a method fails."""

    @property
    def compute(self):
        raise RuntimeError("not yet")


class RaisingArray:
    @property
    def __array__(self):
        raise RuntimeError("not yet")


class Masked:
    def __array__(self, dtype=None, copy=None):
        return np.ma.array([1.0], mask=[1])


class Level(enum.IntEnum):
    LOW = 1


def average(value):
    metric = nnx.metrics.Average()
    metric.update(values=jnp.float32(value))
    return metric


SCALARS = {
    "float": lambda x: x,
    "numpy": np.float32,
    "bfloat16": jnp.bfloat16,
    "jax": jnp.float32,
    "(1,)": lambda x: np.full(1, x),
    "(1, 1)": lambda x: jnp.full((1, 1), x),
    "list": lambda x: [x],
    "not masked": np.ma.array,
    "not masked, (1,)": lambda x: np.ma.array([x], mask=[0]),
    "mean of the others": lambda x: np.ma.array([x, 9.0], mask=[0, 1]).mean(),
    "Decimal": lambda x: decimal.Decimal(str(x)),
    "Fraction": fractions.Fraction,
    "nnx metric": average,
    "clu metric": lambda x: Clu(jnp.float32(x)),
    "nnx variable": lambda x: nnx.Variable(jnp.float32(x)),
}
scalars = pytest.mark.parametrize("make", SCALARS.values(), ids=SCALARS)
OTHERS = {
    "object": object(),
    "module": warnings,
    "class": Clu,
    "set": {1},
    "bytes": b"0.5",
    "complex": 1j,
    "function": len,
    "broken metric": Broken(),
    "metric of metrics": Bottomless(),
    "ragged": [[1], [1, 2]],
    "texts": ["a", "b"],
    "date": np.datetime64("2026-01-01"),
    "time": np.timedelta64(1, "s"),
    "key": jax.random.key(0),
    "objects": np.array([None]),
    "raising": Raising(),
    "raising array": RaisingArray(),
    "masked": np.ma.masked,
    "mean of masked": np.ma.array([1.0, 2.0], mask=[1, 1]).mean(),
    "masked in part": np.ma.array([1.0, 2.0], mask=[0, 1]),
    "masked records": np.ma.array([(1.0, 2)], mask=[(1, 0)], dtype="f4,i4"),
    "list of masked": [np.ma.array(3, mask=True)],
    "says it is masked": Masked(),
}
others = pytest.mark.parametrize("value", OTHERS.values(), ids=OTHERS)


@pytest.fixture(autouse=True)
def promotes():
    """Flax's metrics divide a float by an integer."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@scalars
def test_a_scalar_in_any_form_is_decided_by_saved_and_shown(tmp_path, make):
    with ModelCheckpoint(
        tmp_path / "{epoch}-{val_loss:.2f}", save_best_only=True
    ) as ckpt:
        state = ckpt.init()
        for epoch, loss in enumerate([0.5, 0.25, 0.75]):
            state = ckpt.update(state, TREE, {"val_loss": make(loss)}, epoch)
        path = ckpt.save(TREE, 3, logs={"val_loss": make(1.0)})
    assert float(state.best) == 0.25
    assert path.name == "4-1.00"
    kept = {info.path.name: info.logs["val_loss"] for info in ckpt.checkpoints}
    assert kept == {"1-0.50": 0.5, "2-0.25": 0.25, "4-1.00": 1.0}
    assert all(type(value) is float for value in kept.values())
    state, save = step(
        CheckpointState.create(save_best_only=True), {"val_loss": make(0.5)}, 0
    )
    assert save
    assert float(state.best) == 0.5
    snapshot = Snapshot.like(TREE, {"val_loss": make(0.0)})
    snapshot = snapshot.take(True, TREE, {"val_loss": make(0.5)}, 0)
    assert snapshot.entries()[0].logs == {"val_loss": 0.5}


@pytest.mark.parametrize("where", ["update", "scan", "step", "snapshot"])
def test_nested_logs_are_found_by_their_joined_names(tmp_path, where):
    """Also where a program carries them."""
    losses, template = jnp.array([0.5, 0.25, 0.75]), tmp_path / "{epoch}-{val_loss}"
    ckpt = ModelCheckpoint(template, save_best_only=True)

    def logs_of(loss):
        return {"val": {"loss": loss, "acc": {"top1": loss[None]}}, "none": None}

    def update(state, loss, epoch):
        return ckpt.update(state, {"w": loss}, logs_of(loss), epoch)

    state = ckpt.init()
    if where == "update":
        for epoch, loss in enumerate(losses):
            state = update(state, loss, epoch)
    elif where == "scan":

        def body(carry, loss):
            return (update(*carry[:1], loss, carry[1]), carry[1] + 1), None

        run = jax.jit(lambda state: jax.lax.scan(body, (state, 0), losses)[0][0])
        state = run(state)
    elif where == "step":
        for epoch, loss in enumerate(losses):
            state, save = jax.jit(step)(state, logs_of(loss), epoch)
            if save:
                ckpt.save({"w": loss}, epoch, None, logs_of(loss), state)
    else:
        snapshot = Snapshot.like({"w": losses[0]}, logs_of(losses[0]), keep=2)
        take = jax.jit(lambda s, x, i: s.take(True, {"w": x}, logs_of(x), i))
        for epoch, loss in enumerate(losses):
            snapshot = take(snapshot, loss, epoch)
        ckpt.save_snapshot(snapshot)
    ckpt.close()
    kept = [(info.path.name, dict(info.logs)) for info in ckpt.checkpoints]
    assert kept == [
        ("1-0.5", {"val/loss": 0.5, "val/acc/top1": 0.5}),
        ("2-0.25", {"val/loss": 0.25, "val/acc/top1": 0.25}),
    ]
    assert ckpt.best.epoch == 1
    assert ckpt.restore(which="best").state.best == 0.25


def test_the_exact_name_comes_first():
    logs = normalized({"val": {"loss": 1}, "val_loss": 2})
    assert logs == {"val/loss": 1, "val_loss": 2}
    assert find(logs, "val_loss") == "val_loss"
    assert find(logs, "val/loss") == "val/loss"
    assert find({"val/loss": 1}, "val_loss") == "val/loss"
    assert find({"loss": 1}, "val_loss") == "val_loss"
    assert normalized({1: 0.5, None: 2, ("a", 1): 3}) == {
        "1": 0.5, "None": 2, "('a', 1)": 3
    }  # fmt: skip


def test_several_metrics_in_one_object(tmp_path):
    metrics = nnx.MultiMetric(
        loss=nnx.metrics.Average("loss"), acc=nnx.metrics.Average("acc")
    )
    metrics.update(loss=jnp.float32(0.5), acc=jnp.float32(0.25))
    with ModelCheckpoint(tmp_path / "{val_loss}", save_best_only=True) as ckpt:
        ckpt.update(ckpt.init(), TREE, {"val": metrics, "n": Level.LOW}, 0)
    (info,) = ckpt.checkpoints
    assert info.path.name == "0.5"
    assert info.logs == {"val/loss": 0.5, "val/acc": 0.25, "n": 1}


@others
def test_anything_else_is_left_out_and_said_once(tmp_path, value):
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        state, said = ckpt.init(), []
        with pytest.warns(UserWarning, match="'mine'") as caught:
            for epoch in range(3):
                logs = {"val_loss": 0.5, "mine": value}
                state = ckpt.update(state, TREE, logs, epoch)
        said = [str(each.message) for each in caught]
        assert len(said) == 1
        assert caught[0].filename == __file__
    assert [info.logs for info in ckpt.checkpoints] == [{"val_loss": 0.5}] * 3


@others
def test_anything_else_is_no_monitored_value_and_in_no_name(tmp_path, value):
    with pytest.raises(MetricError, match=r"'val_loss'.*must be a real number"):
        step(CheckpointState.create(save_best_only=True), {"val_loss": value}, 0)
    with pytest.raises(MetricError, match=r"'val_loss'.*must be a real number"):
        Snapshot.like(TREE, {"val_loss": value})
    best = ModelCheckpoint(tmp_path / "best", save_best_only=True)
    shows = ModelCheckpoint(tmp_path / "{mine}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(MetricError, match=r"'val_loss'.*must be a real number"):
            best.update(best.init(), TREE, {"val_loss": value}, 0)
        with pytest.raises(TemplateError, match=r"\{mine\}.* a number or a text"):
            shows.update(shows.init(), TREE, {"mine": value}, 0)
        with pytest.raises(TemplateError, match=r"\{mine\}.* a number or a text"):
            shows.save(TREE, 0, logs={"mine": value})
    assert list(tmp_path.iterdir()) == []


def test_arrays_are_left_out_and_said_too(tmp_path):
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        state = ckpt.init()
        with pytest.warns(UserWarning, match=r"'curve' has shape \(2,\)") as caught:
            for epoch, curve in enumerate([np.ones(2), jnp.ones(2), [1, 2]]):
                logs = {"text": "a", "curve": curve}
                state = ckpt.update(state, TREE, logs, epoch)
            run = jax.jit(lambda c: ckpt.update(state, c, {"curve": c, "x": 1.0}, 3))
            run(jnp.ones(2))
            ckpt.wait()
    assert len(caught) == 1
    assert [info.logs for info in ckpt.checkpoints] == [{"text": "a"}] * 3 + [
        {"x": 1.0}
    ]


def test_a_metric_that_pmap_gave_is_told_from_others():
    mesh = jax.make_mesh((8,), ("data",))
    losses = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, P("data")))
    state = CheckpointState.create(save_best_only=True)
    for value in (losses, np.asarray(losses)):
        with pytest.raises(MetricError, match=r"\(8,\).*lax\.pmean inside .* x\[0\]"):
            step(state, {"val_loss": value}, 0)
    with pytest.raises(MetricError, match=r"\(3,\).*\.mean\(\)"):
        step(state, {"val_loss": np.ones(3)}, 0)


@pytest.mark.parametrize("logs", [[("val_loss", 1)], 0.5, "val_loss"])
def test_logs_are_a_mapping(tmp_path, logs):
    ckpt = ModelCheckpoint(tmp_path / "{epoch}")
    state = CheckpointState.create(save_best_only=True)
    calls = [
        lambda: step(state, logs, 0),
        lambda: ckpt.update(ckpt.init(), TREE, logs, 0),
        lambda: ckpt.save(TREE, 0, logs=logs),
        lambda: Snapshot.like(TREE, logs),
        lambda: Snapshot.like(TREE, {"val_loss": 1}).take(True, TREE, logs, 0),
    ]
    for call in calls:
        with pytest.raises(SettingError, match="pass a mapping of names to metrics"):
            call()


@pytest.mark.parametrize("value", [10**400, -(10**400), decimal.Decimal("1e999")])
def test_numbers_beyond_all_floats_are_infinite(tmp_path, value):
    state, save = step(
        CheckpointState.create(save_best_only=True), {"val_loss": value}, 0
    )
    assert save
    assert float(state.best) == np.copysign(np.inf, float(value > 0) or -1)
    with ModelCheckpoint(tmp_path / "{epoch}", save_best_only=True) as ckpt:
        ckpt.update(ckpt.init(), TREE, {"val_loss": value}, 0)
    assert ckpt.best.epoch == 0
    assert ckpt.restore(which="best").state.best == state.best


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.decimals(),
    st.fractions(),
    st.binary(max_size=2),
    st.complex_numbers(),
    st.dates(),
    st.sampled_from([*OTHERS.values(), np.ones((1, 1)), np.ones(2), jnp.ones(1)]),
    st.lists(st.floats(), max_size=2),
)
KEYS = st.one_of(st.text(max_size=3), st.integers(), st.none())


@given(
    st.recursive(
        st.dictionaries(KEYS, LEAVES, max_size=4),
        lambda inner: st.dictionaries(KEYS, st.one_of(inner, LEAVES), max_size=3),
        max_leaves=8,
    )
)
@settings(max_examples=150)
def test_any_logs_have_one_form(logs):
    """Flat, of numbers, texts and arrays; and a record takes what `left_out` leaves."""
    flat = normalized(logs)
    again = normalized(flat)
    assert list(again) == list(flat)
    for name, value in flat.items():
        assert isinstance(name, str)
        assert again[name] is value or isinstance(value, np.ndarray | jax.Array)
        scalar = isinstance(value, int | float | str | np.generic | Unusable)
        assert scalar or value.shape == () or value.size != 1
    kept, rest = plain_scalars(flat), left_out(flat)
    assert kept.keys() | rest.keys() == flat.keys()
    assert not kept.keys() & rest.keys()
    assert all(type(value) in (bool, int, float, str) for value in kept.values())
    assert json.loads(json.dumps(kept)).keys() == kept.keys()


class Stubborn:
    """An object that shows nothing of itself."""

    def __getattr__(self, name):
        raise RuntimeError(f"no {name}")

    def __repr__(self):
        raise RuntimeError("no repr")


def without_end():
    logs = {"val_loss": 0.5}
    logs["more"] = {"logs": logs}
    return logs


REFUSED = {
    "in itself": (without_end(), SettingError, "nested without end"),
    "key without text": ({Stubborn(): 0.5}, SettingError, "key of type Stubborn"),
    "no mapping": (Stubborn(), SettingError, "<Stubborn> cannot work: pass a mapping"),
    "surrogate": ({"text": "a\ud800"}, MetricError, "text with surrogates"),
    "pair": ({"text": "\ud83d\ude00"}, MetricError, "text with surrogates"),
    "surrogate in a name": ({"a\udcff": 0.5}, MetricError, "name with surrogates"),
    "pair of names": ({"\ud83d": {"\ude00": 0.5}}, MetricError, "name with surr"),
    "struct": (
        {"loss": jax.ShapeDtypeStruct((), jnp.float32)},
        MetricError,
        "'loss'. is a jax.ShapeDtypeStruct, which has no value",
    ),
    "structs": (
        {"loss": jax.ShapeDtypeStruct((2,), jnp.float32)},
        MetricError,
        "'loss'. is a jax.ShapeDtypeStruct, which has no value",
    ),
}


@pytest.mark.parametrize(("logs", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_logs_that_cannot_be_are_refused_at_the_call(tmp_path, logs, kind, message):
    ckpt = ModelCheckpoint(tmp_path / "{epoch}")
    calls = [
        lambda: ckpt.update(ckpt.init(), TREE, logs, 0),
        lambda: ckpt.save(TREE, 0, logs=logs),
        lambda: jax.jit(lambda x: ckpt.update(ckpt.init(), x, logs, 0))(TREE),
    ]
    if kind is SettingError:
        state = CheckpointState.create(save_best_only=True, monitor="acc")
        calls.append(lambda: step(state, logs, 0))
    for call in calls:
        with pytest.raises(kind, match=message):
            call()
    ckpt.close()
    assert list(tmp_path.iterdir()) == []


def test_a_struct_is_no_monitored_value_and_is_one_for_like():
    logs = {"val_loss": jax.ShapeDtypeStruct((1,), jnp.float32)}
    with pytest.raises(MetricError, match="which has no value"):
        step(CheckpointState.create(save_best_only=True), logs, 0)
    snapshot = Snapshot.like(TREE, logs)
    with pytest.raises(MetricError, match="which has no value"):
        snapshot.take(True, TREE, logs, 0)


@pytest.mark.parametrize("monitor", ["a\ud800", "\ud83d\ude00"])
def test_a_monitor_that_no_record_keeps(tmp_path, monitor):
    with pytest.raises(SettingError, match=r"monitor=.* surrogates"):
        ModelCheckpoint(tmp_path / "{epoch}", monitor=monitor)
