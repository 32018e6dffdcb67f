"""Objects with a state are leaves: saved as they are at the call, put back in place."""

import collections
import dataclasses
import json

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import flaxckpt
from flaxckpt import ModelCheckpoint, SettingError, UnsupportedLeafError
from flaxckpt._trees.stateful import decoded_state, state_of


class Counter:
    """Counts, and has its count as its state."""

    def __init__(self, at=0):
        self.at = at

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        return self.at - 1

    def get_state(self):
        return self.at

    def set_state(self, state):
        if not isinstance(state, int):
            raise TypeError(f"a count is no {type(state).__name__}")
        self.at = state


class Torchlike:
    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def grain_iterator():
    data = grain.MapDataset.range(100).shuffle(seed=3).repeat().batch(4)
    return iter(data.to_iter_dataset())


def grain_loader():
    sampler = grain.samplers.IndexSampler(
        100, shuffle=True, seed=3, num_epochs=None,
        shard_options=grain.sharding.NoSharding(),
    )  # fmt: skip
    source = grain.sources.RangeDataSource(0, 100, 1)
    return iter(grain.DataLoader(data_source=source, sampler=sampler, worker_count=0))


def generator():
    return np.random.default_rng(5)


def draws(made):
    if isinstance(made, np.random.Generator):
        return made.normal(size=3)
    if isinstance(made, np.random.RandomState):
        return made.normal(size=3)
    return np.asarray(next(made))


MAKERS = [Counter, grain_iterator, grain_loader, generator, np.random.RandomState]


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_an_object_goes_on_where_it_was(tmp_path, make):
    made = make()
    for _ in range(3):
        draws(made)
    with ModelCheckpoint(tmp_path / "{step}") as ckpt:
        ckpt.save({"w": jnp.ones(3), "it": made}, step=3)
        after = [draws(made) for _ in range(4)]  # while the save may be under way
    fresh = make()
    tree = flaxckpt.load(tmp_path / "3", {"w": jnp.zeros(3), "it": fresh})
    assert tree["it"] is fresh
    np.testing.assert_array_equal([draws(fresh) for _ in range(4)], after)


def test_resume_sets_them(tmp_path):
    with ModelCheckpoint(tmp_path / "{step}", save_freq=1) as ckpt:
        tree, state, start = ckpt.resume((jnp.zeros(2), Counter()))
        for step in range(start, 3):
            batch = next(tree[1])
            tree = tree[0] + batch, tree[1]
            state = ckpt.update(state, tree, {}, step=step)
    with ModelCheckpoint(tmp_path / "{step}", save_freq=1) as ckpt:
        (w, counter), state, start = ckpt.resume((jnp.zeros(2), Counter()))
        assert (start, counter.at, w.tolist()) == (3, 3, [3.0, 3.0])


def test_without_like_it_is_the_state(tmp_path):
    state = {"epoch": 2, "seed": 2**100, "order": (1, 2), "rows": np.arange(3)}
    with ModelCheckpoint(tmp_path / "x") as ckpt:
        ckpt.save({"loader": Torchlike(state), "w": 1.0}, epoch=0)
    loaded = flaxckpt.load(tmp_path / "x")["loader"]
    np.testing.assert_equal(loaded, state)
    assert type(loaded["order"]) is tuple


def test_they_are_no_weights(tmp_path):
    with ModelCheckpoint(tmp_path / "x") as ckpt:
        ckpt.save({"params": {"w": jnp.ones(2)}, "thing": Counter(4)}, epoch=0)
    assert set(flaxckpt.load_weights(tmp_path / "x")) == {"params"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Weights:
    """A model that has a state_dict, as users of PyTorch may write it."""

    w: jax.Array

    def state_dict(self):
        return {"w": self.w}

    def load_state_dict(self, state):
        raise AssertionError


def test_a_node_of_a_tree_is_no_such_object(tmp_path):
    tree = {"model": Weights(jnp.ones(2)), "opt_state": {"mu": jnp.ones(2)}}
    with ModelCheckpoint(tmp_path / "x") as ckpt:
        ckpt.save(tree, epoch=0)
    assert flaxckpt.load_weights(tmp_path / "x")["model"]["w"].tolist() == [1, 1]
    assert flaxckpt.load(tmp_path / "x", tree)["model"].w.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ({"x": object()}, "builtins.object"),
        ({"x": jnp.ones(2)}, "ArrayImpl"),
        ([{1, 2}], "builtins.set"),
        (np.array([None]), "numpy.ndarray of dtype object"),
        (np.zeros(2, [("a", "i4")]), "numpy.ndarray of dtype"),
        (1j, "builtins.complex in its state. A state may hold"),
        ([10**5000], "no JSON can hold"),
        (collections.namedtuple("Pair", "a b")(1, 2), "Pair"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_state_that_cannot_come_back_is_refused(tmp_path, state, named):
    with ModelCheckpoint(tmp_path / "x") as ckpt:
        with pytest.raises(UnsupportedLeafError, match=f"loader.*Torchlike.*{named}"):
            ckpt.save({"loader": Torchlike(state), "w": 1.0}, epoch=0)
    assert not list(tmp_path.glob("x*"))


def test_a_state_that_holds_itself_is_refused(tmp_path):
    state = []
    state.append(state)
    with ModelCheckpoint(tmp_path / "x") as ckpt:
        with pytest.raises(UnsupportedLeafError, match="nested too deeply"):
            ckpt.save({"loader": Torchlike(state), "w": 1.0}, epoch=0)


class Broken(Counter):
    def get_state(self):
        raise RuntimeError("boom")


class Stubborn(Counter):
    def set_state(self, state):
        raise RuntimeError("no")


class Evasive:
    def __getattr__(self, name):
        raise KeyError(name)


def test_an_object_that_gives_no_state_is_named(tmp_path):
    with ModelCheckpoint(tmp_path / "x") as ckpt:
        with pytest.raises(UnsupportedLeafError, match=r"it: a Broken.*boom"):
            ckpt.save({"it": Broken(), "w": 1.0}, epoch=0)
        with pytest.raises(UnsupportedLeafError, match="it: an object of type Evasive"):
            ckpt.save({"it": Evasive(), "w": 1.0}, epoch=0)


def test_all_objects_get_their_states_or_none(tmp_path):
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        ckpt.save({"a": Counter(5), "b": Counter(6)}, epoch=0)
        first, second = Counter(1), Stubborn(2)
        for load in (ckpt.restore, ckpt.restore_into, ckpt.resume):
            with pytest.raises(flaxckpt.CheckpointError, match="Stubborn at b did not"):
                load({"a": first, "b": second})
        assert (first.at, second.at) == (1, 2)


def test_an_nnx_module_is_no_such_object(tmp_path):
    class Odd(nnx.Module, pytree=False):
        def __init__(self):
            self.w = nnx.Param(jnp.ones(2))

        def state_dict(self):
            raise AssertionError

        load_state_dict = state_dict

    with ModelCheckpoint(tmp_path / "x") as ckpt:
        with pytest.raises(UnsupportedLeafError, match="m: an object of type"):
            ckpt.save({"m": Odd(), "w": 1.0}, epoch=0)


def test_a_state_that_is_none_of_ours_is_damage():
    for text in (b"{", b'{"x":["<i4",[1],"AAAAAA=="]}', b'{"array":["(2,f4",[1],"AA"]}',
                 b'{"array":["<f4",[9],"AAAA"]}', b"[" * 9000, b'{"a":1,"b":2}'):  # fmt: skip
        with pytest.raises(ValueError):  # noqa: PT011 - the caller names the leaf
            decoded_state(np.frombuffer(text, np.uint8))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn, jnp.int4])
