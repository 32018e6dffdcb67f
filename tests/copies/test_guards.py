"""JAX's debugging checks judge the user's programs, and not flaxckpt's copies."""

import contextlib
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from never_ready import take_metrics_for_unknown
from saved_trees import assert_same

import flaxckpt
from flaxckpt import ModelCheckpoint, Snapshot

FULL = os.environ.get("FLAXCKPT_FAULTS") == "full"
AUTO = (jax.sharding.AxisType.Auto,)
BEST = {"save_best_only": True, "monitor": "loss"}
FLOATS = ("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2")
COMPLEX = ("complex64", "complex128")


@contextlib.contextmanager
def all_checked(check):
    """Have all of the process checked, as a program that sets the flag has."""
    checks = {"nans": ["jax_debug_nans"], "infs": ["jax_debug_infs"],
              "both": ["jax_debug_nans", "jax_debug_infs"]}[check]  # fmt: skip
    for name in checks:
        jax.config.update(name, True)
    try:
        yield
    finally:
        for name in checks:
            jax.config.update(name, False)


def holding(value, sharding=None):
    """Return a tree of small and large arrays of all dtypes that hold a value."""
    with jax.enable_x64(True):
        names = [
            n for n in (*FLOATS, *COMPLEX) if np.isnan(value) or n != "float8_e4m3fn"
        ]
        arrays = {
            f"{name} {size}": np.full((8, size), value).astype(jnp.dtype(name))
            for name in names
            for size in (1, 40000)
        }
        return jax.tree.map(lambda x: jax.device_put(x, sharding), arrays)


def sharding_of(where):
    if where == "one":
        return SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(jax.make_mesh((8,), ("x",), axis_types=AUTO), P("x"))


@pytest.mark.parametrize("copy", ["auto", "host", "none"])
@pytest.mark.parametrize("where", ["one", "eight"])
@pytest.mark.parametrize("check", ["nans", "infs"])
def test_a_tree_with_them_is_saved_and_loaded(tmp_path, check, where, copy):
    value = np.nan if check == "nans" else -np.inf
    tree = holding(value, sharding_of(where))
    with (
        all_checked(check),
        ModelCheckpoint(tmp_path / "{epoch}", snapshot=copy) as ckpt,
    ):
        state = ckpt.init()
        for epoch in range(2):
            state = ckpt.update(state, tree, {"loss": jnp.float32(1)}, epoch)
        ckpt.wait()
        with jax.enable_x64(True):
            for epoch in range(2):
                path = tmp_path / f"{epoch + 1}"
                assert_same(flaxckpt.load(path, tree), tree)
                flaxckpt.load(path)
                flaxckpt.verify(path)
            wide = {name: np.zeros(x.shape, np.complex128) for name, x in tree.items()}
            wide = jax.tree.map(jnp.asarray, wide)
            found = ckpt.restore(wide, cast=True).tree
        for leaf in jax.tree.leaves(found):
            assert not np.isfinite(np.asarray(leaf)).any()


@pytest.mark.parametrize("check", ["nans", "infs"])
def test_a_metric_that_a_device_computes_decides(tmp_path, monkeypatch, check):
    take_metrics_for_unknown(monkeypatch)
    bad = np.nan if check == "nans" else np.inf
    tree = {"w": jax.device_put(np.full(8, bad, np.float32))}
    losses = jax.device_put([np.float32(x) for x in (bad, 3.0, bad, 1.0)])
    with all_checked(check), ModelCheckpoint(tmp_path / "{epoch}", **BEST) as ckpt:
        state = ckpt.init()
        for epoch, loss in enumerate(losses):
            state = ckpt.update(state, tree, {"loss": loss}, epoch)
        ckpt.wait()
        names = [info.path.name for info in ckpt.checkpoints]
    assert names == (["2", "4"] if check == "nans" else ["1", "2", "4"])


@pytest.mark.parametrize("check", ["nans", "infs"])
def test_a_scan_in_chunks_begins_with_them(check):
    bad = np.nan if check == "nans" else -np.inf
    carry = {"seen": jax.device_put(np.full(8, bad, np.float32)), "n": 0}
    body = lambda carry, x: ({"seen": jnp.ones(8), "n": carry["n"] + 1}, x)  # noqa: E731
    with all_checked(check):
        parts = list(flaxckpt.scan_in_chunks(body, carry, jnp.arange(5), chunk=2))
    assert int(parts[-1].carry["n"]) == 5


