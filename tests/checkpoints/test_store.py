"""What is written and read back: values, kinds, structures, shardings, mismatches."""

import collections
import json

import equinox as eqx
import flax.struct
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as v0
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from hypothesis import given, settings
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp
from saved_trees import assert_same, saved

import flaxckpt
from flaxckpt import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    UnsupportedLeafError,
)
from flaxckpt._checkpoints import read as _read
from flaxckpt._checkpoints import write as _write

Pair = collections.namedtuple("Pair", ["left", "right"])


ARRAYS = {
    "bfloat16": jnp.array([1.5, -0.0, jnp.nan], jnp.bfloat16),
    "float16": jnp.array([1e-7, jnp.inf], jnp.float16),
    "float8": jnp.array([0.5, -1.0], jnp.float8_e4m3fn),
    "int4": jnp.array([-8, 7], jnp.int4),
    "int8": jnp.array([-128, 127], jnp.int8),
    "uint32": jnp.array([2**32 - 1], jnp.uint32),
    "int32": jnp.array(16777217, jnp.int32),
    "bool": jnp.array([[True], [False]]),
    "complex64": jnp.array([1 + 2j], jnp.complex64),
    "empty": jnp.zeros((0, 3), jnp.bfloat16),
    "key": jax.random.key(7),
    "keys": jax.random.split(jax.random.key(1, impl="rbg"), 3),
    "no_keys": jax.random.split(jax.random.key(1), 0),
}
HOST = {
    "float64": np.array([0.1, np.nan]),
    "int64": np.array([[2**62]]),
    "zero_d": np.array(3.0),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "strided": np.arange(10)[::-2],
    "empty": np.zeros((2, 0), np.int8),
    "scalar": np.float32(0.1),
    "bool_scalar": np.bool_(True),
    "bfloat16_scalar": jnp.bfloat16.dtype.type(0.1),
    "int": -(2**63),
    "float": 0.1,
    "negative_zero": -0.0,
    "inf": float("inf"),
    "true": True,
    "complex": 1 - 2j,
    "str": "größe/\n\"'",
    "no_str": "",
    "bytes": b"\x00\xff",
    "no_bytes": b"",
}
CONTAINERS = {
    "none": None,
    "dict": {},
    "list": [],
    "tuple": (),
    "nested": [(), {"a": None, "b": [{}]}, (1, (2.0,))],
    "numbers": {1: np.ones(1), 10: {}, 2: "x"},
    "awkward names": {"": 1, "..": 2, "a/b": 3, "a b\n": 4, "ü": 5, ".x": 6},
}


@pytest.mark.parametrize("like", [False, True], ids=["plain", "like"])
@pytest.mark.parametrize(
    "tree", [ARRAYS, HOST, CONTAINERS], ids=["arrays", "host", "containers"]
)
def test_round_trip_is_exact(tmp_path, tree, like):
    path = saved(tmp_path, tree)
    assert_same(flaxckpt.load(path, tree if like else None), tree)


@pytest.mark.parametrize(
    "tree",
    [3, "x", np.ones(2), [None, (), 1], {"a": np.zeros(0)}, np.zeros(0)],
    ids=repr,
)
def test_round_trip_of_the_smallest_trees(tmp_path, tree):
    path = saved(tmp_path, tree)
    assert_same(flaxckpt.load(path), tree)
    assert_same(flaxckpt.load(path, tree), tree)


dtypes = st.sampled_from(["f4", "f8", "f2", "i1", "i4", "i8", "u1", "u8", "?", "c16"])
host_leaves = st.one_of(
    hnp.arrays(
        dtypes, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
    ),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.booleans(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.none(),
)
names = st.text(st.characters(exclude_characters=".", codec="utf-8"), max_size=4)
trees = st.recursive(
    host_leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(names, inner, max_size=3),
    ),
    max_leaves=6,
)


def is_path(tree):
    """Tell whether a tree is a text that `like` takes for a path."""
    return isinstance(tree, str) and ("/" in tree or tree in ("latest", "best"))


@given(trees.filter(jax.tree.leaves).filter(lambda tree: not is_path(tree)))
@settings(max_examples=40)
def test_round_trip_of_any_tree(tmp_path_factory, tree):
    path = saved(tmp_path_factory.mktemp("trees"), tree)
    assert_same(flaxckpt.load(path), tree)
    assert_same(flaxckpt.load(path, tree), tree)


