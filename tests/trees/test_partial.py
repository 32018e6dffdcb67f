"""Partial loading: what is loaded, kept and passed over, by rule and by example."""

import shutil
import sys
import tempfile
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from saved_trees import assert_same

import flaxckpt
from flaxckpt import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    LoadReport,
    ModelCheckpoint,
    SettingError,
)
from flaxckpt._trees.layout import OverfullError
from flaxckpt._trees.selection import repeated
from flaxckpt._trees.skeleton import indices_in

NAMES = st.sampled_from(["a", "b", "c", "layer_0", "layer_1", "x y", "7"])
SHAPES = st.sampled_from([(), (8,), (8, 3), (16, 2), (0, 4)])
DTYPES = st.sampled_from([jnp.float32, jnp.int32, jnp.bfloat16])


@st.composite
def leaves(draw):
    shape, dtype = draw(SHAPES), draw(DTYPES)
    values = np.arange(int(np.prod(shape))) + draw(st.integers(1, 9))
    return values.reshape(shape).astype(dtype)


TREES = st.recursive(
    leaves(),
    lambda inner: (
        st.dictionaries(NAMES, inner, min_size=1, max_size=4)
        | st.lists(inner, min_size=1, max_size=3)
        | st.lists(inner, min_size=1, max_size=3).map(tuple)
    ),
    max_leaves=12,
).filter(lambda tree: isinstance(tree, dict))