def test_the_users_own_programs_are_judged_all_the_same(tmp_path):
    """After each call, and in the body of a scan, as before it."""
    bad = jax.jit(lambda x: x / 0.0)
    tree = {"w": jax.device_put(np.full(8, np.nan, np.float32))}
    with all_checked("both"), ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        calls = [
            lambda: ckpt.save(tree, 0),
            ckpt.wait,
            lambda: ckpt.restore(tree),
            lambda: Snapshot.like(tree, {"loss": 1.0}),
        ]
        for call in calls:
            call()
            for one in (0.0, 1.0):
                with pytest.raises(FloatingPointError):
                    bad(jnp.float32(one))
        zero, body = jnp.float32(0), lambda carry, x: (carry / 0.0, x)
        with pytest.raises(FloatingPointError):
            next(flaxckpt.scan_in_chunks(body, zero, jnp.arange(4.0), chunk=2))


def test_checks_compile_nothing_anew(tmp_path, monkeypatch):
    tree = {"w": jnp.ones((8, 40000)), "v": jnp.ones(3)}
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        for epoch in range(2):
            ckpt.save(tree, epoch)
            ckpt.wait()
        compiled = []
        monkeypatch.setattr(
            jax._src.compiler, "compile_or_get_cached",
            lambda *args, **kwargs: compiled.append(args),
        )  # fmt: skip
        with all_checked("both"), jax.transfer_guard("disallow"):
            ckpt.save(tree, 2)
            ckpt.wait()
    assert not compiled


# ---- transfers -----------------------------------------------------------------------

GUARDS = {
    "all": jax.transfer_guard,
    "to the device": jax.transfer_guard_host_to_device,
    "between devices": jax.transfer_guard_device_to_device,
    "to the host": jax.transfer_guard_device_to_host,
}


@contextlib.contextmanager
def guarded(guard):
    """Refuse implicit transfers; in this thread, or in all with "everywhere"."""
    if guard != "everywhere":
        with GUARDS[guard]("disallow"):
            yield
        return
    jax.config.update("jax_transfer_guard", "disallow")
    try:
        yield
    finally:
        jax.config.update("jax_transfer_guard", "allow")
        for name in ("host_to_device", "device_to_device", "device_to_host"):
            jax.config.update(f"jax_transfer_guard_{name}", None)


def make_tree(where):
    sharding = sharding_of(where)
    place = lambda value: jax.device_put(value, sharding)  # noqa: E731
    replicated = sharding if where == "one" else NamedSharding(sharding.mesh, P())
    return {
        "w": place(np.ones((8, 4), np.float32)),
        "small": [place(np.full(8, i, np.float32)) for i in range(5)],
        "count": jax.device_put(np.int32(3), replicated),
        "key": jax.device_put(jax.random.key(1), replicated),
        "keys": jax.random.split(jax.random.key(1), 3),
        "plain key": jax.random.PRNGKey(0),
        "host": np.arange(3),
        "number": 1.5,
    }


@pytest.fixture(params=["one", "eight"])
def where(request):
    return request.param


@pytest.fixture(params=[*GUARDS, "everywhere"] if FULL else ["all", "everywhere"])
def guard(request):
    return request.param


def test_guarded_saves_and_loads(tmp_path, where, guard):
    tree = make_tree(where)
    losses = jax.device_put([np.float32(x) for x in (3, 2, 5, 1)])
    best = {**BEST, "save_last": True, "weights": lambda tree: tree}
    with guarded(guard), ModelCheckpoint(tmp_path / "{epoch}", **best) as ckpt:
        state = ckpt.init(like=tree)
        for epoch, loss in enumerate(losses):
            state = ckpt.update(state, tree, {"loss": loss}, epoch)
        path = ckpt.save(tree, 9, logs={"loss": losses[0]}, state=state)
        ckpt.wait()
        flaxckpt.verify(path)
        plain = flaxckpt.load(path)
        found = ckpt.restore(tree)
        flaxckpt.load_weights(path, tree)
        structs = jax.tree.map(
            lambda x: (
                jax.ShapeDtypeStruct(x.shape, x.dtype)
                if isinstance(x, jax.Array)
                else x
            ),
            tree,
        )
        assert_same(flaxckpt.load(path, structs), plain)
    assert_same(found.tree, tree)
    assert_same(plain, tree)
    assert [info.path.name for info in ckpt.checkpoints] == ["1", "2", "4", "10"]


@pytest.mark.parametrize("copy", ["auto", "host", "none"])
def test_guarded_copies(tmp_path, where, copy):
    tree = make_tree(where)
    with guarded("everywhere"), ModelCheckpoint(tmp_path / "a", snapshot=copy) as ckpt:
        for epoch in range(2):
            ckpt.save(tree, epoch)
    assert_same(flaxckpt.load(tmp_path / "a", tree), tree)