def test_dtypes_of_jax_alone_come_back(dtype):
    for state in (np.ones(3, dtype), np.ones(3, dtype)[0]):
        found = decoded_state(state_of(Torchlike(state)))
        assert type(found) is type(state)
        assert found.dtype == state.dtype
        np.testing.assert_array_equal(found, state)


def test_a_traced_program_cannot_read_a_state(tmp_path):
    ckpt, counter = ModelCheckpoint(tmp_path / "{epoch}"), Counter()
    program = jax.jit(lambda state, w: ckpt.update(state, (w, counter), {}, 0))
    with pytest.raises(UnsupportedLeafError, match="outside of jit"):
        program(ckpt.init(), jnp.ones(2))


def test_the_object_says_why_it_takes_no_such_state(tmp_path):
    with ModelCheckpoint(tmp_path / "x") as ckpt:
        ckpt.save((Torchlike("text"), 1.0), epoch=0)
    with pytest.raises(flaxckpt.CheckpointError, match="Counter at 0 did not take"):
        flaxckpt.load(tmp_path / "x", (Counter(), 1.0))
    with pytest.raises(flaxckpt.CheckpointMismatchError, match="state"):
        flaxckpt.load(tmp_path / "x", (jnp.ones(3), 1.0))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
    | hnp.arrays(hnp.scalar_dtypes(), hnp.array_shapes(max_dims=2, max_side=3)),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple)
    | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers()), inner),
    max_leaves=8,
)  # fmt: skip


@given(VALUES)
def test_any_state_comes_back_as_it_was(state):
    stored = state_of(Torchlike(state))
    assert len(stored) & (len(stored) - 1) == 0
    found = decoded_state(stored)
    assert repr(found) == repr(state)
    json.loads(stored.tobytes())


def batches():
    yield from range(10)


def test_an_iterator_without_state_is_skipped_ahead(tmp_path):
    data = batches()
    with ModelCheckpoint(tmp_path / "{step}") as ckpt:
        assert ckpt.resume({"w": 1.0}, data=data)[2] == 0
        assert next(data) == 0
        ckpt.save({"w": 1.0}, step=3)
    first, second = batches(), batches()
    with ModelCheckpoint(tmp_path / "{step}") as ckpt:
        assert ckpt.resume({"w": 1.0}, data=[first, second])[2] == 4
    assert next(first) == next(second) == 4
    short = iter([1, 2])
    with ModelCheckpoint(tmp_path / "{step}") as ckpt:
        with pytest.raises(SettingError, match=r"after 2 batches.*has seen 4"):
            ckpt.resume({"w": 1.0}, data=short)
        with pytest.raises(SettingError, match=r"iter\("):
            ckpt.resume({"w": 1.0}, data=[1, 2])


def test_of_an_epoch_the_batches_are_skipped_that_were_seen(tmp_path):
    with ModelCheckpoint(tmp_path / "{epoch}-{batch}", save_freq=1) as ckpt:
        ckpt.save({"w": 1.0}, epoch=2, batch=1)
    data = batches()
    with ModelCheckpoint(tmp_path / "{epoch}-{batch}", save_freq=1) as ckpt:
        start = ckpt.resume({"w": 1.0}, data=data)[2]
    assert (start.epoch, start.batch, next(data)) == (2, 2, 2)


def test_an_iterator_of_the_tree_is_set_and_not_skipped(tmp_path):
    with ModelCheckpoint(tmp_path / "{step}") as ckpt:
        ckpt.save({"it": Counter(4)}, step=3)
    counter = Counter()
    with ModelCheckpoint(tmp_path / "{step}") as ckpt:
        ckpt.resume({"it": counter}, data=counter)
    assert counter.at == 4