def by_path(tree):
    """The leaves by the names that a report gives them."""
    return {
        "/".join(str(getattr(k, "key", getattr(k, "idx", ""))) for k in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@st.composite
def changed(draw, tree):
    """Change a tree at random: drop, add, reshape, wrap and replace parts of it."""
    how = draw(st.sampled_from(["same"] * 5 + ["drop", "shape", "wrap", "leaf"]))
    if how == "wrap":
        return {"inside": tree}
    if how == "leaf":
        return draw(leaves())
    if isinstance(tree, dict):
        new = {}
        for name, child in tree.items():
            if draw(st.integers(0, 5)):
                new[name] = draw(changed(child))
        if not draw(st.integers(0, 2)):
            new["new"] = draw(leaves())
        return new
    if isinstance(tree, list | tuple):
        return type(tree)(draw(changed(child)) for child in tree)
    if how == "shape":
        return np.full((*tree.shape, 2), 7, tree.dtype)
    return tree


def sharded(tree, draw):
    """Put the leaves on 8 devices, each on a sharding that divides it."""
    mesh = jax.make_mesh((8,), ("x",))

    def put(leaf):
        specs = [PartitionSpec()]
        if leaf.ndim and leaf.shape[0] % 8 == 0:
            specs.append(PartitionSpec("x"))
        return jax.device_put(-leaf, NamedSharding(mesh, draw(st.sampled_from(specs))))

    return jax.tree.map(put, tree)


@settings(max_examples=60)
@given(st.data())
def test_what_is_loaded_kept_and_passed_over(data):
    tree = data.draw(TREES)
    like = data.draw(changed(tree).filter(lambda like: isinstance(like, dict)))
    like = sharded(like, data.draw)
    with tempfile.TemporaryDirectory() as directory:
        with ModelCheckpoint(f"{directory}/x") as ckpt:
            path = ckpt.save(jax.tree.map(jnp.asarray, tree), epoch=0)
        stored, wanted = by_path(tree), by_path(like)
        fitting = {
            name
            for name in stored.keys() & wanted.keys()
            if stored[name].shape == wanted[name].shape
        }
        casts = {n for n in fitting if stored[n].dtype != wanted[n].dtype}
        if (wanted and not fitting) or casts:
            with pytest.raises(CheckpointMismatchError):
                flaxckpt.load(path, like, partial=True)
            return
        found = flaxckpt.load(path, like, partial=True, with_info=True)
    report, got = found.report, by_path(found.tree)
    kept = {name for name, *_ in report.kept}
    assert len(kept) == len(report.kept)
    assert set(report.loaded) == fitting
    assert set(report.loaded) | kept == wanted.keys()
    assert not set(report.loaded) & kept
    assert set(report.loaded) | set(report.passed_over) == stored.keys()
    assert not set(report.loaded) & set(report.passed_over)
    assert jax.tree.structure(found.tree) == jax.tree.structure(like)
    for name, leaf in got.items():
        if name in kept:
            assert leaf is wanted[name]
        else:
            np.testing.assert_array_equal(leaf, stored[name])
            assert leaf.sharding == wanted[name].sharding


@settings(max_examples=60)
@given(st.data())
def test_a_selected_and_renamed_tree_is_that_part_of_the_whole(data):
    tree = jax.tree.map(jnp.asarray, data.draw(TREES))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    chosen = data.draw(st.sampled_from(paths))
    depth = data.draw(st.integers(1, len(chosen)))
    names = tuple(str(getattr(k, "key", getattr(k, "idx", ""))) for k in chosen[:depth])
    part = tree
    for entry in chosen[:depth]:
        part = part[getattr(entry, "key", getattr(entry, "idx", None))]
    with tempfile.TemporaryDirectory() as directory:
        with ModelCheckpoint(f"{directory}/x") as ckpt:
            path = ckpt.save(tree, epoch=0)
        assert_same(flaxckpt.load(path, select=names), part)
        assert_same(flaxckpt.load(path, part, select=names), part)
        moved = flaxckpt.load(path, {"q": {"r": tree}}, rename={"": "q/r"})
        assert_same(moved, {"q": {"r": tree}})
        back = flaxckpt.load(path, tree, rename=lambda name: name)
        assert_same(back, tree)
        below = flaxckpt.load(path, part, select=lambda p, _: p[:depth] == names,
                              rename={"/".join(names): ""})  # fmt: skip
        assert_same(below, part)


TREE = {
    "params": {
        "encoder": {"w": jnp.arange(12.0).reshape(3, 4), "b": jnp.ones(4)},
        "head": jnp.ones((3, 10)),
    },
    "opt_state": (jnp.zeros(3), {"mu": jnp.ones(2)}),
    "step": 3,
}


@pytest.fixture
def path(tmp_path):
    with ModelCheckpoint(tmp_path / "x") as ckpt:
        return ckpt.save(TREE, epoch=0)


def test_a_new_head_and_an_extra_layer_are_one_call_and_one_line(path):
    fresh = {
        "encoder": {"w": jnp.zeros((3, 4)), "b": jnp.zeros(4)},
        "head": jnp.zeros((3, 5)),
        "extra": jnp.zeros(2),
    }
    with pytest.warns(UserWarning, match="Checkpoint") as told:
        tree = flaxckpt.load(path, {"params": fresh}, partial=True)["params"]
    assert_same(tree["encoder"], TREE["params"]["encoder"])
    assert tree["head"] is fresh["head"]
    assert tree["extra"] is fresh["extra"]
    (line,) = [str(each.message) for each in told]
    assert line.count("\n") == 0
    assert "loaded 2 of 4 leaves" in line
    assert "params/head (stored float32[3,10], wanted float32[3,5])" in line
    assert "params/extra (stored nothing, wanted float32[2])" in line
    assert "passed over: opt_state/0, opt_state/1/mu, params/head, step" in line


def test_a_whole_load_says_nothing(path):
    with warnings.catch_warnings(action="error"):
        tree = flaxckpt.load(path, TREE, partial=True)
        report = flaxckpt.load(path, TREE, with_info=True).report
    assert_same(tree, TREE)
    assert str(report) == "loaded 6 of 6 leaves"
    assert report == LoadReport(loaded=report.loaded)


def test_nothing_is_read_that_is_not_wanted(tmp_path):
    tree = {"a": jnp.ones(2**19), "b": {"c": jnp.ones(2**19)}}
    with ModelCheckpoint(tmp_path / "x") as ckpt:
        path = ckpt.save(tree, epoch=0)
    shutil.rmtree(path / "state/b.c")
    assert_same(flaxckpt.load(path, select="a"), tree["a"])
    assert flaxckpt.load(path, {"a": tree["a"]}, partial=True, with_info=True).tree
    with pytest.raises(CheckpointCorruptError):
        flaxckpt.load(path)


def test_weights_of_another_optimizer_s_run(tmp_path):
    with ModelCheckpoint(tmp_path / "x") as ckpt:
        path = ckpt.save(TREE, epoch=0)
    fresh = {**TREE, "opt_state": {"other": jnp.zeros(7)}}
    assert_same(flaxckpt.load_weights(path, fresh), {"params": TREE["params"]})


class Model(nnx.Module):
    def __init__(self, seed, width=4):
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Embed(5, 3, rngs=rngs)
        self.head = nnx.Linear(3, width, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.tied = self.embed


def bits(module):
    return [
        np.asarray(x)
        for x in jax.tree.leaves(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    ]


def test_into_a_module_in_place(tmp_path):
    saved = Model(0)
    with ModelCheckpoint(tmp_path / "x") as ckpt:
        path = ckpt.save({"model": saved, "step": 3}, epoch=0)
    fresh = Model(1)
    key = fresh.dropout.rngs.key.get_value()
    with pytest.raises(CheckpointMismatchError, match="below 'model'"):
        flaxckpt.load_weights(path, into=fresh)
    assert flaxckpt.load_weights(path, into=fresh, select="model") is fresh
    np.testing.assert_equal(bits(fresh), bits(saved))
    assert fresh.tied is fresh.embed
    assert fresh.dropout.rngs.key.get_value() == key
    wide = Model(2, width=6)
    before = bits(wide)
    with pytest.warns(UserWarning, match="kept from like: head/bias"):
        flaxckpt.load_weights(path, into=wide, select="model", partial=True)
    np.testing.assert_equal(bits(wide)[0], bits(saved)[0])
    np.testing.assert_equal(bits(wide)[1:], before[1:])
    with pytest.raises(SettingError, match="no Flax NNX module"):
        flaxckpt.load_weights(path, into={"w": 1})
    with pytest.raises(SettingError, match="either"):
        flaxckpt.load_weights(path, fresh, into=fresh)


def test_restore_into_objects(tmp_path):
    import optax

    def made(seed):
        model = Model(seed)
        return model, nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    model, optimizer = made(0)
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        assert ckpt.restore_into(model, optimizer) is None
        ckpt.save((model, optimizer), epoch=0)
        fresh, its = made(1)
        found = ckpt.restore_into(fresh, its)
        assert found.tree[0] is fresh
        assert found.tree[1] is its
        assert found.epoch == 0
        with pytest.raises(SettingError, match="pass what was saved"):
            ckpt.restore_into()
    np.testing.assert_equal(bits(fresh), bits(model))
    assert_same(
        nnx.to_pure_dict(nnx.state(its)), nnx.to_pure_dict(nnx.state(optimizer))
    )


def test_restore_of_a_part(path):
    with ModelCheckpoint(path) as ckpt:
        with pytest.warns(UserWarning, match="passed over: b"):
            found = ckpt.restore({"w": jnp.zeros((3, 4))}, partial=True,
                             select="params/encoder")  # fmt: skip
        assert found.report.loaded == ("w",)
        assert found.report.passed_over == ("b",)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"select": "params/encodr"}, "'params' has encoder, head"),
        ({"select": "step/x"}, "'step' is a leaf"),
        ({"select": lambda path, leaf: False}, "holds for no leaf; there are opt_sta"),
        ({"rename": {"param": "x"}}, "nothing is stored below 'param'"),
        ({"rename": {"params/head": "step"}}, "two leaves would be at 'step'"),
        ({"rename": {"params/head": "step/x"}}, "two leaves would be at"),
        ({"rename": lambda name: 3}, "which is no text"),
        ({"select": 3}, "a path, or a function"),
        ({"rename": "params"}, "a mapping"),
        ({"rename": {"params": 3}}, "a mapping"),
    ],
)
def test_what_is_not_there_is_named(path, call, message):
    with pytest.raises(SettingError, match=message):
        flaxckpt.load(path, **call)


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (TREE["params"], "stored below 'params': pass select='params'"),
        ({"m": TREE}, "below 'm': pass that part"),
        ({"w": TREE["params"]["encoder"]["w"], "b": TREE["params"]["encoder"]["b"]},
         "select='params/encoder'"),
        ({"other": jnp.ones(2)}, "partial=True"),
    ],
)  # fmt: skip
def test_a_prefix_that_explains_all_is_said(path, like, message):
    with pytest.raises(CheckpointMismatchError, match=message):
        flaxckpt.load(path, like)


