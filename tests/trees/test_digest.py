"""Digests: the same for any sharding, another for any change."""

import itertools
import math

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flaxckpt._trees import digest as _digest
from flaxckpt._trees.digest import Digest, as_digest, checksum, combined, digest
from flaxckpt._trees.owned_shards import pieces

DTYPES = ["u1", "i2", "f2", "f4", "i8", "f8", "c8", "c16", "?", jnp.bfloat16, jnp.int4]
arrays = hnp.arrays(
    st.sampled_from(["u1", "i2", "f2", "f4", "i8", "f8", "c8", "c16", "?"]),
    hnp.array_shapes(min_dims=0, max_dims=4, max_side=9),
)


def coefficient(axis, index):
    """A coefficient by its definition, in Python's integers."""

    def mixed(x):
        x = (x + 1) * 0x9E3779B97F4A7C15 % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    high, low = divmod(index, 1 << 16)
    return (mixed(low + (axis << 40)) | 1) * (
        mixed(high + (axis << 40) + (1 << 60)) | 1
    )


def by_definition(array):
    array = array.reshape(array.shape or 1)
    size = array.dtype.itemsize
    rows = {}
    for index in np.ndindex(array.shape):
        rows.setdefault(index[:-1], []).append(array[index].tobytes())
    words = {}
    for index, elements in rows.items():
        row = b"".join(elements)
        for number, at in enumerate(range(0, len(row), 8)):
            words[*index, number] = int.from_bytes(row[at : at + 8], "little")
    total = 0
    for index, word in words.items():
        word = word ^ (word >> 32) if size >= 8 else word + (word >> 32)
        for axis, i in enumerate(index):
            word *= coefficient(axis, i)
        total += word
    return total % 2**64


@given(arrays)
def test_the_definition(array):
    assert digest(array) == f"sum:{by_definition(array):016x}"


@given(arrays, st.data())
@settings(max_examples=200)
def test_pieces_add_up(array, data):
    """However the array is cut, along every axis."""
    pieces = [((), array)]
    for axis in range(array.ndim):
        size = array.shape[axis]
        cuts = sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=3))})
        parts = [slice(*pair) for pair in itertools.pairwise(cuts)] or [slice(0)]
        pieces = [
            ((*starts, part.start or 0), piece[(slice(None),) * axis + (part,)])
            for starts, piece in pieces
            for part in parts
        ]
    assert f"sum:{combined(pieces):016x}" == digest(array)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_bit_and_any_exchange_shows(dtype):
    """In arrays where many values are alike, the hardest case."""
    for shape in [(3000,), (50, 60), (70_000, 2)]:
        for value in (0, 1):
            array = np.full(shape, value, dtype)
            whole = digest(array)
            random = np.random.default_rng(0)
            for _ in range(60):
                changed = array.copy()
                data = changed.reshape(-1).view(np.uint8)
                bit = 0 if array.dtype in (np.bool_, jnp.int4) else random.integers(8)
                data[random.integers(data.size)] ^= np.uint8(1 << bit)
                assert digest(changed) != whole
            if value:  # a page of zeros
                for start in range(0, array.size, 1024):
                    changed = array.copy()
                    changed.reshape(-1)[start : start + 1024] = 0
                    assert digest(changed) != whole
        mixed = np.arange(np.prod(shape)).reshape(shape) % 2
        mixed = mixed.astype(dtype)
        flipped = np.roll(mixed.reshape(-1), 1).reshape(shape)
        assert digest(mixed) != digest(flipped)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_on_any_mesh(dtype):
    array = np.arange(64 * 48).reshape(64, 48).astype(dtype)
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    with jax.enable_x64(True):
        for spec in [P(), P("x"), P("y", "x"), P(None, ("x", "y")), P(("x", "y"))]:
            placed = jax.device_put(array, NamedSharding(mesh, spec))
            assert digest(placed) == digest(array)


def test_keys_and_scalars():
    keys = jax.random.split(jax.random.key(0), 8)
    mesh = jax.make_mesh((8,), ("x",))
    placed = jax.device_put(keys, NamedSharding(mesh, P("x")))
    assert digest(keys) == digest(placed) == digest(jax.random.key_data(keys))
    assert digest(3) == digest(np.int64(3)) != digest(4)
    assert digest("ab") == digest(b"ab") != digest("ba")
    assert digest(-0.0) != digest(0.0)
    assert digest(np.zeros((3, 0))) == f"sum:{0:016x}"
    assert _digest.digests([3, "a"]) == [digest(3), digest("a")]
    recorded = [digest(3), digest("b")]
    assert _digest.agree([3, "a"], recorded) == [True, False]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((), "float32"),
        ((5,), "int8"),
        ((300_001,), "float32"),  # cut in the middle of a word
        ((1_000_000,), "int16"),
        ((700, 1024), "float32"),
        ((3, 200_000), "float64"),  # rows longer than a block
        ((400, 2, 1000), "bfloat16"),
        ((50_000, 3), "float32"),  # rows that are short
    ],
)
@pytest.mark.parametrize("start", [0, 8, 65_537, 65_536 * 8 - 16])
def test_blocks_are_the_memory_in_order(shape, dtype, start):
    """What is digested block by block may be written as it comes."""
    random = np.random.default_rng(0)
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    values = np.frombuffer(random.bytes(size), jnp.dtype(dtype)).reshape(shape)
    starts = [0] * len(shape)
    if starts:
        starts[-1] = start
    digested = Digest()
    blocks = [block.tobytes() for block in digested.blocks(values, starts)]
    assert b"".join(blocks) == values.tobytes()
    assert digested.text == f"sum:{combined([(tuple(starts), values)]):016x}"
    if start == 0:
        assert digested.text == digest(values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_checksum_of_the_whole_is_that_of_its_elements_in_order(dtype):
    array = np.arange(64 * 48).reshape(64, 48).astype(dtype)
    expected = xxhash.xxh3_64_hexdigest(array.tobytes())
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    with jax.enable_x64(True):
        placed = jax.device_put(array, NamedSharding(mesh, P("y", "x")))
        for value in (array, np.asfortranarray(array), placed):
            assert checksum(value) == expected
            assert _digest.agrees(value, f"xxh3:{expected}")
    assert checksum(array[:, ::2]) == xxhash.xxh3_64_hexdigest(array[:, ::2].tobytes())


def test_a_checksum_is_of_a_leaf_of_any_kind_and_of_nothing_else():
    keys = jax.random.split(jax.random.key(0), 8)
    leaves = [keys, 3, 0.5, True, 2j, b"ab", np.float32(1), np.zeros((3, 0))]
    marks = [as_digest(checksum(leaf)) for leaf in leaves]
    assert len(set(marks)) == len(leaves)
    assert checksum(keys) == checksum(jax.random.key_data(keys))
    for leaf in leaves:
        own = as_digest(checksum(leaf))
        assert [_digest.agrees(leaf, mark) for mark in marks] == [
            mark == own for mark in marks
        ]


def test_no_sum_of_parts_is_a_checksum_of_the_whole():
    """What cannot be told of parts is never taken for what was saved."""
    zeros = np.zeros(8)
    for value, found in (
        (zeros, as_digest(checksum(zeros))),
        (zeros, f"xxh3:{0:016x}"),
    ):
        assert not _digest.is_sum(combined(pieces(value)), found)
