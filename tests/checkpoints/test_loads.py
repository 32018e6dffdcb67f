"""What a load gives is what it says: that very checkpoint, all of its items, no less."""

import json
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp0
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp

import flaxckpt
from flaxckpt._checkpoints import undisturbed
from flaxckpt.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    SettingError,
)

# ---- the record and the tree are of one checkpoint -----------------------------------------


def series(tmp_path):
    return flaxckpt.ModelCheckpoint(tmp_path / "best", weights=lambda tree: tree)


READS = {
    "load": flaxckpt.load,
    "load with a like": lambda which: flaxckpt.load(which, {"w": np.zeros(2)}),
    "load_weights": flaxckpt.load_weights,
    "verify": flaxckpt.verify,
}


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_a_listed_checkpoint_that_was_replaced_is_not_read_as_the_one_listed(
    tmp_path, read
):
    with series(tmp_path) as ckpt:
        ckpt.save({"w": np.zeros(2)}, epoch=0, logs={"val_loss": float("nan")})
        ckpt.wait()
        (listed,) = flaxckpt.list_checkpoints(tmp_path)
        read(listed)
        read(pickle.loads(pickle.dumps(listed)))
        # The same epoch, logs and values: it is another checkpoint all the same.
        ckpt.save({"w": np.zeros(2)}, epoch=0, logs={"val_loss": float("nan")})
        ckpt.wait()
        with pytest.raises(CheckpointNotFoundError, match="was replaced since") as caught:  # fmt: skip
            read(listed)
        assert str(listed.time) in str(caught.value)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
        with pytest.raises(CheckpointNotFoundError, match="was replaced since"):
            ckpt.restore({"w": np.zeros(2)}, which=listed)
        read(listed.path)
        found = ckpt.restore({"w": np.zeros(2)}, which=ckpt.latest)
        assert (found.epoch, found.path) == (0, listed.path)


def test_a_listed_checkpoint_that_is_gone(tmp_path):
    with flaxckpt.ModelCheckpoint(tmp_path / "{epoch}", max_to_keep=1) as ckpt:
        ckpt.save({"w": 1}, epoch=0)
        ckpt.wait()
        (listed,) = ckpt.checkpoints
        ckpt.save({"w": 1}, epoch=1)
    with pytest.raises(CheckpointNotFoundError, match="near it: 2"):
        flaxckpt.load(listed)


def test_a_listed_checkpoint_that_plain_orbax_has_replaced(tmp_path):
    with series(tmp_path) as ckpt:
        ckpt.save({"w": np.zeros(2)}, epoch=0)
    (listed,) = flaxckpt.list_checkpoints(tmp_path)
    ocp.save(tmp_path / "best", {"w": np.ones(2)}, overwrite=True)
    with pytest.raises(CheckpointNotFoundError, match="written by plain Orbax"):
        flaxckpt.load(listed)


@pytest.mark.parametrize("load", [flaxckpt.load, flaxckpt.load_weights])
def test_what_is_loaded_tells_which_it_is(tmp_path, load):
    with series(tmp_path) as ckpt:
        for epoch in range(2):
            ckpt.save({"w": np.full(2, epoch)}, epoch=epoch, logs={"val_loss": 0.5})
            ckpt.wait()
            (listed,) = ckpt.checkpoints
            for which in (listed, listed.path, str(listed.path)):
                loaded = load(which, with_info=True)
                assert isinstance(loaded, flaxckpt.Loaded)
                assert loaded.info == listed
                assert loaded.tree["w"].tolist() == [epoch, epoch]
    ocp.save(tmp_path / "orbax", {"w": np.ones(2)})
    loaded = load(tmp_path / "orbax", with_info=True)
    assert loaded.info is None
    assert loaded.tree["w"].tolist() == [1, 1]


def test_what_is_loaded_from_a_store_tells_which_it_is(gs):
    url = f"{gs}/runs"
    with flaxckpt.ModelCheckpoint(f"{url}/{{epoch}}") as ckpt:
        ckpt.save({"w": np.ones(2)}, epoch=0)
    (listed,) = flaxckpt.list_checkpoints(url)
    assert str(flaxckpt.load(listed, with_info=True).info.path) == f"{url}/1"
    with flaxckpt.ModelCheckpoint(f"{url}/{{epoch}}") as ckpt:
        ckpt.save({"w": np.ones(2)}, epoch=0)
    with pytest.raises(CheckpointNotFoundError, match="was replaced since"):
        flaxckpt.load(listed)


