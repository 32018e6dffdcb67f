"""Loaded values are put onto shardings as `jax.device_put` puts them, only faster."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flaxckpt
from flaxckpt._trees.convert import put_on_shardings
from flaxckpt._trees.leaf import Leaf
from flaxckpt._trees.wanted import Wanted

DTYPES = [
    np.float32,
    np.int64,
    np.bool_,
    np.complex64,
    ml_dtypes.bfloat16,
    ml_dtypes.int4,
]
SHAPES = [(), (4,), (2, 4), (0, 4)]


def shardings():
    first, second, *_ = jax.devices()
    mesh = jax.make_mesh((2,), ("x",), devices=[first, second])
    alone = jax.make_mesh((1,), ("x",), devices=[second])
    single = jax.sharding.SingleDeviceSharding
    return [
        single(first),
        single(second),
        single(second, memory_kind="pinned_host"),
        jax.sharding.NamedSharding(mesh, jax.P()),
        jax.sharding.NamedSharding(alone, jax.P()),
    ]


def facts(array):
    return (
        array.aval, array.sharding, array.committed, array.weak_type, array.format,
        np.asarray(array).tobytes(),
    )  # fmt: skip


def values_of(kind, number):
    dtype, shape, _ = kind
    size = int(np.prod(shape))
    return (np.arange(size) * 5 + number * 3).astype(dtype).reshape(shape, order="F")


@given(
    few=st.lists(
        st.tuples(st.sampled_from(DTYPES), st.sampled_from(SHAPES), st.integers(0, 4)),
        min_size=1,
        max_size=3,
    ),
    which=st.lists(st.integers(0, 2), max_size=12),
    is_wide=st.booleans(),
    on_devices=st.integers(0, 3),
)
def test_leaves_are_as_device_put_makes_them(few, which, is_wide, on_devices):
    placed = shardings()
    kinds = [few[index % len(few)] for index in which]
    with jax.enable_x64(is_wide):
        values = [values_of(kind, number) for number, kind in enumerate(kinds)]
        for at in range(min(on_devices, len(values))):
            values[at] = jnp.asarray(values[at])
        want = {
            at: Wanted(Leaf((str(at),), "jax"), placed[where])
            for at, (_, _, where) in enumerate(kinds)
        }
        wanted = [
            jax.device_put(value, each.sharding)
            for value, each in zip(values, want.values(), strict=True)
        ]
        leaves = list(values)
        put_on_shardings(leaves, want)
        assert list(map(facts, leaves)) == list(map(facts, wanted))


def alike():
    place = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    want = {at: Wanted(Leaf((str(at),), "jax"), place) for at in range(5)}
    return [np.arange(4.0, dtype=np.float32) + at for at in want], want


def test_each_of_five_alike_keeps_its_own_values():
    leaves, want = alike()
    put_on_shardings(leaves, want)
    assert [array[0] for array in leaves] == [0, 1, 2, 3, 4]
    assert {array.sharding for array in leaves} == {want[0].sharding}


@pytest.mark.parametrize("trace", [jax.jit, jax.eval_shape])
def test_alike_arrays_within_a_trace(trace, tmp_path):
    tree = dict(zip("abcde", alike()[0], strict=True))
    with flaxckpt.ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        path = ckpt.save(jax.tree.map(jnp.asarray, tree), 0)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    struct = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=place)
    like = dict.fromkeys(tree, struct)

    def loaded():
        return jax.tree.map(lambda x: x + 1, flaxckpt.load(path, like))

    found = trace(loaded)() if trace is jax.jit else trace(loaded)
    assert {each.shape for each in found.values()} == {(4,)}
    if trace is jax.jit:
        assert [each[0] for each in found.values()] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("trace", [jax.jit, jax.eval_shape])
@pytest.mark.parametrize("like", ["nothing", "values", "structs", "placed structs"])
def test_keys_within_a_trace(trace, like, tmp_path):
    tree = {"w": jnp.ones(3), "key": jax.random.key(4), "n": 3}
    with flaxckpt.ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        path = ckpt.save(tree, 0)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    wanted = {
        "nothing": None,
        "values": tree,
        "structs": jax.eval_shape(lambda: tree) | {"n": 3},
        "placed structs": {
            **tree,
            "key": jax.ShapeDtypeStruct((), tree["key"].dtype, sharding=place),
        },
    }[like]

    def loaded():
        found = flaxckpt.load(path, wanted)
        return found["w"], jax.random.key_data(found["key"])

    found = jax.jit(loaded)() if trace is jax.jit else trace(loaded)
    assert [each.shape for each in found] == [(3,), (2,)]
    if trace is jax.jit:
        assert np.array_equal(found[1], jax.random.key_data(tree["key"]))


@pytest.mark.parametrize("sharding", [None, jax.sharding.SingleDeviceSharding])
def test_other_leaves_stay(sharding):
    place = sharding and sharding(jax.devices()[0])
    leaves = [np.zeros(3), np.zeros(3), "text"]
    want = {at: Wanted(Leaf((str(at),), "numpy"), place) for at in range(2)}
    found = list(leaves)
    put_on_shardings(found, want)
    assert all(map(lambda one, other: one is other, found, leaves))
