"""`Snapshot`: the best of what a program has seen, kept in the program."""

import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from strategies import TINY, metrics

import flaxckpt
from flaxckpt import MetricError, SettingError, Snapshot

N = 8


def tree_at(index):
    index = jnp.asarray(index)
    return {
        "w": jnp.full((4, 2), index, jnp.float32),
        "b": jnp.full(3, index, jnp.bfloat16),
        "n": jnp.asarray(index, jnp.int32),
        "key": jax.random.fold_in(jax.random.key(7), index),
    }


def like(keep=1, mode="min"):
    return Snapshot.like(tree_at(0), {"score": 0.0, "i": 0}, keep, monitor="score",
                         mode=mode)  # fmt: skip


def plain(tree):
    """Trees compared bit for bit, with keys as their data."""

    def as_numpy(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return str(leaf.dtype), np.asarray(leaf).tolist()

    return [as_numpy(leaf) for leaf in jax.tree.leaves(tree)]


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    np.testing.assert_equal(plain(a), plain(b))


def twin(rows, keep, mode):
    """What is kept, said plainly: sort what may be taken, earliest first among equals."""
    sign = 1 if mode == "min" else -1
    taken = []
    for at, (save, value, *_) in enumerate(rows):
        value = 0.0 if abs(value) < TINY else value
        if save and value == value:
            taken.append((sign * value, at))
    return [at for _, at in sorted(taken)[:keep]]


rows = st.lists(
    st.tuples(st.booleans(), metrics, st.integers(0, 3), st.integers(-1, 3)),
    min_size=N,
    max_size=N,
)


def columns(rows):
    save, value, epoch, batch = zip(*rows, strict=True)
    return (
        jnp.array(save),
        jnp.array(value, jnp.float32),
        jnp.array(epoch, jnp.int32),
        jnp.array(batch, jnp.int32),
        jnp.arange(N),
    )


def take(snapshot, row):
    save, value, epoch, batch, at = row
    return snapshot.take(save, tree_at(at), {"score": value, "i": at}, epoch, batch)


@jax.jit
def scanned(snapshot, table):
    return jax.lax.scan(lambda s, row: (take(s, row), None), snapshot, table)[0]


@hypothesis.given(rows, st.sampled_from([1, 2, 3]), st.sampled_from(["min", "max"]))
@hypothesis.settings(max_examples=40)
@hypothesis.example(
    [(True, value, 0, 0) for value in (1.0, 1.0, 0.5, 7, 7, 7, 7, 7)], 2, "min"
)  # of two equals, the later one goes
def test_it_keeps_the_best(rows, keep, mode):
    # Batches are zero-based integers; none at all is what -1 stands for.
    table = columns(rows)
    found = scanned(like(keep, mode), table).entries()
    wanted = twin(rows, keep, mode)
    assert [entry.logs["i"] for entry in found] == wanted
    for entry, at in zip(found, wanted, strict=True):
        _, value, epoch, batch = rows[at]
        assert (entry.epoch, entry.batch) == (epoch, None if batch < 0 else batch)
        assert entry.logs["score"] == value
        assert_same(entry.tree, tree_at(at))


@hypothesis.given(rows, st.sampled_from([1, 3]), st.sampled_from(["min", "max"]))
@hypothesis.settings(max_examples=15)
def test_all_ways_agree(rows, keep, mode):
    table = columns(rows)
    eager = jitted = like(keep, mode)
    for save, value, epoch, batch, at in zip(*map(np.asarray, table), strict=True):
        batch = None if batch < 0 else batch
        logs = {"score": value, "i": at}
        eager = eager.take(save, tree_at(at), logs, epoch, batch)
        jitted = jitted_take(jitted, save, tree_at(at), logs, epoch, batch)
    assert_same(eager, jitted)
    assert_same(eager, scanned(like(keep, mode), table))


@jax.jit
def jitted_take(snapshot, *arguments):
    return snapshot.take(*arguments)


@pytest.mark.parametrize("keep", [1, 3])
def test_under_vmap_each_member_has_its_own(keep):
    values = jax.random.normal(jax.random.key(0), (5, N)).at[:, 2].set(jnp.nan)
    saves = jax.random.bernoulli(jax.random.key(1), 0.7, (5, N)).at[4].set(False)
    zeros = jnp.zeros(N, jnp.int32)

    def one(values, saves):
        table = (saves, values, zeros, zeros, jnp.arange(N))
        return scanned(like(keep), table)

    batched = jax.jit(jax.vmap(one))(values, saves)
    for member in range(5):
        alone = one(values[member], saves[member])
        pairs = zip(batched.entries(member), alone.entries(), strict=True)
        for found, wanted in pairs:
            assert found.logs == wanted.logs
            assert_same(found.tree, wanted.tree)
    assert batched.entries(member=4) == []
    assert len(batched.entries(member=0)) == keep
    for member in (None, 5, -1, "a"):
        with pytest.raises(SettingError, match=r"member.*ensemble of 5"):
            batched.entries(member)
    with pytest.raises(SettingError, match="under vmap"):
        take(batched, (True, 1.0, 0, 0, 0))
    with pytest.raises(SettingError, match="Leave it out"):
        alone.entries(member=0)


def test_a_snapshot_is_made_of_structs_too():
    wanted = like(2)
    structs = jax.eval_shape(tree_at, 0)
    logs = jax.eval_shape(lambda: {"score": jnp.float32(0), "i": jnp.int32(0)})
    assert_same(Snapshot.like(structs, logs, 2, monitor="score", mode="min"), wanted)
    assert_same(jax.jit(lambda: like(2))(), wanted)
    shapes = jax.eval_shape(lambda: like(2))
    assert jax.tree.map(np.shape, shapes) == jax.tree.map(np.shape, wanted)
    assert wanted.entries() == []
    members = jax.vmap(lambda tree: Snapshot.like(tree, {"loss": 0.0}))(
        {"w": jnp.ones((5, 3))}
    )
    assert members.trees[0]["w"].shape == (5, 3)
    assert members.values.shape == (5, 1)


def test_python_numbers_become_arrays():
    snapshot = Snapshot.like({"n": 1, "x": 0.5, "y": True}, {"loss": 0})
    snapshot = snapshot.take(True, {"n": 2, "x": 1.5, "y": False}, {"loss": 3}, 0)
    tree = {"n": jnp.int32(2), "x": jnp.float32(1.5), "y": jnp.array(False)}
    assert_same(snapshot.entries()[0].tree, tree)


def test_eagerly_what_is_kept_is_a_copy():
    tree = {"w": jnp.ones(3), "n": np.ones(3, np.float32)}
    snapshot = Snapshot.like(tree, {"loss": 0.0}).take(True, tree, {"loss": 1.0}, 0)
    tree["w"].delete()
    tree["n"][:] = 7
    assert_same(snapshot.trees[0], {"w": jnp.ones(3), "n": jnp.ones(3)})
    assert snapshot.take(True, snapshot.trees[0], {"loss": 2.0}, 1) is snapshot


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("way", ["eager", "jit", "scan"])
def test_leaves_keep_their_shardings(keep, way):
    mesh = jax.make_mesh((4, 2), ("x", "y"), (jax.sharding.AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, P("x", "y"))
    tree = {"w": jax.device_put(jnp.arange(64.0).reshape(8, 8), sharding)}
    empty = Snapshot.like(tree, {"loss": 0.0}, keep)
    assert empty.trees[0]["w"].sharding == sharding

    def body(carry, loss):
        tree, snapshot = carry
        tree = {"w": tree["w"] + 1}
        return (tree, snapshot.take(True, tree, {"loss": loss}, 0)), None

    losses = jnp.array([3.0, 1.0, 2.0])
    if way == "scan":
        scan = jax.jit(lambda *carry: jax.lax.scan(body, carry, losses)[0])
        _, snapshot = scan(tree, empty)
    else:
        carry = (tree, empty)
        for loss in losses:
            carry = (jax.jit(body) if way == "jit" else body)(carry, loss)[0]
        snapshot = carry[1]
    found = snapshot.entries()
    assert [entry.logs["loss"] for entry in found] == [1.0, 2.0][:keep]
    for kept in snapshot.trees:
        assert kept["w"].sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(found[0].tree["w"], tree["w"] + 2)


def conditional_branches(text):
    """Instructions of each branch of each conditional of a compiled program."""
    bodies = {}
    for part in text.split("\n\n"):
        name = part.strip().split(" ", 1)[0].lstrip("%")
        bodies[name] = part
    for line in text.splitlines():
        if " conditional(" in line:
            names = line.split("branch_computations={")[1].split("}")[0]
            yield [bodies[name.strip().lstrip("%")] for name in names.split(",")]


@pytest.mark.parametrize("keep", [1, 3])
def test_what_takes_nothing_copies_nothing(keep):
    tree = {"w": jnp.zeros((512, 512))}

    def body(carry, loss):
        tree, snapshot = carry
        tree = {"w": jnp.cos(tree["w"] @ tree["w"])}
        return (tree, snapshot.take(True, tree, {"loss": loss}, 0)), None

    scan = jax.jit(
        lambda *carry: jax.lax.scan(body, carry, jnp.arange(9.0)), donate_argnums=(0, 1)
    )
    text = scan.lower(tree, Snapshot.like(tree, {"loss": 0.0}, keep)).compile()
    branches = list(conditional_branches(text.as_text()))
    assert len(branches) >= keep
    copies = re.compile(r"512,512\S* copy\(")
    assert sum(bool(copies.search(taken)) for _, taken in branches) == keep
    for idle, _ in branches:
        assert not copies.search(idle)
    outside = text.as_text()
    for pair in branches:
        for branch in pair:
            outside = outside.replace(branch, "")
    assert not copies.search(outside)


def test_save_snapshot_goes_by_the_time(tmp_path):
    snapshot = like(3)
    for at, (value, epoch, batch) in enumerate(
        [(3.0, 0, 4), (9.0, 1, 0), (1.0, 0, None), (2.0, 1, 3)]
    ):
        logs = {"score": value, "i": at}
        snapshot = snapshot.take(True, tree_at(at), logs, epoch, batch)
    with flaxckpt.ModelCheckpoint(
        tmp_path / "{epoch}-{score:.0f}", "score", mode="min"
    ) as ckpt:
        assert ckpt.save_snapshot(like()) == ()
        paths = ckpt.save_snapshot(snapshot)
        ckpt.wait()
        assert [info.path for info in ckpt.checkpoints] == list(paths)
        assert [info.logs["i"] for info in ckpt.checkpoints] == [0, 2, 3]
        found = ckpt.restore(like=tree_at(0), which="best")
    assert (found.epoch, found.batch, found.logs["score"]) == (0, None, 1.0)
    assert_same(found.tree, tree_at(2))


def test_save_snapshot_names_members(tmp_path):
    def one(values):
        tree = {"params": {"w": values}, "opt_state": {"m": values}}
        snapshot = Snapshot.like(tree, {"val_loss": 0.0})
        return snapshot.take(True, tree, {"val_loss": values.sum()}, 2)

    members = jax.jit(jax.vmap(one))(jnp.arange(6.0).reshape(3, 2))
    with flaxckpt.ModelCheckpoint(
        tmp_path / "{member:02d}-{epoch:02d}", save_weights_only=True
    ) as ckpt:
        paths = [path for i in range(3) for path in ckpt.save_snapshot(members, i)]
        with pytest.raises(SettingError, match="member"):
            ckpt.save_snapshot(members)
    assert [path.name for path in paths] == ["00-03", "01-03", "02-03"]
    for member, path in enumerate(paths):
        weights = flaxckpt.load_weights(path, {"params": {"w": jnp.zeros(2)}})
        wanted = [2 * member, 2 * member + 1]
        assert weights["params"]["w"].tolist() == wanted
        (info,) = [each for each in ckpt.checkpoints if each.path == path]
        assert info.logs == {"val_loss": sum(wanted), "member": member}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"a": 0.0, "b": 0.0},), "Pass monitor= a key of logs: 'a', 'b'"),
        (({"beta": 0.0},), "not known by its name"),
        (({"loss": 0.0}, 0), "keep=0"),
        (({"loss": 0.0}, True), "keep=True"),
        (({},), "mapping"),
        (({"loss": np.zeros(2)},), "has shape"),
        (({"loss": 1j},), "real number"),
    ],
)
def test_settings_that_cannot_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        Snapshot.like(jnp.zeros(2), *arguments)


