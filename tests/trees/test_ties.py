"""What is one thing in two places stays one: shared Variables and modules of NNX."""

import json
import re

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import mutants
import numpy as np
import optax
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp

import flaxckpt
from flaxckpt._disk.fields import MalformedError
from flaxckpt._disk.table import parse_table
from flaxckpt.errors import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    SettingError,
    UnsupportedLeafError,
)


def saved(path, tree, **settings):
    with flaxckpt.ModelCheckpoint(path / "{epoch}", **settings) as ckpt:
        return ckpt.save(tree, epoch=0)


def table_of(path):
    return json.loads((path / "flaxckpt_leaves.json").read_text())


def assert_same_graph(got, want, like=None):
    """The same values, bit for bit, and the same things in the same places."""
    (form, values), (_, wanted) = nnx.split(got), nnx.split(want)
    assert form == nnx.graphdef(want if like is None else like)
    assert jax.tree.structure(values) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(values), jax.tree.leaves(wanted), strict=True):  # fmt: skip
        assert np.array_equal(plain(one), plain(other))


def plain(leaf):
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


# ---- any graph ---------------------------------------------------------------------------


class Node(nnx.Module):
    pass


@st.composite
def plans(draw):
    """Modules, by what is in each: Variables of a pool, and modules, itself included."""
    count = draw(st.integers(1, 5))
    thing = st.one_of(
        st.tuples(st.just("variable"), st.integers(0, 3)),
        st.tuples(st.just("node"), st.integers(0, count - 1)),
        st.tuples(st.just("list"), st.integers(0, count - 1)),
        st.tuples(st.just("array"), st.integers(0, 9)),
    )
    nodes = [draw(st.lists(thing, max_size=4)) for _ in range(count)]
    nodes[0] = [*nodes[0], ("variable", 0)]
    return nodes, draw(st.integers(1, 3))


def build(plan, first):
    """Make the graph of a plan, with values from `first` on; as many roots as it says."""
    contents, roots = plan
    kinds = nnx.Param, nnx.BatchStat, nnx.RngState, nnx.Param
    pool = [kind(jnp.full(2, first + i)) for i, kind in enumerate(kinds)]
    nodes = [Node() for _ in contents]
    lists = [nnx.List([node, pool[i % 4]]) for i, node in enumerate(nodes)]
    for node, things in zip(nodes, contents, strict=True):
        for position, (kind, which) in enumerate(things):
            made = {
                "variable": lambda i: pool[i],
                "node": lambda i: nodes[i],
                "list": lambda i: lists[i],
                "array": lambda i: nnx.data(jnp.full(1, first + i)),
            }[kind](which)
            setattr(node, f"x{position}", made)
    return tuple(nodes[i % len(nodes)] for i in range(roots))


@hypothesis.given(plan=plans())
@hypothesis.settings(max_examples=20)
def test_any_graph_comes_back_as_it_was(plan, tmp_path_factory):
    path = saved(tmp_path_factory.mktemp("any"), tree := build(plan, 0.0))
    assert_same_graph(flaxckpt.load(path, build(plan, 100.0)), tree)
    abstract = nnx.eval_shape(lambda: build(plan, 100.0))
    assert_same_graph(flaxckpt.load(path, abstract), tree)
    # Without `like`, each root is what NNX makes of its state by itself.
    pure = flaxckpt.load(path)
    fresh = build(plan, 100.0)
    assert len(pure) == len(tree)
    for one, root, new in zip(pure, tree, fresh, strict=True):
        wanted = nnx.to_pure_dict(nnx.state(root))
        assert jax.tree.structure(one) == jax.tree.structure(wanted)
        nnx.update(new, one)
        nnx.replace_by_pure_dict(nnx.state(build(plan, 100.0)[0]), pure[0])
    assert_same_graph(fresh, tree)


# ---- models that people have -------------------------------------------------------------


