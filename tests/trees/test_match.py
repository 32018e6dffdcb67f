"""What is stored against `like`: what fits, what differs, and what an error advises."""

import enum
from collections import namedtuple
from dataclasses import replace

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from flaxckpt._trees.describe import describe
from flaxckpt._trees.layout import Layout
from flaxckpt._trees.leaf import Leaf
from flaxckpt._trees.match import Twin, match
from flaxckpt._trees.wanted import Wanted, completed, on_host, wanted_leaves
from flaxckpt.errors import CheckpointMismatchError, UnsupportedLeafError

# Of what an error advises; which is whole in checkpoints/test_store.py.
LEAVES, SHAPES, CAST = (
    "exactly the stored leaves",
    "nothing is reshaped",
    "or cast=True",
)
F4, F2, STRUCT = np.ones(2, "f4"), np.ones(2, "f2"), jax.ShapeDtypeStruct((2,), "f4")


def layout_of(tree):
    return describe(tree, lambda dtype: True)[0]


def matched(tree, like, *, cast=False):
    layout = tree if isinstance(tree, Layout) else layout_of(tree)
    found = match("run/1", layout, like, cast=cast)
    assert (found.kept, found.unused) == ([], [])
    return found.plan, found.twins


def indices(tree, like):
    return [index for index, _ in matched(tree, like)[0]]


def refusal(tree, like, *, cast=False):
    with pytest.raises(CheckpointMismatchError) as caught:
        matched(tree, like, cast=cast)
    return caught.value


def rows():
    return NamedSharding(jax.make_mesh((8,), ("x",)), P("x"))


def of_each_kind():
    return {"f4": jnp.float32(1), "i4": np.array(1, "i4"), "b1": np.bool_(True),
            "c8": jnp.complex64(1), "bool": True, "int": 1, "float": 1.0, "complex": 1j,
            "str": "x", "bytes": b"x", "key": jax.random.key(0), "f4[1]": F4[:1]}  # fmt: skip


# A row for what is stored, a column for what is wanted: = fits, c fits with a cast.
KINDS = """
          f4 i4 b1 c8 bool int float complex str bytes key f4[1]
f4        =  c  c  c  c    c   =     c       .   .     .   .
i4        c  =  c  c  c    =   c     c       .   .     .   .
b1        c  c  =  c  =    c   c     c       .   .     .   .
c8        .  .  .  =  .    .   .     =       .   .     .   .
bool      c  c  =  c  =    c   c     c       .   .     .   .
int       c  =  c  c  c    =   c     c       .   .     .   .
float     =  c  c  c  c    c   =     c       .   .     .   .
complex   .  .  .  =  .    .   .     =       .   .     .   .
str       .  .  .  .  .    .   .     .       =   .     .   .
bytes     .  .  .  .  .    .   .     .       .   =     .   .
key       .  .  .  .  .    .   .     .       .   .     =   .
f4[1]     .  .  .  .  .    .   .     .       .   .     .   =
"""
HEAD, *LINES = [line.split() for line in KINDS.strip().splitlines()]
CELLS = [(stored, *c) for stored, *line in LINES for c in zip(HEAD, line, strict=True)]


@pytest.mark.parametrize(("stored", "wanted", "sign"), CELLS)
def test_each_kind_fits_these_kinds(stored, wanted, sign):
    tree, like = ({"x": of_each_kind()[kind]} for kind in (stored, wanted))
    (have,), (want,) = layout_of(tree).leaves, wanted_leaves(like)
    for cast in (False, True):
        if sign == "=" or (sign == "c" and cast):
            assert matched(tree, like, cast=cast) == ([(0, want)], [])
        else:
            error = refusal(tree, like, cast=cast)
            assert error.differences == (("x", str(have), str(want.leaf)),)
            assert (CAST in error.advice) == (
                sign == "c"
            )  # and then it would be enough


shapes = st.lists(st.integers(0, 2), max_size=2).map(tuple)
dtypes = st.sampled_from(list(map(jnp.dtype, ("float32", "bfloat16", "int8", "bool"))))


