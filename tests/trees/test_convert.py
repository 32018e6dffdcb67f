"""Loaded values are put onto shardings as `jax.device_put` puts them, only faster."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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


@given(
    kinds=st.lists(
        st.tuples(st.sampled_from(DTYPES), st.sampled_from(SHAPES), st.integers(0, 4)),
        max_size=12,
    ),
    is_wide=st.booleans(),
    on_devices=st.integers(0, 3),
)
def test_leaves_are_as_device_put_makes_them(kinds, is_wide, on_devices):
    placed = shardings()
    with jax.enable_x64(is_wide):
        values = [
            np.full(shape, number % 2, dtype)
            for number, (dtype, shape, _) in enumerate(kinds)
        ]
        for at in range(min(on_devices, len(values))):
            values[at] = jnp.asarray(values[at])
        want = {
            at: Wanted(Leaf((str(at),), "jax"), placed[where])
            for at, (_, _, where) in enumerate(kinds)
        }
        wanted = [
            jax.device_put(v, w.sharding)
            for v, w in zip(values, want.values(), strict=True)
        ]
        leaves = list(values)
        put_on_shardings(leaves, want)
        assert list(map(facts, leaves)) == list(map(facts, wanted))


@pytest.mark.parametrize("sharding", [None, jax.sharding.SingleDeviceSharding])
def test_other_leaves_stay(sharding):
    place = sharding and sharding(jax.devices()[0])
    leaves = [np.zeros(3), np.zeros(3), "text"]
    want = {at: Wanted(Leaf((str(at),), "numpy"), place) for at in range(2)}
    found = list(leaves)
    put_on_shardings(found, want)
    assert all(map(lambda one, other: one is other, found, leaves))