def test_a_like_without_values_cannot_keep_any(path):
    like = {"params": {"head": TREE["params"]["head"]},
            "new": jax.ShapeDtypeStruct((2,), jnp.float32)}  # fmt: skip
    with pytest.raises(CheckpointMismatchError, match="new: checkpoint has nothing"):
        flaxckpt.load(path, like, partial=True)


def test_another_dtype_is_cast_or_an_error_and_never_kept(path):
    like = {"params": {"head": jnp.zeros((3, 10), jnp.bfloat16)}}
    with pytest.raises(CheckpointMismatchError, match="cast=True"):
        flaxckpt.load(path, like, partial=True)
    with pytest.warns(UserWarning, match="passed over"):
        tree = flaxckpt.load(path, like, partial=True, cast=True)
    assert tree["params"]["head"].dtype == jnp.bfloat16


def test_functions_and_none_in_a_partial_like(path):
    like = {"params": None, "apply": jnp.tanh, "step": 0}
    with pytest.warns(UserWarning, match="passed over"):
        tree = flaxckpt.load(path, like, partial=True)
    assert_same(tree["params"], TREE["params"])
    assert tree["apply"] is jnp.tanh
    assert tree["step"] == 3


def test_a_shared_part_is_selected_with_its_values(tmp_path):
    model = Model(0)
    with ModelCheckpoint(tmp_path / "x") as ckpt:
        path = ckpt.save({"model": model}, epoch=0)
    for name in ("embed", "tied"):
        part = flaxckpt.load(path, select=f"model/{name}")
        np.testing.assert_array_equal(
            part["embedding"], model.embed.embedding.get_value()
        )
    renamed = flaxckpt.load(path, rename={"model": "net"}, with_info=True)
    assert set(renamed.tree) == {"net"}
    fresh = Model(1)
    found = flaxckpt.load(path, {"net": fresh}, rename={"model": "net"})
    np.testing.assert_equal(bits(found["net"]), bits(model))
    assert found["net"].tied is found["net"].embed