@given(*2 * [st.tuples(shapes, dtypes)], st.booleans())
def test_arrays_fit_by_shape_and_where_nothing_is_cast_by_dtype(stored, wanted, cast):
    have, like = np.ones(*stored), jax.ShapeDtypeStruct(*wanted)
    if stored[0] == wanted[0] and (stored[1] == wanted[1] or cast):
        (((_, want),), _) = matched(have, like, cast=cast)
        assert want.leaf == Leaf((), "jax", str(wanted[1]), wanted[0])
    else:
        (difference,) = refusal(have, like, cast=cast).differences
        assert difference.path == "(the tree itself)"


@pytest.mark.parametrize("cast", [False, True])
def test_keys_fit_in_their_shape_and_implementation_alone(cast):
    keys = jax.random.split(jax.random.key(0), 2)
    matched(keys, jax.eval_shape(lambda: keys[::-1]), cast=cast)
    for like in (keys[:1], jax.random.split(jax.random.key(0, impl="rbg"), 2)):
        assert SHAPES in refusal(keys, like, cast=cast).advice


Level, Name = enum.IntEnum("Level", "LOW HIGH"), enum.StrEnum("Name", "A")


def test_types_of_one_s_own_and_weak_dtypes_are_noted():
    wanted = wanted_leaves([Level.LOW, Name.A, 1, True, "x", np.float64(1)])
    assert [want.type for want in wanted] == [Level, Name, None, None, None, None]
    like = [jax.eval_shape(lambda: 1.0), jnp.float32(1), jax.random.key(0), 1.0]
    assert [want.is_weak for want in wanted_leaves(like)] == [True, False, False, False]


def test_only_what_the_caller_has_placed_is_wanted_at_a_place():
    there = SingleDeviceSharding(jax.devices()[3])
    struct = jax.ShapeDtypeStruct((8,), "f4", sharding=rows())
    wanted = wanted_leaves([jnp.ones(2), jax.device_put(F4, there), F4, struct])
    assert [want.sharding for want in wanted] == [None, there, None, rows()]
    assert [want.is_in_one_piece for want in wanted] == [True, True, True, False]


# In this process JAX has no 64 bits: such an array stays on the host.
AT_A_PLACE = {"f4": "jax", "f4[1]": "jax", "b1": "jax", "key": "key", "int": None,
              "str": None, "bytes": None, "f8": None}  # fmt: skip


@pytest.mark.parametrize("name", AT_A_PLACE)
def test_a_sharding_places_what_jax_has_and_leaves_the_rest_as_stored(name):
    tree = {"f8": np.ones(8), **of_each_kind()}[name]
    (have,), kind = layout_of(tree).leaves, AT_A_PLACE[name]
    place = SingleDeviceSharding(jax.devices()[1])
    want = Wanted(replace(have, kind=kind), place) if kind else Wanted(have)
    assert matched(tree, place) == ([(0, want)], [])


@pytest.mark.parametrize("shape", [(8,), (16, 3), (0,), (9,), (3, 8), ()])
def test_what_shards_do_not_divide_is_a_difference(shape):
    stored = np.ones(shape, "f4")
    if shape and shape[0] % 8 == 0:
        assert indices(stored, rows()) == [0]
    else:
        ((_, have, wanted),) = refusal(stored, rows()).differences
        assert wanted.startswith(f"{have} in shards of NamedSharding(")


@given(*2 * [st.dictionaries(st.sampled_from("abc"), st.sets(st.sampled_from("xyz")))])
def test_what_only_one_of_the_two_has_is_named(stored, wanted):
    trees = [{n: dict.fromkeys(b, 1) for n, b in t.items()} for t in (stored, wanted)]
    have, want = ([leaf.name for leaf in layout_of(tree).leaves] for tree in trees)
    if set(have) == set(want):
        assert indices(*trees) == list(range(len(have)))
        return
    error = refusal(*trees)
    missing = [(name, "nothing", "int") for name in want if name not in have]
    surplus = [(name, "int", "nothing") for name in have if name not in want]
    assert list(error.differences) == missing + surplus
    assert LEAVES in error.advice


Other = namedtuple("Other", "b a")


def test_leaves_go_by_their_paths_and_not_by_their_order():
    assert indices({"a": 1, "b": 2}, Other(0, 0)) == [1, 0]
    assert indices(Other(2, 1), {"b": 0, "a": 0}) == [1, 0]
    assert indices({9: 1, 10: 2}, {"9": 0, "10": 0}) == [1, 0]  # JAX sorts text
    assert indices((1, ["x"]), [0, ("",)]) == [0, 1]