class Tied(nnx.Module):
    """A language model whose output layer is its embedding, and blocks that repeat."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.out = nnx.Linear(4, 5, rngs=rngs)
        self.head = self.embed
        self.block = nnx.Linear(4, 4, rngs=rngs)
        self.blocks = nnx.List([self.block, nnx.BatchNorm(4, rngs=rngs), self.block])
        self.scale = nnx.Param(jnp.ones(4))
        self.alias = self.scale
        self.rngs = rngs

    def __call__(self, tokens):
        x = self.embed(tokens) * self.scale
        for block in self.blocks:
            x = block(x)
        x = x * jax.random.bernoulli(self.rngs.dropout(), 0.9, x.shape).astype(x.dtype)
        return self.head.attend(x * self.alias)


class Pair(nnx.Module):
    """Two modules that draw from one `Rngs`."""

    def __init__(self, rngs):
        self.left, self.right = Node(), Node()
        self.left.rngs = self.right.rngs = rngs


@nnx.jit
def train_step(model, optimizer):
    def loss_of(model):
        return jnp.mean(model(jnp.arange(5)) ** 2)

    with jax.numpy_dtype_promotion("standard"):  # which optax needs
        loss, grads = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, grads)
    return loss


def make(seed):
    model = Tied(nnx.Rngs(seed))
    return model, nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)


def test_training_goes_on_as_if_it_had_never_stopped(tmp_path):
    model, optimizer = make(0)
    with flaxckpt.ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        state = ckpt.init()
        for epoch in range(2):
            train_step(model, optimizer)
            state = ckpt.update(state, (model, optimizer), {}, epoch)
        found = ckpt.restore(like := make(1))
    again, its_optimizer = found.tree
    assert again.head is again.embed
    assert again.blocks[0] is again.blocks[2] is again.block
    assert again.alias is again.scale
    for _ in range(2):
        assert train_step(again, its_optimizer) == train_step(model, optimizer)
    assert_same_graph(found.tree, (model, optimizer), like)


def test_one_rngs_of_two_modules_draws_on_as_one(tmp_path):
    pair = Pair(nnx.Rngs(0))
    pair.left.rngs()
    path = saved(tmp_path, pair)
    again = flaxckpt.load(path, Pair(nnx.Rngs(1)))
    assert again.left.rngs is again.right.rngs
    for model in (pair, again):
        model.left.rngs(), model.right.rngs()
    assert jnp.array_equal(
        jax.random.key_data(pair.left.rngs()), jax.random.key_data(again.left.rngs())
    )
    assert len(table_of(path)["leaves"]) == 2


def test_ties_between_the_parts_of_a_tree(tmp_path):
    model = Tied(nnx.Rngs(0))
    both = nnx.ModelAndOptimizer(model, optax.sgd(0.1))
    tree = {"model": model, "optimizer": both, "rngs": [model.rngs, None]}
    fresh = Tied(nnx.Rngs(1))
    like = {
        "model": fresh,
        "optimizer": nnx.ModelAndOptimizer(fresh, optax.sgd(0.1)),
        "rngs": [fresh.rngs, None],
    }
    got = flaxckpt.load(saved(tmp_path, tree), like)
    assert got["optimizer"].model is got["model"]
    assert got["rngs"][0] is got["model"].rngs
    pure = flaxckpt.load(tmp_path / "1")  # where each has its own, which may be donated
    values = [pure["rngs"][0], pure["model"]["rngs"]]
    assert jax.tree.structure(values[0]) == jax.tree.structure(values[1])
    assert values[0]["default"]["key"] is not values[1]["default"]["key"]
    assert_same_graph(got["model"], model)


def lora(seed):
    layer = nnx.LoRALinear(3, 3, lora_rank=2, rngs=nnx.Rngs(seed))
    return nnx.List([layer, layer])


def metrics(seed):
    average = nnx.metrics.Average()
    average.update(values=jnp.arange(seed + 2.0))
    return nnx.MultiMetric(loss=average, accuracy=nnx.metrics.Accuracy())


def variables(seed):
    one = nnx.Param(jnp.arange(3.0) + seed)
    return {"a": one, "b": (one, nnx.Cache(jnp.zeros(1)))}


@pytest.mark.parametrize(
    "made", [lora, metrics, variables, nnx.Rngs, make,
             lambda seed: nnx.Dict(one=(layer := nnx.BatchNorm(2, rngs=nnx.Rngs(seed))), two=layer),
             lambda seed: (rngs := nnx.Rngs(seed), nnx.Dropout(0.5, rngs=rngs), rngs)],
)  # fmt: skip
@pytest.mark.parametrize("settings", [{}, {"compress": True}, {"snapshot": "host"}])
def test_objects_of_nnx(tmp_path, made, settings):
    path = saved(tmp_path, tree := made(0), **settings)
    for like in (made(1), nnx.eval_shape(lambda: made(1))):
        assert_same_graph(flaxckpt.load(path, like), tree, like)


def test_a_module_below_a_dict_is_never_walked_as_a_tree(tmp_path):
    """JAX would recurse for ever, or take twice as long for each shared level."""
    parent, child = Node(), Node()
    parent.child, child.parent, child.w = child, parent, nnx.Param(jnp.ones(2))
    level = Node()
    level.w = nnx.Param(jnp.ones(2))
    for _ in range(200):
        above = Node()
        above.x = above.y = level
        level = above
    with flaxckpt.ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        for epoch, tree in enumerate(2 * [{"w": jnp.ones(2)}, parent, level]):
            path = ckpt.save({"model": tree, "step": jnp.ones(())}, epoch)
            ckpt.wait()
            assert flaxckpt.load(path)["step"] == 1
    assert jax.tree.leaves([[[[1]]]]) == [1]  # JAX has its recursion count back


def test_a_child_that_knows_its_parent(tmp_path):
    def family(seed):
        parent, child = Node(), Node()
        parent.child, child.parent, parent.me = child, parent, parent
        child.w = nnx.Param(jnp.full(2, float(seed)))
        return parent

    with flaxckpt.ModelCheckpoint(tmp_path / "{epoch}", save_weights_only=True) as ckpt:
        ckpt.update(ckpt.init(family(1)), family(3), {}, 0)
        ckpt.wait()
        got = flaxckpt.load(ckpt.latest, nnx.state(family(1), nnx.Param))
        assert got["child"]["w"][...].tolist() == [3, 3]
    path = saved(tmp_path / "whole", family(3), frozen=lambda path, leaf: True)
    assert_same_graph(flaxckpt.load(path, family(0)), family(3))
    assert flaxckpt.load(path)["child"]["w"].tolist() == [3, 3]
    flaxckpt.verify(path)


# ---- how it is stored --------------------------------------------------------------------


def test_what_is_shared_is_stored_once_and_plain_orbax_reads_it(tmp_path):
    once = Node()
    once.a = once.b = nnx.Param(jnp.arange(4.0))
    path = saved(tmp_path, once)
    assert [leaf["path"] for leaf in table_of(path)["leaves"]] == [["a", "value"]]
    loaded = ocp.load(path)
    assert loaded["a"]["value"].tolist() == [0, 1, 2, 3]
    assert "b" not in loaded


def test_an_array_in_two_places_of_a_plain_tree_is_two_leaves(tmp_path):
    one = jnp.arange(3.0)
    path = saved(tmp_path, {"a": one, "b": [one]})
    assert len(table_of(path)["leaves"]) == 2
    got = flaxckpt.load(path)
    assert got["a"] is not got["b"][0]


def test_trees_of_one_structure_with_and_without_ties_are_told_apart(tmp_path):
    def made(tied):
        node = Node()
        node.a, node.b = Node(), Node()
        node.a.w = nnx.Param(jnp.ones(2))
        node.b.w = node.a.w if tied else nnx.Param(jnp.zeros(2))
        return node

    with flaxckpt.ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        for epoch in range(4):
            ckpt.save(made(epoch % 2 == 0), epoch=epoch)
            ckpt.wait()
    for info in ckpt.checkpoints:
        got = flaxckpt.load(info, like=made(info.epoch % 2 == 0))
        assert_same_graph(got, made(info.epoch % 2 == 0))


def test_what_was_stored_once_is_given_to_each_place_of_an_untied_like(tmp_path):
    path = saved(tmp_path, Tied(nnx.Rngs(0)))
    untied = jax.tree.map(jnp.zeros_like, Tied(nnx.Rngs(1)))
    got = flaxckpt.load(path, untied)
    assert got.alias is not got.scale
    np.testing.assert_array_equal(got.alias[...], got.scale[...])
    np.testing.assert_array_equal(got.head.embedding[...], got.embed.embedding[...])
    # They may be donated: each has memory of its own.
    jax.jit(lambda tree: jax.tree.map(lambda x: x, tree), donate_argnums=0)(
        [got.alias[...], got.scale[...]]
    )
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    untied.scale.set_raw_value(jax.device_put(untied.scale[...], rows))
    got = flaxckpt.load(path, untied)
    assert got.scale[...].sharding == rows
    assert got.alias[...].sharding != rows


def test_what_was_stored_twice_is_shared_again_if_it_is_the_same(tmp_path):
    model = Tied(nnx.Rngs(0))
    untied = jax.tree.map(lambda leaf: leaf, model)
    assert untied.alias is not untied.scale
    path = saved(tmp_path / "same", untied)
    got = flaxckpt.load(path, Tied(nnx.Rngs(1)))
    assert_same_graph(got, model)
    untied.alias[...] = untied.alias[...].at[0].set(jnp.nan)
    untied.scale[...] = untied.scale[...].at[0].set(jnp.nan)
    path = saved(tmp_path / "nan", untied, compress=True)
    assert flaxckpt.load(path, Tied(nnx.Rngs(1))).alias[0] != 0
    untied.alias[...] += 1
    for settings in ({}, {"compress": True}):
        path = saved(tmp_path / f"other{len(settings)}", untied, **settings)
        with pytest.raises(CheckpointMismatchError) as caught:
            flaxckpt.load(path, Tied(nnx.Rngs(1)))
        assert str(caught.value) == (
            f"Checkpoint {str(path)!r} differs from what was asked for in 1 leaf:\n"
            "  alias/value: checkpoint has float32[4], and other values as "
            "scale/value, wanted one shared by both\n"
            "What `like` shares between several places was stored as several values. "
            "Pass a `like` that shares nothing there, or none."
        )


def test_a_state_holds_values_which_are_tied_to_nothing(tmp_path):
    model = Tied(nnx.Rngs(0))
    tree = {"model": nnx.state(model), "best": nnx.state(Tied(nnx.Rngs(5)))}
    one = nnx.state(model)
    like = {"model": one, "best": one}
    got = flaxckpt.load(saved(tmp_path, tree), like)
    for name in tree:
        assert_same_graph(got[name], tree[name])
    # And it has what a module needs, and the other way round.
    path = saved(tmp_path / "state", nnx.state(model))
    assert_same_graph(flaxckpt.load(path, Tied(nnx.Rngs(1))), model)
    path = saved(tmp_path / "module", model)
    got = flaxckpt.load(path, nnx.state(Tied(nnx.Rngs(1))))
    assert_same_graph(got, nnx.state(model))


@pytest.mark.parametrize("jit", [nnx.jit, jax.jit], ids=["nnx", "jax"])
def test_from_inside_a_program(tmp_path, jit):
    ckpt = flaxckpt.ModelCheckpoint(tmp_path / "{epoch}")

    @jit
    def step(model, state, epoch):
        model.scale[...] *= 2
        return ckpt.update(state, model, {}, epoch)

    model = Tied(nnx.Rngs(0))
    with ckpt:
        step(model, ckpt.init(model), 0)
    got = flaxckpt.load(ckpt.latest, jax.tree.map(lambda x: x, Tied(nnx.Rngs(1))))
    assert got.scale[0] == 2
    if jit is nnx.jit:
        tied = flaxckpt.load(ckpt.latest, Tied(nnx.Rngs(1)))
        assert_same_graph(tied, model)


def test_frozen_leaves_that_are_shared(tmp_path):
    path = tmp_path / "{epoch}"
    model = Tied(nnx.Rngs(0))
    with flaxckpt.ModelCheckpoint(path, frozen=nnx.Param) as ckpt:
        for epoch in range(3):
            ckpt.save(model, epoch=epoch)
            ckpt.wait()
    assert ckpt.counts.linked_bytes > 0
    for info in ckpt.checkpoints:
        assert_same_graph(flaxckpt.load(info, Tied(nnx.Rngs(1))), model)


def test_a_snapshot_says_that_it_would_untie(tmp_path):
    with pytest.raises(SettingError, match=r"in two places.*Pass nnx\.state\(model\)"):
        flaxckpt.Snapshot.like(Tied(nnx.Rngs(0)), {"loss": 0.0})
    flaxckpt.Snapshot.like(nnx.state(Tied(nnx.Rngs(0)), nnx.Param), {"loss": 0.0})


def test_trees_without_nnx_are_flattened_as_jax_does():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(x)

    from flaxckpt._trees.ties import flatten

    params = Net().init(jax.random.key(0), jnp.ones((1, 2)))
    leaves, structure = jax.tree.flatten(params)
    assert flatten(params).key == structure
    assert all(a is b for a, b in zip(flatten(params).leaves, leaves, strict=True))


VARIABLE, A = {"variable": 0}, ["a", "value"]


@pytest.mark.parametrize(("skeleton", "path"), [
    ({"same": []}, []), ({"dict": [["a", {"same": []}]]}, []),
    ({"module": [["a", VARIABLE], ["b", {"same": [1]}]]}, A),
    ({"module": [["b", {"same": [1]}], ["a", VARIABLE]]}, A),
    ({"module": [["a", VARIABLE], ["b", {"same": [0, 0]}]]}, A),
    ({"module": [["a", VARIABLE], ["b", {"same": [False]}]]}, A),
    ({"module": [["a", VARIABLE], ["b", {"same": ["0"]}]]}, A),
    ({"module": [["a", VARIABLE], ["b", {"same": None}]]}, A),
    ({"module": [["a", VARIABLE], ["b", {"same": [0], "dict": []}]]}, A),
    ({"module": [["a", VARIABLE], ["a", None]]}, A), ({"module": [["a"]]}, A),
    ({"module": {"a": VARIABLE}}, A), ({"dict": [["a", {"variable": [0]}]]}, A),
])  # fmt: skip
def test_a_structure_that_is_none_is_refused(skeleton, path):
    def table(tree):
        leaf = {"path": path, "kind": "int"}
        fields = {"format": 1, "tree": tree, "leaves": [leaf], "weights": "all"}
        return json.dumps({**fields, "digests": ["sum:" + "0" * 16]}).encode()

    if path == A:
        parse_table(table({"module": [["a", VARIABLE], ["b", {"same": [0]}]]}), 1)
    with pytest.raises(MalformedError):
        parse_table(table(skeleton), 1)


def test_pure_dicts_and_modules_stand_for_each_other(tmp_path):
    model, fresh = Tied(nnx.Rngs(0)), Tied(nnx.Rngs(1))
    pure = nnx.to_pure_dict(nnx.state(model))
    zeros = nnx.to_pure_dict(nnx.state(fresh))
    path = saved(tmp_path / "module", model)
    got = flaxckpt.load(path, zeros)
    assert jax.tree.structure(got) == jax.tree.structure(pure)
    np.testing.assert_array_equal(got["alias"], pure["alias"])
    device = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    placed = flaxckpt.load(path, device)
    assert jax.tree.structure(placed) == jax.tree.structure(pure)
    assert placed["out"]["kernel"].sharding == device
    path = saved(tmp_path / "pure", pure)
    assert_same_graph(flaxckpt.load(path, fresh), model)


# ---- a table that asks for more than there is ----------------------------------------


def rewritten(path, change):
    table = json.loads((path / "flaxckpt_leaves.json").read_bytes())
    change(table)
    mutants.sign(path, table=json.dumps(table).encode())


@pytest.mark.parametrize("load", [flaxckpt.load, flaxckpt.load_weights])
@pytest.mark.parametrize("depth", [0, 1])
def test_a_table_that_asks_for_many_copies(tmp_path, load, depth):
    big = nnx.Param(jnp.ones(2**18))
    with flaxckpt.ModelCheckpoint(tmp_path / "a", weights=lambda tree: tree) as ckpt:
        path = ckpt.save([big, {"a": 1}], epoch=0)
    same = {"list": [{"same": [0]}] * 1000} if depth else {"same": [0]}

    def change(table):
        table["tree"]["list"] += [same] * (1 if depth else 1000)

    rewritten(path, change)
    with pytest.raises(CheckpointCorruptError, match="in too many places"):
        load(path)


def test_a_table_whose_weights_are_many_copies(tmp_path):
    with flaxckpt.ModelCheckpoint(tmp_path / "a") as ckpt:
        path = ckpt.save({"w": jnp.ones(2**18)}, epoch=0)
    rewritten(path, lambda table: table.update(weights={"list": [0] * 1000}))
    with pytest.raises(CheckpointCorruptError, match="in too many places"):
        flaxckpt.load_weights(path)


def test_a_table_with_many_empty_places(tmp_path):
    with flaxckpt.ModelCheckpoint(tmp_path / "a", weights=lambda tree: tree) as ckpt:
        path = ckpt.save([nnx.Dict(a=nnx.Param(1.0)), {"a": 1}], epoch=0)

    def change(table):
        module = table["tree"]["list"][0]
        module["module"] += [[f"b{i}", {"dict": []}] for i in range(3000)]
        table["tree"]["list"] += [{"same": [0]}] * 3000

    rewritten(path, change)
    with pytest.raises(CheckpointCorruptError, match="in too many places"):
        flaxckpt.load(path)


def test_what_is_in_a_hundred_places_is_loaded(tmp_path):
    shared = nnx.Param(jnp.ones(3))
    with flaxckpt.ModelCheckpoint(tmp_path / "a") as ckpt:
        path = ckpt.save([shared] * 100, epoch=0)
    assert len(flaxckpt.load(path)) == 100


@pytest.mark.parametrize("keys", [((1, 2), ("a",)), (1, "a"), (None, "a")], ids=repr)
@pytest.mark.parametrize("is_nnx", [False, True])
def test_keys_that_cannot_be_sorted_are_named(tmp_path, keys, is_nnx):
    bad = dict.fromkeys(keys, np.float32(1))
    tree = {"a": [bad], "b": nnx.Linear(2, 2, rngs=nnx.Rngs(0)) if is_nnx else 1.0}
    if is_nnx:
        tree["b"].above = tree["b"]
    good = {"a": [np.zeros(2)]}
    path = saved(tmp_path, good)
    ckpt = flaxckpt.ModelCheckpoint(tmp_path / "{epoch}")
    logs = {"val_loss": 0.5}
    message = r"\n  a/0: a dict with keys that cannot be sorted \(" + re.escape(
        ", ".join(map(repr, bad))
    )
    for call in (
        lambda: ckpt.save(tree, 1),
        lambda: ckpt.update(ckpt.init(), tree, logs, 1),
        lambda: ckpt.init(like=tree),
        lambda: flaxckpt.Snapshot.like({"a": [bad]}, logs),
        lambda: flaxckpt.Snapshot.like(good, logs).take(True, {"a": [bad]}, logs, 0),
    ):
        with pytest.raises(UnsupportedLeafError, match=f"cannot be saved:{message}"):
            call()
    for call in (
        lambda: ckpt.restore(like=tree),
        lambda: flaxckpt.load(path, like=tree),
        lambda: flaxckpt.load_weights(path, like=tree),
    ):
        with pytest.raises(UnsupportedLeafError, match=f"cannot be restored:{message}"):
            call()
    with pytest.raises(
        UnsupportedLeafError, match=r"the tree itself: a dict with keys"
    ):
        ckpt.save(bad, 1)
    ckpt.close()
    assert [each.name for each in tmp_path.iterdir()] == ["1"]