def test_plain_orbax_s_checkpoints_load_in_part(tmp_path):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "x", TREE)
    part = flaxckpt.load(tmp_path / "x", select="params/encoder")
    assert_same(part, TREE["params"]["encoder"])
    like = {"net": {"w": jnp.zeros((3, 4)), "new": jnp.ones(1)}}
    found = flaxckpt.load(tmp_path / "x", like, partial=True,
                          rename={"params/encoder": "net"}, with_info=True)  # fmt: skip
    assert found.report.loaded == ("net/w",)


def test_what_is_stored_beyond_the_known_weights_is_not_cut_off_like(tmp_path):
    tree = {"params": {"w": jnp.ones(2)}, "metrics": {"m": jnp.ones(2)},
            "opt_state": jnp.ones(2)}  # fmt: skip
    weights = lambda tree: {name: tree[name] for name in ("params", "metrics")}  # noqa: E731
    with ModelCheckpoint(tmp_path / "x", weights=weights) as ckpt:
        path = ckpt.save(tree, epoch=0)
    like = jax.tree.map(jnp.zeros_like, weights(tree))
    for partial in (False, True):
        assert_same(flaxckpt.load_weights(path, like, partial=partial), weights(tree))
    params = flaxckpt.load_weights(path, like["params"], select="params")
    assert_same(params, tree["params"])