def test_what_is_written_loads_with_plain_orbax(tmp_path):
    tree = {"params": {"w": jnp.ones((2, 3)), "b": [jnp.zeros(2), (1, 2.5)]}, "s": "x"}
    plain = ocp.load(saved(tmp_path, tree))
    assert_same(
        plain, {**tree, "params": {**tree["params"], "b": [jnp.zeros(2), [1, 2.5]]}}
    )
    state = train_state()
    restored = ocp.load(saved(tmp_path, state), jax.eval_shape(lambda: state))
    assert_same(restored, state)


def test_what_plain_orbax_wrote_loads(tmp_path):
    state = train_state()
    with v0.CheckpointManager(tmp_path / "v0") as manager:
        manager.save(3, args=v0.args.StandardSave(state))
        manager.wait_until_finished()
    ocp.save(tmp_path / "v1", state)
    with ocp.training.Checkpointer(tmp_path / "managed") as checkpointer:
        checkpointer.save(5, state)
    found = [tmp_path / "v0/3", tmp_path / "v1"]
    found += [each for each in (tmp_path / "managed").iterdir() if each.is_dir()]
    assert len(found) == 3
    for path in found:
        assert_same(flaxckpt.load(path, state), state)
        assert_same(flaxckpt.load(path, jax.eval_shape(lambda: state)), state)
        plain = flaxckpt.load(path)
        assert_same(plain["params"], state.params)
        assert_same(flaxckpt.load_weights(path)["params"], state.params)
        ckpt = flaxckpt.ModelCheckpoint(tmp_path / "new")
        restored = ckpt.restore(state, path)
        assert_same(restored.tree, state)
        assert restored.epoch is None
        with pytest.raises(CheckpointMismatchError, match="params/w: checkpoint has"):
            wrong = {"w": jnp.ones(9), "b": state.params["b"]}
            flaxckpt.load(path, state.replace(params=wrong))


# ---- shardings -------------------------------------------------------------------------


def test_restore_goes_to_the_sharding_of_like(tmp_path):
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    array = jnp.arange(64.0).reshape(8, 8)
    keys = jax.random.split(jax.random.key(0), 8)
    spec = lambda *axes: NamedSharding(mesh, P(*axes))  # noqa: E731
    tree = {
        "w": jax.device_put(array, spec("x", "y")),
        "r": jax.device_put(array, spec()),
        "k": jax.device_put(keys, spec("x")),
        "e": jax.device_put(jnp.zeros((8, 0)), spec("x")),
        "u": jnp.float32(1),
        "i": 3,
    }
    path = saved(tmp_path, tree)
    other = jax.make_mesh((2,), ("z",), devices=jax.devices()[6:])
    for shardings in (
        {"w": spec("x", "y"), "r": spec(), "k": spec("x"), "e": spec("x")},
        {"w": spec(None, ("x", "y")), "r": spec("x"), "k": spec(), "e": spec()},
        dict.fromkeys("wrke", NamedSharding(other, P("z"))),
        dict.fromkeys("wrke", jax.sharding.SingleDeviceSharding(jax.devices()[3])),
    ):
        like = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[name])
            if name in shardings
            else leaf
            for name, leaf in tree.items()
        }
        got = flaxckpt.load(path, like)
        assert_same(got, tree)
        for name, sharding in shardings.items():
            assert got[name].sharding.is_equivalent_to(sharding, tree[name].ndim)
        assert not got["u"].committed
        concrete = flaxckpt.load(path, got)
        for name, sharding in shardings.items():
            assert concrete[name].sharding.is_equivalent_to(sharding, tree[name].ndim)
    plain = flaxckpt.load(path)
    assert_same(plain, tree)
    assert not plain["w"].committed
    jax.jit(lambda a, b: a + b)(plain["u"], tree["w"])  # uncommitted: mixes with any


# ---- mismatches ------------------------------------------------------------------------