def test_guarded_programs_take_the_states_of_all_calls(tmp_path, where, guard):
    """Of `init`, of `update` with values of the host, and of `restore`."""
    tree = {"w": make_tree(where)["w"]}

    @jax.jit
    def train(tree, state, loss, epoch):
        tree = {"w": tree["w"] + 1}
        return tree, ckpt.update(state, tree, {"loss": loss}, epoch)

    places = tree["w"].sharding
    if where == "eight":
        places = NamedSharding(places.mesh, P())
    put = lambda value: jax.device_put(value, places)  # noqa: E731
    losses = [put(np.float32(x)) for x in (4, 3, 2, 1)]
    epochs = [put(np.int32(x)) for x in range(4)]
    with guarded(guard), ModelCheckpoint(tmp_path / "{epoch}", **BEST) as ckpt:
        tree, state = train(tree, ckpt.init(like=tree), losses[0], epochs[0])
        state = ckpt.update(state, tree, {"loss": 3.0}, 1)
        tree, state = train(tree, state, losses[2], epochs[2])
        ckpt.wait()
        found = ckpt.restore(tree)
        tree, state = train(found.tree, found.state, losses[3], epochs[3])
        ckpt.wait()
        assert [info.path.name for info in ckpt.checkpoints] == ["1", "2", "3", "4"]
        assert float(jax.device_get(state.best)) == 1.0


def test_guarded_counters(tmp_path, guard):
    """A check by batches, of a state that a program has returned."""
    with guarded(guard), ModelCheckpoint(tmp_path / "{batch}", save_freq=2) as ckpt:
        state = jax.jit(lambda state: state)(ckpt.init())
        for batch in range(4):
            state = ckpt.update(state, {"w": np.ones(2)}, None, 0, batch)
        ckpt.wait()
        assert [info.path.name for info in ckpt.checkpoints] == ["2", "4"]


def test_guarded_decisions_alone(guard):
    state = flaxckpt.CheckpointState.create("loss", save_best_only=True)
    losses = jax.device_put([np.float32(x) for x in (3, 4, 1)])
    with guarded(guard):
        saves = []
        for epoch, loss in enumerate(losses):
            state, save = flaxckpt.step(state, {"loss": loss}, epoch)
            saves.append(bool(jax.device_get(save)))
    assert saves == [True, False, True]


@pytest.mark.parametrize("traced", [True, False], ids=["jit", "eager"])
def test_guarded_slots(tmp_path, guard, traced):
    tree = {"w": jax.device_put(np.ones(3, np.float32)), "key": jax.random.key(0)}
    take = lambda s, t, loss, epoch: s.take(True, t, {"loss": loss}, epoch)  # noqa: E731
    if traced:
        take = jax.jit(take)
    with guarded(guard), ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        snapshot = Snapshot.like(tree, {"loss": 0.0}, keep=2)
        for epoch, loss in enumerate(jax.device_put([np.float32(2), np.float32(1)])):
            snapshot = take(snapshot, tree, loss, jax.device_put(np.int32(epoch)))
        paths = ckpt.save_snapshot(snapshot)
        ckpt.wait()
        assert [path.name for path in paths] == ["1", "2"]


def test_guarded_members_of_an_ensemble(tmp_path, guard):
    trees = {"w": jax.device_put(np.ones((2, 3), np.float32))}
    losses = jax.device_put(np.array([1, 2], np.float32))
    with guarded(guard), ModelCheckpoint(tmp_path / "{member}") as ckpt:
        take = lambda tree, loss: Snapshot.like(tree, {"loss": loss}).take(  # noqa: E731
            True, tree, {"loss": loss}, 0
        )
        snapshot = jax.jit(jax.vmap(take))(trees, losses)
        for member in range(2):
            ckpt.save_snapshot(snapshot, member=member)
        ckpt.wait()


def test_guarded_chunks(where, guard):
    tree = {"w": make_tree(where)["w"]}
    body = lambda carry, x: ({"w": carry["w"] + x, "n": carry["n"] + 1}, x)  # noqa: E731
    for xs in (np.arange(5, dtype=np.float32), jnp.arange(5, dtype=np.float32)):
        with guarded(guard):
            carry = {**tree, "n": 0}
            *_, last = flaxckpt.scan_in_chunks(body, carry, xs, chunk=2)
        assert int(last.carry["n"]) == 5
        assert np.all(np.asarray(last.carry["w"]) == 11)