def test_more_settings_that_cannot_work():
    with pytest.raises(SettingError, match="a key of logs: 'loss'"):
        Snapshot.like(jnp.zeros(2), {"loss": 0.0}, monitor="val_loss")
    with pytest.raises(SettingError, match='"auto", "min" or "max"'):
        Snapshot.like(jnp.zeros(2), {"loss": 0.0}, mode="low")
    with pytest.raises(SettingError, match=r"\['name'\]: a str"):
        Snapshot.like({"name": "x", "w": 1}, {"loss": 0.0})
    assert Snapshot.like(0, {"a": 0.0, "val_loss": 0.0}).monitor == "val_loss"
    assert Snapshot.like(0, {"accuracy": 0.0}).mode == "max"
    assert Snapshot.like(0, {"beta": 0.0}, mode="max").mode == "max"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tree": {"w": jnp.zeros(3)}}, SettingError, r"\['w'\]: is float32\[3\], was"),
        ({"tree": {"w": jnp.zeros(2, int)}}, SettingError, r"\['w'\]: is int32\[2\]"),
        ({"tree": {}}, SettingError, r"\['w'\]: is nothing"),
        ({"tree": {"w": jnp.zeros(2), "v": 0}}, SettingError, r"\['v'\]: .* nothing"),
        ({"logs": {"x": 0.0}}, MetricError, "'loss'.*lack it.*'x'"),
        ({"logs": {"loss": 0.0}}, SettingError, r"made for \['loss', 'x'\]"),
        ({"logs": {"loss": np.zeros(2), "x": 0.0}}, MetricError, "must be a scalar"),
        ({"logs": {"loss": 0.0, "x": np.zeros(2)}}, MetricError, "keeps scalars"),
        ({"logs": {"loss": 0.0, "x": 0.5}}, MetricError, "made for int32"),
        (
            {"logs": {"loss": 0.0, "x": np.uint32(1)}},
            MetricError,
            "is uint32, .* int32",
        ),
        ({"epoch": -1}, SettingError, "zero-based"),
        ({"batch": 0.5}, SettingError, "zero-based"),
        ({"save": np.ones(2, bool)}, SettingError, "one truth value"),
    ],
)
@pytest.mark.parametrize("traced", [False, True])
def test_what_take_refuses(change, error, message, traced):
    tree = {"w": jnp.zeros(2)}
    call = {"save": True, "tree": tree, "logs": {"loss": 0.0, "x": 0}, "epoch": 0}
    call |= change
    snapshot = Snapshot.like(tree, {"loss": 0.0, "x": 0}, monitor="loss")
    with pytest.raises(error, match=message):
        if traced:
            jax.eval_shape(lambda s: s.take(**call), snapshot)
        else:
            snapshot.take(**call)