# ---- several items of plain Orbax ----------------------------------------------------------

PARAMS, OPT = {"w": jnp.arange(3.0)}, {"mu": {"w": jnp.full(3, 7.0)}}
STATS, META = {"mean": jnp.full(2, 5.0)}, {"note": "hi", "steps": [1, 2]}
COMPOSITE = {"params": PARAMS, "opt_state": OPT, "batch_stats": STATS}


def by_manager(path, items, metrics=None):
    saves = {
        name: ocp0.args.JsonSave(item) if item is META else ocp0.args.StandardSave(item)
        for name, item in items.items()
    }
    with ocp0.CheckpointManager(path) as manager:
        manager.save(3, args=ocp0.args.Composite(**saves), metrics=metrics)
    return path / "3"


def by_v1(path, items):
    ocp.save_checkpointables(path / "v1", items)
    return path / "v1"


def by_v1_checkpointer(path, items):
    with ocp.training.Checkpointer(path) as checkpointer:
        checkpointer.save_checkpointables(3, dict(items), metrics={"loss": 0.5})
    return path / "3"


WRITERS = [by_manager, by_v1, by_v1_checkpointer]


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("order", [1, -1])
def test_all_items_come_by_their_names(tmp_path, write, order):
    items = dict(list(COMPOSITE.items())[::order])
    path = write(tmp_path, items)
    assert_equal(flaxckpt.load(path), items)
    assert_equal(flaxckpt.load(path, jax.tree.map(jnp.zeros_like, items)), items)
    for name, item in items.items():
        assert_equal(flaxckpt.load(path / name), item)
        assert_equal(flaxckpt.load(path / name, jax.tree.map(jnp.zeros_like, item)), item)  # fmt: skip
    weights = flaxckpt.load_weights(path)
    assert_equal(weights, {"params": PARAMS, "batch_stats": STATS})
    assert_equal(flaxckpt.load_weights(path, weights), weights)
    assert_equal(flaxckpt.load_weights(path / "params"), PARAMS)
    with pytest.raises(CheckpointMismatchError) as caught:
        flaxckpt.load(path, PARAMS)
    assert "It has the items " in str(caught.value)
    assert f"as in load('{path}/" in str(caught.value)
    with pytest.raises(CheckpointNotFoundError):
        flaxckpt.load(path / "other")


def test_json_beside_the_items(tmp_path):
    path = by_manager(tmp_path, {**COMPOSITE, "meta": META}, metrics={"loss": 0.5})
    assert_equal(flaxckpt.load(path), {**COMPOSITE, "meta": META})
    assert flaxckpt.load(path / "meta") == META
    assert "meta" not in flaxckpt.load_weights(path)


@pytest.mark.parametrize("name", ["state", "default", "pytree"])
def test_an_item_of_a_default_name_is_the_checkpoint(tmp_path, name):
    path = by_manager(tmp_path, {"other": OPT, name: PARAMS, "meta": META})
    assert_equal(flaxckpt.load(path), PARAMS)
    assert_equal(flaxckpt.load(path / "other"), OPT)


def test_a_single_item_is_the_checkpoint(tmp_path):
    assert_equal(flaxckpt.load(by_manager(tmp_path, {"params": PARAMS})), PARAMS)


@pytest.mark.parametrize("names", [
    ("model", "optimizer"), ("weights", "opt"), ("params", "optimizer_state"), ("ema", "optim"),
])  # fmt: skip
def test_the_optimizer_is_never_the_weights(tmp_path, names):
    path = by_v1(tmp_path, {names[1]: OPT, names[0]: PARAMS, "rng": {"k": jnp.ones(2)}})
    assert_equal(flaxckpt.load_weights(path), {names[0]: PARAMS})