def test_a_mismatch_lists_every_leaf(tmp_path):
    tree = {"a": jnp.ones((2, 3)), "b": {"c": jnp.int32(1)}, "d": 1, "e": [jnp.ones(1)]}
    path = saved(tmp_path, tree)
    like = {
        "a": jnp.ones((3, 2)),
        "b": {"c": jnp.float32(1)},
        "d": "x",
        "f": None,
        "g": 2,
    }
    with pytest.raises(CheckpointMismatchError) as caught:
        flaxckpt.load(path, like)
    assert str(caught.value) == (
        f"Checkpoint {str(path)!r} differs from what was asked for in 5 leaves:\n"
        "  a: checkpoint has float32[2,3], wanted float32[3,2]\n"
        "  b/c: checkpoint has int32[], wanted float32[]\n"
        "  d: checkpoint has int, wanted str\n"
        "  g: checkpoint has nothing, wanted int\n"
        "  e/0: checkpoint has float32[1], wanted nothing\n"
        "Pass a `like` with exactly the stored leaves, or none to get them as plain "
        "containers. To load what both have: flaxckpt.load(path, like, partial=True)."
    )
    assert caught.value.differences[1] == ("b/c", "int32[]", "float32[]")


def test_a_mismatch_of_dtypes_alone_can_be_cast(tmp_path):
    path = saved(tmp_path, {"w": jnp.array([1.0, 16777217.0]), "n": np.arange(3)})
    like = {"w": jnp.zeros(2, jnp.bfloat16), "n": np.zeros(3, np.int8)}
    with pytest.raises(CheckpointMismatchError) as caught:
        flaxckpt.load(path, like)
    assert str(caught.value).endswith(
        "  n: checkpoint has int64[3], wanted int8[3]\n"
        "  w: checkpoint has float32[2], wanted bfloat16[2]\n"
        "Pass a `like` of the stored dtypes, or cast=True to convert."
    )
    got = flaxckpt.load(path, like, cast=True)
    assert_same(got, {"w": like["w"] + jnp.array([1, 16777216], jnp.bfloat16),
                      "n": np.arange(3, dtype=np.int8)})  # fmt: skip
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    sharding = NamedSharding(mesh, P("x"))
    like["w"] = jax.ShapeDtypeStruct((2,), jnp.bfloat16, sharding=sharding)
    assert flaxckpt.load(path, like, cast=True)["w"].sharding == sharding


def test_a_sharding_that_does_not_divide_is_a_mismatch(tmp_path):
    path = saved(tmp_path, {"w": jnp.ones(3)})
    sharding = NamedSharding(
        jax.make_mesh((2,), ("x",), devices=jax.devices()[:2]), P("x")
    )
    with pytest.raises(CheckpointMismatchError, match=r"x.* which do not divide it"):
        flaxckpt.load(
            path, {"w": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=sharding)}
        )


def test_a_shape_is_never_cast(tmp_path):
    path = saved(tmp_path, {"w": jnp.ones(2)})
    with pytest.raises(CheckpointMismatchError) as caught:
        flaxckpt.load(path, {"w": jnp.ones(3)}, cast=True)
    assert str(caught.value) == (
        f"Checkpoint {str(path)!r} differs from what was asked for in 1 leaf:\n"
        "  w: checkpoint has float32[2], wanted float32[3]\n"
        "Pass a `like` of the stored shapes and dtypes; nothing is reshaped. To keep "
        "what `like` has where they differ: flaxckpt.load(path, like, partial=True)."
    )


def test_python_numbers_and_scalar_arrays_stand_for_each_other(tmp_path):
    """A fresh TrainState has step=0, a trained one an int32 array, and the reverse."""
    path = saved(tmp_path, {"step": jnp.int32(7), "lr": 0.5, "n": 3})
    got = flaxckpt.load(path, {"step": 0, "lr": jnp.float32(0), "n": np.int8(0)})
    assert_same(got, {"step": 7, "lr": jnp.float32(0.5), "n": np.int8(3)})


def test_a_python_number_that_does_not_fit_is_no_match(tmp_path):
    path = saved(tmp_path, {"n": 300, "x": 0.1})
    with pytest.raises(CheckpointMismatchError, match="300 does not fit int8 exactly"):
        flaxckpt.load(path, {"n": np.int8(0), "x": 0.0})
    with pytest.raises(
        CheckpointMismatchError, match=r"0\.1 does not fit float32 exactly"
    ):
        flaxckpt.load(path, {"n": 0, "x": np.float32(0)})
    weak = jax.eval_shape(lambda: {"n": 300, "x": 0.1})  # JAX's own idea of 0.1
    assert flaxckpt.load(path, weak)["x"] == jnp.float32(0.1)