def test_the_advice_is_about_what_differs():
    for stored, like, advice in (
        ([F4], [F2], CAST),
        ([np.float32(1)], [np.int32(1)], CAST),
        ([F4, F4], [F2, F4[:1]], SHAPES),
        ([1], ["x"], SHAPES),
        ([1, F4], [1.5, F2], CAST),
        ([1, F4], [1.5, F4[:1]], SHAPES),
        ([np.ones(9, "f4")], [rows()], "divide the shapes"),
        ([F4, F4], [F2], LEAVES),
        ([], [F4], LEAVES),
    ):
        assert advice in refusal(stored, like).advice


def test_without_like_all_is_wanted_as_it_is_stored():
    layout = layout_of({"a": F4, "b": [1, jnp.ones(2)], "f": len})
    wanted = zip([0, 1, 2, None], map(Wanted, layout.leaves), strict=True)
    assert matched(layout, None) == (list(wanted), [])
    on_hosts = [on_host(leaf).leaf.kind for leaf in layout.leaves]
    assert on_hosts == ["numpy", "int", "numpy", "function"]
    wide = Layout(0, (Leaf((), "jax", "float64", (2,)),))
    assert "jax.enable_x64" in refusal(wide, None).advice
    assert matched(wide, None, cast=True)[0][0][1].leaf.dtype == "float32"


def test_a_function_is_nothing_to_load_and_stands_for_no_value():
    f = {"f": len}
    for stored, like in ((f, {"f": max}), ({}, f), (f, {}), (f, {"f": STRUCT})):
        assert indices(stored, like) == [None] * len(like)
    error = refusal({"f": len, "n": 1}, {"f": F4, "n": 0})
    assert error.differences == (("f", "function", "float32[2]"),)
    with pytest.raises(UnsupportedLeafError) as caught:
        matched({"a": 1, "b": F4, "c": 1}, {"a": len, "b": len, "c": "no number"})
    assert [name for name, _ in caught.value.leaves] == ["a", "b"]


def test_all_leaves_that_nothing_can_be_restored_as_are_named():
    with pytest.raises(UnsupportedLeafError) as caught:
        wanted_leaves({"a": object(), "b": 1, "c": [P("x"), frozenset()]})
    assert [name for name, _ in caught.value.leaves] == ["a", "c/0", "c/1"]
    with pytest.raises(UnsupportedLeafError, match="x: a value of a running trace"):
        jax.eval_shape(lambda x: wanted_leaves({"x": x}), 1.0)


def variables(*values):
    return [nnx.Param(jnp.asarray(value)) for value in values]


def test_what_is_stored_twice_and_wanted_once_has_to_be_equal():
    layout = layout_of(variables(1.0, 1.0))
    for digests, twins in (("ab", [Twin(0, 1)]), ("aa", []), (("", ""), [Twin(0, 1)])):
        leaves = map(lambda e, d: replace(e, digest=d), layout.leaves, digests)
        found = matched(Layout(layout.skeleton, tuple(leaves)), 2 * variables(0.0))
        assert ([index for index, _ in found[0]], found[1]) == ([0], twins)
    error = refusal(variables(1.0, [1.0]), 2 * variables(0.0))
    stored = "float32[], and other values as 1/value"
    assert error.differences == (("0/value", stored, "one shared by both"),)


def test_a_variable_goes_to_each_place_and_stands_for_a_plain_value():
    assert indices(2 * variables(0.0), variables(0.0, 0.0)) == [0, 0]
    assert indices(variables(1.0), [jnp.float32(0)]) == [0]
    assert indices([jnp.float32(0)], variables(1.0)) == [0]


def test_a_sharding_of_a_subtree_is_spread_over_its_leaves():
    layout, x = layout_of({"a": [1, (2, 3)], "b": 4}), rows()
    assert completed(x, layout) == {"a": [x, (x, x)], "b": x}
    assert completed({"a": [0, x], "b": 0}, layout) == {"a": [0, (x, x)], "b": 0}
    assert completed({"b": x, "new": x}, layout) == {"b": x, "new": x}