def test_items_among_which_are_no_weights(tmp_path):
    path = by_v1(tmp_path, {"opt_state": OPT, "metrics_state": STATS, "rng": STATS})
    with pytest.raises(
        CheckpointError, match=r"has no weights among its items: .*opt_s"
    ):
        flaxckpt.load_weights(path)


def with_handler(path, name, handler):
    record = path / "_CHECKPOINT_METADATA"
    fields = json.loads(record.read_text())
    fields["item_handlers"][name] = handler
    record.write_text(json.dumps(fields))


def mixed(path):
    """A tree, a JAX and a numpy key, and what only a class of the user's own reads."""
    saves = {
        "model": ocp0.args.StandardSave(PARAMS),
        "rng": ocp0.args.JaxRandomKeySave(jax.random.key(0)),
        "numpy": ocp0.args.NumpyRandomKeySave(np.random.get_state()),
        "iterator": ocp0.args.JsonSave({"at": 3}),
    }
    with ocp0.CheckpointManager(path) as manager:
        manager.save(3, args=ocp0.args.Composite(**saves))
    (path / "3/iterator/metadata").rename(path / "3/iterator/process_0-of-1.json")
    with_handler(path / "3", "iterator", "grain.checkpoint.Handler")
    return path / "3"


def test_items_that_orbax_cannot_read_are_left_out_and_named(tmp_path):
    path = mixed(tmp_path)
    for load, want in (
        (flaxckpt.load, {"model": PARAMS}),
        (flaxckpt.load_weights, {"model": PARAMS}),
    ):
        with pytest.warns(UserWarning, match="left out") as told:
            assert_equal(load(path), want)
        (warning,) = told
        names = (
            ("numpy",)
            if load is flaxckpt.load_weights
            else ("rng", "numpy", "iterator")
        )
        assert all(name in str(warning.message) for name in names)
        assert f"load('{path}/model')" in str(warning.message)
        assert warning.filename == __file__
    like = {"model": jax.tree.map(jnp.zeros_like, PARAMS)}
    assert_equal(flaxckpt.load(path, like), {"model": PARAMS})  # warnings are errors
    assert_equal(flaxckpt.load(path / "model"), PARAMS)


def test_items_none_of_which_can_be_read(tmp_path):
    path = mixed(tmp_path)
    for ask in (
        lambda: flaxckpt.load(path / "rng"),
        lambda: flaxckpt.load(path, {"rng": jax.random.key(1)}),
    ):
        with pytest.raises(CheckpointError, match=r"cannot read: rng \(.*JaxRandom") as caught:  # fmt: skip
            ask()
        assert not isinstance(caught.value, CheckpointCorruptError)
        assert "damaged" not in str(caught.value)


def test_a_like_has_only_the_items_that_it_names(tmp_path):
    path = by_manager(tmp_path, COMPOSITE)
    for name, item in COMPOSITE.items():
        assert_equal(flaxckpt.load(path, {name: item}), {name: item})


def test_an_item_that_cannot_be_read_is_named(tmp_path):
    path = by_manager(tmp_path, COMPOSITE)
    for file in (path / "batch_stats").iterdir():
        if file.is_file():
            file.unlink()
    with pytest.raises(
        CheckpointCorruptError, match="its item 'batch_stats' cannot be"
    ):
        flaxckpt.load(path)
    assert_equal(flaxckpt.load(path / "params"), PARAMS)


# ---- what is no checkpoint ---------------------------------------------------------------


@pytest.mark.parametrize("below", ["x/y", "x/file", "x/y/z/file", "x/_METADATA.txt"])
def test_a_directory_of_other_things_is_no_checkpoint(tmp_path, monkeypatch, below):
    """Nor is it walked: Orbax takes any directory for one of its own."""
    (tmp_path / below).mkdir(parents=True)
    monkeypatch.setattr(undisturbed, "tries", lambda: iter([1]))
    for read in (flaxckpt.load, flaxckpt.load_weights, flaxckpt.verify):
        with pytest.raises(CheckpointNotFoundError, match="near it: none"):
            read(tmp_path / "x")