def test_64_bits_are_not_truncated_in_silence(tmp_path):
    with jax.enable_x64(True):
        path = saved(tmp_path, {"w": jnp.array([0.1], jnp.float64)})
        assert flaxckpt.load(path)["w"].dtype == jnp.float64
    for like in (None, {"w": jax.ShapeDtypeStruct((1,), np.float64)}):
        with pytest.raises(CheckpointMismatchError) as caught:
            flaxckpt.load(path, like)
        assert (
            "w: checkpoint has float64[1], wanted float64[1] (a JAX array has "
            in str(caught.value)
        )
    assert flaxckpt.load(path, {"w": np.zeros(1)})["w"].dtype == np.float64
    cast = flaxckpt.load(path, {"w": jnp.zeros(1)}, cast=True)
    assert cast["w"] == jnp.float32(0.1)


def test_other_prng_implementations_are_a_mismatch(tmp_path):
    path = saved(tmp_path, {"k": jax.random.key(0)})
    with pytest.raises(
        CheckpointMismatchError, match=r"has key<fry>\[\], wanted key<rbg>"
    ):
        flaxckpt.load(path, {"k": jax.random.key(0, impl="rbg")}, cast=True)
    with pytest.raises(CheckpointMismatchError, match=r"wanted uint32\[2\]"):
        flaxckpt.load(path, {"k": jnp.zeros(2, jnp.uint32)})


def test_leaves_that_cannot_be_saved(tmp_path):
    deleted = jnp.ones(2)
    deleted.delete()
    tree = {
        "deleted": deleted,
        "masked": np.ma.array([1]),
        "obj": [object()],
        "shape": jax.ShapeDtypeStruct((), jnp.float32),
        "text": np.array(["a"]),
        "time": np.array(["2026"], "M8[D]"),
        "wide": np.ones(1, np.longdouble),
        "x": collections.OrderedDict([(1, 1), ("1", 2)]),
    }
    ckpt = flaxckpt.ModelCheckpoint(tmp_path / "ckpts/{epoch}")
    with pytest.raises(UnsupportedLeafError) as caught:
        ckpt.update(ckpt.init(), tree, {}, 0)
    assert str(caught.value) == (
        "8 leaves of the tree cannot be saved:\n"
        "  deleted: an array that was deleted (donated to a jitted call)\n"
        "  masked: a masked array; save its data and mask as two arrays\n"
        "  obj/0: an object of type object\n"
        "  shape: an object of type ShapeDtypeStruct\n"
        "  text: an array of dtype <U1\n"
        "  time: an array of dtype datetime64[D]\n"
        "  wide: an array of dtype float128\n"
        "  x/1: has the same name as its neighbor: their keys, 1 and '1', are the same "
        "as text; rename one\n"
        "A leaf must be a JAX or numpy array of numbers, booleans or PRNG keys, a "
        "Python number, str, bytes or a function. Leave the others out of `tree`."
    )
    assert not (tmp_path / "ckpts").exists()


# ---- damage and absence ----------------------------------------------------------------


def test_nothing_there(tmp_path):
    saved(tmp_path, {"w": 1})
    for load in (flaxckpt.load, flaxckpt.load_weights):
        with pytest.raises(CheckpointNotFoundError) as caught:
            load(tmp_path / "2")
        assert str(caught.value) == (
            f"No checkpoint at {str(tmp_path / '2')!r} (checkpoints near it: 1). "
            "flaxckpt.list_checkpoints(directory) lists those of flaxckpt."
        )
    with pytest.raises(CheckpointNotFoundError, match="near it: 1"):
        flaxckpt.load(tmp_path)  # the directory of checkpoints, not one of them