def test_entries_are_for_the_host():
    with pytest.raises(SettingError, match="when the program has run"):
        jax.eval_shape(lambda s: len(s.entries()), like())


def test_under_x64_it_compares_in_float64():
    with jax.enable_x64(True):
        snapshot = Snapshot.like({"w": 1.0}, {"loss": 0.0})
        for loss in (1.0, 1 - 1e-12):
            snapshot = jitted_take(snapshot, True, {"w": loss}, {"loss": loss}, 0)
        assert snapshot.entries()[0].logs["loss"] == 1 - 1e-12


def test_no_slot_replaces_another_when_saved(tmp_path):
    snapshot = like(keep=2)
    for index, score in enumerate([0.1, 0.5]):
        logs = {"score": score, "i": index}
        snapshot = snapshot.take(True, tree_at(index), logs, index)
    members = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), snapshot)
    with flaxckpt.ModelCheckpoint(tmp_path / "best") as ckpt:
        with pytest.raises(flaxckpt.TemplateError, match=r"holds 2 trees.*\{epoch\}"):
            ckpt.save_snapshot(snapshot)
        assert ckpt.checkpoints == ()
    with flaxckpt.ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        assert len(ckpt.save_snapshot(snapshot)) == 2
        with pytest.raises(flaxckpt.TemplateError, match=r"Put \{member\}"):
            ckpt.save_snapshot(members, 0)
    with flaxckpt.ModelCheckpoint(tmp_path / "{member}-{epoch}", max_to_keep=1) as ckpt:
        with pytest.raises(SettingError, match=r"max_to_keep.*one series"):
            ckpt.save_snapshot(members, 0)
        with pytest.raises(SettingError, match=r"pass the flaxckpt\.Snapshot first"):
            ckpt.save_snapshot(tree_at(0))


def test_a_metric_is_not_rounded_to_what_was_promised():
    """The values compared and those in the logs would differ."""
    snapshot = Snapshot.like(0.0, {"loss": jnp.bfloat16(0)})
    with pytest.raises(MetricError, match=r"is float32, .* made for bfloat16"):
        snapshot.take(True, 0.0, {"loss": jnp.asarray(0.5, jnp.float32)}, 0)
    assert snapshot.take(True, 0.0, {"loss": 0.5}, 0).entries()[0].logs["loss"] == 0.5