def test_the_root_is_no_checkpoint(monkeypatch):
    monkeypatch.setattr(undisturbed, "_names_below", lambda directory, depth: ())
    for path in ("/", "/usr"):
        with pytest.raises(CheckpointNotFoundError, match=f"No checkpoint at '{path}'"):
            flaxckpt.load(path)


@pytest.mark.parametrize("writer", ["ours", "save", "manager"])
def test_of_a_directory_above_checkpoints_they_are_named(tmp_path, writer):
    run = tmp_path / "a/run"
    if writer == "ours":
        with flaxckpt.ModelCheckpoint(run / "{epoch}") as ckpt:
            ckpt.save(PARAMS, 2)
    elif writer == "save":
        ocp.save(run / "3", PARAMS)
    else:
        by_manager(run, COMPOSITE)
    for path, name in ((run, "3"), (tmp_path / "a", "run/3"), (tmp_path, "a/run/3")):
        for read in (flaxckpt.load, flaxckpt.verify):
            with pytest.raises(CheckpointNotFoundError, match=f"near it: {name}"):
                read(path)


def test_a_checkpoint_of_orbax_without_a_tree_is_not_damaged(tmp_path):
    path = by_manager(tmp_path, {"meta": META})
    with pytest.raises(CheckpointError, match="holds no tree of arrays") as caught:
        flaxckpt.load(path)
    assert not isinstance(caught.value, CheckpointCorruptError)
    assert f"load('{path}/meta')" in str(caught.value)
    assert flaxckpt.load(path / "meta") == META


@pytest.mark.parametrize("settings", [{}, {"use_ocdbt": False}, {"use_zarr3": True}])
@pytest.mark.parametrize("without", [(), ("_CHECKPOINT_METADATA",)])
def test_a_tree_that_a_bare_handler_wrote(tmp_path, settings, without):
    path = tmp_path / "tree"
    handler = ocp0.PyTreeCheckpointHandler(**settings)
    with ocp0.Checkpointer(handler) as checkpointer:
        checkpointer.save(path, args=ocp0.args.PyTreeSave(PARAMS))
    for name in without:
        (path / name).unlink()
    assert_equal(flaxckpt.load(path), PARAMS)


# ---- nothing to save -----------------------------------------------------------------------


class Empty(nnx.Module):
    def __init__(self):
        self.rngs = nnx.Rngs(0)


NOTHING = {
    "None": None,
    "dict": {},
    "nested": {"a": [], "b": (None, {})},
    "filter": nnx.state(Empty(), nnx.Param),
    "equinox": eqx.filter(eqx.nn.Identity(), eqx.is_array),
    "static": eqx.nn.Lambda(jax.nn.relu),
}


@pytest.mark.parametrize("tree", NOTHING.values(), ids=NOTHING.keys())
@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("call", ["save", "update", "jit"])
def test_nothing_is_not_saved(tmp_path, tree, weights_only, call):
    with flaxckpt.ModelCheckpoint(
        tmp_path / "run/{epoch}", save_weights_only=weights_only
    ) as ckpt:
        with pytest.raises(SettingError, match=r"holds? no array, number or text"):
            if call == "save":
                ckpt.save(tree, epoch=0)
            elif call == "update":
                ckpt.update(ckpt.init(), tree, {}, 0)
            else:
                jax.jit(lambda state: ckpt.update(state, tree, {}, 0))(ckpt.init())
        assert not (tmp_path / "run").exists()
        ckpt.save({"params": {"w": 1}}, epoch=0)  # and it goes on
    assert len(ckpt.checkpoints) == 1


@pytest.mark.parametrize("weights", [None, lambda tree: {}, lambda tree: None])
def test_weights_of_which_there_are_none(tmp_path, weights):
    with flaxckpt.ModelCheckpoint(
        tmp_path / "{epoch}", save_weights_only=True, weights=weights
    ) as ckpt:
        with pytest.raises(SettingError, match="these are the weights of the tree"):
            ckpt.save(Empty(), epoch=0)
        assert ckpt.checkpoints == ()


def test_arrays_without_elements_are_something(tmp_path):
    with flaxckpt.ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        path = ckpt.save({"w": np.zeros((0, 3)), "none": None}, epoch=0)
    assert flaxckpt.load(path)["w"].shape == (0, 3)