def test_damage_is_reported_as_damage(tmp_path):
    path = saved(tmp_path, {"w": jnp.ones(1000), "v": jnp.zeros(2)})
    data = max(
        (p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    data.unlink()
    with pytest.raises(CheckpointCorruptError, match="is damaged"):
        flaxckpt.load(path)
    (path / "flaxckpt_leaves.json").write_text("{")
    with pytest.raises(
        CheckpointCorruptError, match=r"flaxckpt_leaves\.json is not what was written"
    ):
        flaxckpt.load(path)


def test_a_newer_format_is_refused_by_name(tmp_path):
    path = saved(tmp_path, {"w": 1})
    record = json.loads((path / "flaxckpt.json").read_text())
    (path / "flaxckpt.json").write_text(json.dumps({**record, "format": 99}))
    with pytest.warns(UserWarning, match=r"its format is 99.*upgrade"):
        assert flaxckpt.list_checkpoints(tmp_path) == ()


@pytest.mark.parametrize("large", [0, 2**40], ids=["files", "database"])
def test_arrays_are_read_without_orbax_and_as_it_reads_them(
    tmp_path, monkeypatch, large
):
    monkeypatch.setattr(_write, "_LARGE_LEAF", large)
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    sharded = jax.device_put(
        jnp.arange(64.0).reshape(8, 8), NamedSharding(mesh, P("x", "y"))
    )
    tree = {
        **{name: x for name, x in ARRAYS.items() if "key" not in name},
        "scalar": jnp.float32(3),
        "numpy": np.arange(7),
        "sharded": sharded,
    }
    saved(tmp_path, tree)
    path = saved(tmp_path, tree)  # the first by Orbax, the second in its form
    for each in (tmp_path / "1", path):
        with monkeypatch.context() as patch:
            patch.setattr(_read, "Reader", refuse)
            by_orbax = flaxckpt.load(each)
        with monkeypatch.context() as patch:
            patch.setattr(_read, "read_by_orbax", refuse)
            found = flaxckpt.load(each)
            assert_same(found, by_orbax)
            like = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)
            wanted = jax.tree.map(np.asarray, found)
            assert_same(flaxckpt.load(each, like), wanted)
        assert_same(flaxckpt.load(each, tree), tree)  # onto the mesh


def test_a_like_that_names_no_devices(tmp_path):
    path = saved(tmp_path, {"w": jnp.ones(8)})
    mesh = jax.make_mesh((8,), ("x",))
    sharding = NamedSharding(mesh.abstract_mesh, P("x"))
    like = {"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)}
    with pytest.raises(UnsupportedLeafError, match="names no devices"):
        flaxckpt.load(path, like)


def refuse(*args, **kwargs):
    raise ValueError("not this way")


def test_cast_converts_numbers_too(tmp_path):
    path = saved(tmp_path, {"rate": 0.1, "step": np.int64(3), "n": 7})
    like = {"rate": jnp.float32(0), "step": 0.0, "n": jnp.bfloat16(0)}
    with pytest.raises(CheckpointMismatchError):
        flaxckpt.load(path, like)
    found = flaxckpt.load(path, like, cast=True)
    assert (found["rate"].dtype, found["rate"]) == (jnp.float32, np.float32(0.1))
    assert (type(found["step"]), found["step"]) == (float, 3.0)
    assert (found["n"].dtype, float(found["n"])) == (jnp.bfloat16, 7.0)
    with pytest.raises(
        UnsupportedLeafError, match="1 leaf of the tree cannot be restored"
    ):
        flaxckpt.load(path, {**like, "n": print})


# ---- weights ---------------------------------------------------------------------------


class BatchNormState(TrainState):
    batch_stats: dict
    rng: jax.Array


def train_state():
    return TrainState.create(
        apply_fn=None,
        params={"w": jnp.arange(4.0), "b": jnp.zeros(2)},
        tx=optax.adam(1e-3),
    ).replace(step=jnp.int32(3))


def weights_of(tmp_path, tree, **settings):
    """The weights from a whole checkpoint, and from one of weights; both the same."""
    whole = saved(tmp_path / "whole", tree, **settings)
    alone = saved(tmp_path / "alone", tree, save_weights_only=True, **settings)
    assert_same(flaxckpt.load_weights(whole), flaxckpt.load_weights(alone))
    assert_same(flaxckpt.load_weights(alone), flaxckpt.load(alone))
    return flaxckpt.load_weights(whole), whole


def test_weights_of_a_train_state(tmp_path):
    state = BatchNormState.create(
        apply_fn=None,
        params={"w": jnp.ones(2)},
        tx=optax.adam(1e-3),
        batch_stats={"mean": jnp.zeros(2)},
        rng=jax.random.key(0),
    )
    got, path = weights_of(tmp_path, state)
    assert_same(got, {"params": state.params, "batch_stats": state.batch_stats})
    abstract = jax.eval_shape(lambda: got)
    assert_same(flaxckpt.load_weights(path, abstract), got)


def test_weights_of_a_dict_of_training_state(tmp_path):
    tree = {"params": {"w": jnp.ones(2)}, "opt_state": (jnp.ones(3),), "step": 3}
    assert_same(weights_of(tmp_path, tree)[0], {"params": tree["params"]})


def test_weights_of_anything_else_are_all_of_it(tmp_path):
    tree = {"params": {"w": jnp.ones(2)}, "batch_stats": {"m": jnp.zeros(1)}}
    assert_same(weights_of(tmp_path, tree)[0], tree)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(2, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


@pytest.mark.parametrize("form", ["module", "state", "dict", "tuple", "states"])
def test_weights_of_nnx(tmp_path, form):
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    tree = {
        "module": lambda: model,
        "state": lambda: nnx.state(model),
        "dict": lambda: {"model": model, "optimizer": optimizer},
        "tuple": lambda: (model, optimizer),
        "states": lambda: {"model": nnx.state(model), "opt": nnx.state(optimizer)},
    }[form]()
    got, path = weights_of(tmp_path, tree)
    got = got["model"] if form in ("dict", "states") else got
    assert sorted(got) == ["linear", "norm"]
    kernel = model.linear.kernel[...]
    assert_same(got["linear"]["kernel"], kernel)
    # Into a fresh model, and whole into a fresh tree.
    fresh = Model(nnx.Rngs(1))
    wanted = nnx.state(fresh, nnx.Not(nnx.RngState))
    loaded = flaxckpt.load_weights(
        path, {"model": wanted} if form in ("dict", "states") else wanted
    )
    nnx.update(fresh, loaded["model"] if form in ("dict", "states") else loaded)
    np.testing.assert_array_equal(fresh.linear.kernel[...], kernel)
    whole = flaxckpt.load(path, jax.tree.map(lambda leaf: leaf, tree))
    assert jax.tree.structure(whole) == jax.tree.structure(tree)


class Net(eqx.Module):
    mlp: eqx.nn.MLP
    scale: jax.Array


def test_equinox_modules_with_functions_in_them(tmp_path):
    model = Net(eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0)), jnp.ones(2))
    path = saved(tmp_path, {"model": model, "n": 1})
    fresh = Net(eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(9)), jnp.zeros(2))
    got = flaxckpt.load(path, {"model": fresh, "n": 0})["model"]
    assert eqx.tree_equal(got, model)
    assert got.mlp.activation is fresh.mlp.activation
    assert flaxckpt.load(path)["model"]["mlp"]["activation"] is None
    assert flaxckpt.load_weights(saved(tmp_path, model))["scale"].tolist() == [1, 1]


