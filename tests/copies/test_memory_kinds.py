"""Leaves in another memory of their devices, as offloaded optimizer state is."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from multiprocess import pod
from never_ready import take_metrics_for_unknown
from saved_trees import assert_same, structs_of

import flaxckpt
from flaxckpt import ModelCheckpoint, Snapshot

FULL = os.environ.get("FLAXCKPT_FAULTS") == "full"
KINDS = ("pinned_host", "unpinned_host")
HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
BEST = {"save_best_only": True, "monitor": "loss"}


def placement(kind, where):
    """Return a function that places values in a memory, on one device or on eight."""
    if where == "one":
        sharding = SingleDeviceSharding(jax.devices()[0], memory_kind=kind)
        return lambda value: jax.device_put(value, sharding)
    mesh = jax.make_mesh(
        (4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )

    def place(value):
        fits = np.ndim(value) and np.shape(value)[0] % 4 == 0
        spec = P("x") if fits else P()
        return jax.device_put(value, NamedSharding(mesh, spec, memory_kind=kind))

    return place


def make_tree(kind, where, *, mixed=True):
    """Small and large leaves of several dtypes, enough of one dtype to be packed."""
    place = placement(kind, where)
    tree = {
        "mu": {str(i): place(np.arange(8, dtype=np.float32) + i) for i in range(5)},
        "nu": place(np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32)),
        "half": place(jnp.full((8, 3), 1.5, jnp.bfloat16)),
        "count": place(np.int32(7)),
        "key": place(jax.random.key(3)),
        "empty": place(np.zeros((0, 2), np.float32)),
    }
    if mixed:
        on_device = placement("device", where)
        tree["params"] = {str(i): on_device(np.ones((8, 2)) * i) for i in range(5)}
        tree["host"] = np.arange(3.0)
    return tree


def assert_same_places(one, other):
    assert_same(one, other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if isinstance(a, jax.Array):
            assert a.sharding == b.sharding
            assert a.sharding.memory_kind == b.sharding.memory_kind


@pytest.mark.parametrize("copy", ["auto", "host", "alone"] + ["device", "none"] * FULL)
@pytest.mark.parametrize("where", ["one", "eight"])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_restored_where_like_is(tmp_path, kind, where, copy):
    """Twice, since the second save is written in another way than the first."""
    tree = make_tree(kind, where, mixed=copy != "alone")
    copy = "auto" if copy == "alone" else copy
    with ModelCheckpoint(tmp_path / "{epoch}", snapshot=copy) as ckpt:
        state = ckpt.init()
        for epoch in range(2):
            state = ckpt.update(state, tree, {"loss": 1.0}, epoch)
    for path in (tmp_path / "1", tmp_path / "2"):
        assert_same_places(flaxckpt.load(path, tree), tree)
        flaxckpt.verify(path)
        plain = flaxckpt.load(path)
        default = jax.devices()[0].default_memory().kind
        for leaf in jax.tree.leaves(plain):
            if isinstance(leaf, jax.Array):
                assert leaf.sharding.memory_kind == default
        assert np.array_equal(plain["nu"], np.asarray(tree["nu"]))


@pytest.mark.parametrize(
    "settings",
    [{"compress": True}, {"frozen": lambda path, leaf: path == ("nu",)}],
    ids=["compressed", "frozen"],
)
@pytest.mark.parametrize("where", ["one", "eight"])
def test_in_every_arrangement_of_the_files(tmp_path, where, settings):
    tree = make_tree("pinned_host", where)
    with ModelCheckpoint(tmp_path / "{epoch}", **settings) as ckpt:
        for epoch in range(3):
            ckpt.save(tree, epoch)
    for epoch in range(1, 4):
        assert_same_places(flaxckpt.load(tmp_path / str(epoch), tree), tree)


@pytest.mark.parametrize("into", [*KINDS, "device"])
@pytest.mark.parametrize("where", ["one", "eight"])
def test_restored_to_another_memory_than_it_was_saved_from(tmp_path, where, into):
    tree = make_tree("pinned_host", where)
    with ModelCheckpoint(tmp_path / "a") as ckpt:
        ckpt.save(tree, 0)
    for other in ("one", "eight"):
        wanted = make_tree(into, other)
        assert_same_places(flaxckpt.load(tmp_path / "a", wanted), wanted)
        structs = structs_of(wanted)
        assert_same_places(flaxckpt.load(tmp_path / "a", structs), wanted)


@pytest.mark.parametrize("where", ["one", "eight"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_copied_may_be_donated(tmp_path, kind, where):
    place = placement(kind, where)
    tree = {"mu": place(np.zeros((8, 4096), np.float32))}
    if kind == "pinned_host":
        step = jax.jit(
            lambda t: {"mu": jax.device_put(jax.device_put(t["mu"], DEVICE) + 1, HOST)},
            donate_argnums=0,
        )
    else:
        step = lambda t: {"mu": place(np.asarray(t["mu"]) + 1)}  # noqa: E731
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        for epoch in range(4):
            ckpt.save(tree, epoch)
            tree = step(tree)
    for epoch in range(4):
        found = flaxckpt.load(tmp_path / str(epoch + 1))
        assert np.all(np.asarray(found["mu"]) == epoch)


@pytest.mark.parametrize("save_last", [False, True])
@pytest.mark.parametrize("where", ["one", "eight"])
def test_a_metric_that_a_device_computes_decides(
    tmp_path, monkeypatch, where, save_last
):
    """As if each metric were still being computed at the call."""
    take_metrics_for_unknown(monkeypatch)
    place = placement("pinned_host", where)
    with ModelCheckpoint(tmp_path / "{epoch}", save_last=save_last, **BEST) as ckpt:
        state = ckpt.init()
        for epoch, loss in enumerate([3.0, 4.0, 2.0, 5.0]):
            tree = {"mu": place(np.full(8, epoch, np.float32)), "w": jnp.full(8, epoch)}
            state = ckpt.update(state, tree, {"loss": jnp.float32(loss)}, epoch)
        ckpt.wait()
        names = [info.path.name for info in ckpt.checkpoints]
        assert names == ["1", "3"]
        last = flaxckpt.load(ckpt.latest.path)
    assert np.all(np.asarray(last["mu"]) == (3 if save_last else 2))


def loop(ckpt, like):
    def body(carry, index):
        tree, state = carry
        moved = jax.device_put(tree["mu"], DEVICE) + 1
        tree = {"mu": jax.device_put(moved, HOST), "w": tree["w"] + 1}
        loss = jnp.array([3.0, 4.0, 2.0, 5.0], jnp.float32)[index]
        return (tree, ckpt.update(state, tree, {"loss": loss}, index)), None

    return body


@pytest.mark.parametrize("by", ["step", "scan"])
@pytest.mark.parametrize("where", ["one", "eight"])
def test_saved_from_within_jit(tmp_path, where, by):
    tree = {
        "mu": placement("pinned_host", where)(np.zeros((8, 4), np.float32)),
        "w": placement("device", where)(np.zeros(8, np.float32)),
    }
    with ModelCheckpoint(tmp_path / "{epoch}", **BEST) as ckpt:
        carry = tree, ckpt.init(like=tree)
        body = loop(ckpt, tree)
        if by == "scan":
            run = jax.jit(lambda carry: jax.lax.scan(body, carry, jnp.arange(4))[0])
            carry = run(carry)
        else:
            run = jax.jit(body)
            for index in range(4):
                carry, _ = run(carry, jnp.int32(index))
        ckpt.wait()
        assert [info.path.name for info in ckpt.checkpoints] == ["1", "3"]
        found = ckpt.restore(tree, "best")
    want = jax.tree.map(lambda leaf: np.full(leaf.shape, 3, np.float32), tree)
    for name, leaf in found.tree.items():
        assert np.array_equal(leaf, want[name])
        assert leaf.sharding == tree[name].sharding


@pytest.mark.parametrize("traced", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("slots", ["pinned_host", "device"])
@pytest.mark.parametrize("where", ["one", "eight"])
def test_slots_of_a_snapshot(tmp_path, where, slots, traced):
    """Offloaded, or offloaded by the snapshot, or brought back by it."""
    mu = np.arange(8, dtype=np.float32)
    tree = {
        "mu": placement("pinned_host", where)(mu),
        "w": placement("device", where)(mu),
    }
    like = jax.tree.map(placement(slots, where), {"mu": mu, "w": mu})
    snapshot = Snapshot.like(like, {"loss": 0.0}, keep=2)
    take = lambda s, t, loss, epoch: s.take(True, t, {"loss": loss}, epoch)  # noqa: E731
    if traced:
        take = jax.jit(take)
    for epoch, loss in enumerate([3.0, 1.0, 2.0, 9.0]):
        grown = jax.tree.map(lambda x: placement_of(x)(np.asarray(x) + epoch), tree)  # noqa: B023
        snapshot = take(snapshot, grown, jnp.float32(loss), jnp.int32(epoch))
    entries = snapshot.entries()
    assert [kept.epoch for kept in entries] == [1, 2]
    for kept in entries:
        for leaf in jax.tree.leaves(kept.tree):
            assert np.array_equal(leaf, mu + kept.epoch)
            assert leaf.sharding.memory_kind == slots
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        paths = ckpt.save_snapshot(snapshot)
    assert_same_places(flaxckpt.load(paths[0], entries[0].tree), entries[0].tree)


def placement_of(array):
    return functools.partial(jax.device_put, device=array.sharding)


def test_saved_and_restored_by_several_processes(tmp_path):
    said = pod.run(tmp_path, "offload_tree", 2, tmp_path / "run", "pinned_host")
    assert said == [[1, "same"]] * 2


@pytest.mark.parametrize("where", ["one", "eight"])
def test_scan_in_chunks_is_one_scan(where):
    carry = {
        "mu": placement("pinned_host", where)(np.zeros(8, np.float32)),
        "w": placement("device", where)(np.zeros(8, np.float32)),
    }

    def body(carry, x):
        moved = jax.device_put(carry["mu"], DEVICE) + x
        return {"mu": jax.device_put(moved, HOST), "w": carry["w"] + moved}, x

    xs = jnp.arange(5, dtype=jnp.float32)
    whole, _ = jax.lax.scan(body, carry, xs)
    *_, part = flaxckpt.scan_in_chunks(body, carry, xs, chunk=2)
    assert_same_places(part.carry, whole)
    assert not carry["mu"].is_deleted()