def test_a_part_that_many_places_share_is_no_damage(tmp_path):
    class Block(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.zeros(2**21))

    class Many(nnx.Module):
        def __init__(self):
            self.blocks = nnx.List([Block()] * 60)
            self.head = nnx.Param(jnp.zeros(2))

    with ModelCheckpoint(tmp_path / "x") as ckpt:
        path = ckpt.save(Many(), epoch=0)
    with pytest.warns(UserWarning, match="kept from like: head/value"):
        flaxckpt.load(path, Many(), partial=True, rename={"head": "new"})


def test_parts_that_double_at_each_level_are_too_many():
    levels = [["0", {"dict": [["x", 0]]}]]
    for above in range(19):
        both = [["a", {"same": [above]}], ["b", {"same": [above]}]]
        levels.append([str(above + 1), {"dict": both}])
    few, many = {"dict": levels[:3]}, {"dict": levels}
    assert len(list(indices_in(repeated(few, few, ())))) == 1 + 2 + 4
    with pytest.raises(OverfullError, match="in too many places"):
        repeated(many, many, ())


KINDS = {
    "params": {"w": jnp.ones(1)},
    "list": [1, None, 3],
    "tuple": (1, ()),
    "empty": {},
    "none": None,
    "numbers": {0: 1, 1: 2, 10: 3},
}


@pytest.mark.parametrize(
    "rename", [{"params": "p"}, lambda name: name.replace("params", "p")]
)
def test_what_does_not_move_stays_as_it_is(tmp_path, rename):
    with ModelCheckpoint(tmp_path / "x") as ckpt:
        path = ckpt.save(KINDS, epoch=0)
    moved = flaxckpt.load(path, rename=rename)
    assert_same(moved.pop("p"), KINDS["params"])
    assert moved == {name: KINDS[name] for name in KINDS if name != "params"}
    inside = flaxckpt.load(path, rename={"list": "a/list", "numbers/1": "numbers/x"})
    assert inside["a"] == {"list": [1, None, 3]}
    assert inside["numbers"] == {"0": 1, "10": 3, "x": 2}
    below = flaxckpt.load(path, rename={"": "all"})["all"]
    assert_same(below.pop("params"), KINDS["params"])
    assert below == {name: KINDS[name] for name in KINDS if name != "params"}


def test_a_variable_is_renamed_with_or_without_its_value(tmp_path):
    with ModelCheckpoint(tmp_path / "x") as ckpt:
        path = ckpt.save(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), epoch=0)
    for old, new in (("kernel", "w"), ("kernel/value", "w/value")):
        assert set(flaxckpt.load(path, rename={old: new})) == {"w", "bias"}
    with pytest.raises(SettingError, match="there are bias, kernel"):
        flaxckpt.load(path, select=lambda path, leaf: path == ("kernel", "value"))
    fresh = nnx.Linear(2, 3, rngs=nnx.Rngs(1))
    assert isinstance(flaxckpt.load_weights(path, like=fresh), nnx.State)


def test_prefixes_are_told_apart(path):
    rename = {"params/encoder": "q", "params/head": "h", "params": "p"}
    with pytest.raises(SettingError, match="below 'params' moves by longer prefixes"):
        flaxckpt.load(path, rename=rename)


def test_a_mistake_in_a_large_tree_is_told_at_once(tmp_path):
    """The work grows with the number of leaves, and not with its square."""

    def work(number):
        params = {f"w{i}": np.zeros(1, np.float32) for i in range(number)}
        with ModelCheckpoint(tmp_path / f"{number}") as ckpt:
            path = ckpt.save({"params": params, "opt": params}, epoch=0)
        calls = 0

        def count(*_):
            nonlocal calls
            calls += 1

        sys.setprofile(count)
        try:
            with pytest.raises(CheckpointMismatchError, match="select='opt'"):
                flaxckpt.load(path, params)
        finally:
            sys.setprofile(None)
        return calls

    work(10)  # imports
    assert work(2000) < 6 * work(500)