def test_own_weights(tmp_path):
    tree = {"a": {"w": jnp.ones(2)}, "b": jnp.zeros(1), "n": 300}
    got, path = weights_of(
        tmp_path, tree, weights=lambda t: (t["a"]["w"], {"n": t["n"]})
    )
    assert_same(got, (tree["a"]["w"], {"n": 300}))
    assert_same(flaxckpt.load(path), tree)


def test_computed_weights_are_not_in_a_whole_checkpoint(tmp_path):
    average = {"weights": lambda tree: {"w": tree["w"] / 2}}
    alone = saved(
        tmp_path / "alone", {"w": jnp.ones(2)}, save_weights_only=True, **average
    )
    assert_same(flaxckpt.load_weights(alone), {"w": jnp.full(2, 0.5)})
    path = saved(tmp_path / "whole", {"w": jnp.ones(2)}, **average)
    with pytest.raises(flaxckpt.CheckpointError) as caught:
        flaxckpt.load_weights(path)
    assert str(caught.value) == (
        f"Checkpoint {str(path)!r} does not hold its weights by themselves: `weights` "
        "computed them from the tree. Save with save_weights_only=True, or load the "
        "whole tree and compute them."
    )


@flax.struct.dataclass
class Custom:
    x: jax.Array
    y: dict
    name: str = flax.struct.field(pytree_node=False)


def test_custom_nodes_are_rebuilt_from_like(tmp_path):
    tree = {"c": Custom(jnp.ones(2), {"k": (1, None)}, "n"), "p": Pair(1, [2.0])}
    path = saved(tmp_path, tree)
    assert_same(flaxckpt.load(path, tree), tree)
    assert_same(
        flaxckpt.load(path),
        {
            "c": {"x": jnp.ones(2), "y": {"k": (1, None)}},
            "p": {"left": 1, "right": [2.0]},
        },
    )
