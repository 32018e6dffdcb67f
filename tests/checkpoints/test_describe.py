"""`describe` tells what a checkpoint holds, from its small files alone."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import flaxckpt
from flaxckpt import CheckpointCorruptError, CheckpointNotFoundError, ModelCheckpoint


def tree_of(mesh):
    sharded = NamedSharding(mesh, PartitionSpec("x", ("y",)))
    return {
        "params": {"w": jax.device_put(jnp.ones((8, 4)), sharded), "b": jnp.ones(3)},
        "opt_state": (np.zeros(2), 3),
        "key": jax.random.key(0),
        "name": "run",
    }


@pytest.fixture
def tree():
    return tree_of(jax.make_mesh((4, 2), ("x", "y")))


def rows(path):
    return {
        leaf.name: (leaf.kind, str(leaf), leaf.nbytes, leaf.is_weight)
        for leaf in flaxckpt.describe(path).leaves
    }


def test_each_leaf_with_its_form_and_sharding(tmp_path, tree):
    with ModelCheckpoint(tmp_path / "{epoch}", "loss") as ckpt:
        for epoch in range(2):  # Orbax writes the first one, flaxckpt the second
            path = ckpt.save(tree, epoch=epoch, logs={"loss": 0.5})
    expected = {
        "key": ("key", "key<fry>[]", 16, False),
        "name": ("str", "str", 16, False),
        "opt_state/0": ("numpy", "float64[2]", 16, False),
        "opt_state/1": ("int", "int", 16, False),
        "params/b": ("jax", "float32[3]", 12, True),
        "params/w": ("jax", "float32[8,4]", 128, True),
    }
    assert rows(tmp_path / "1") == rows(path) == expected
    found = flaxckpt.describe(path)
    shardings = {leaf.name: leaf.sharding for leaf in found.leaves}
    assert shardings["params/w"] == "P('x', 'y') on x=4, y=2"
    assert "cpu" in shardings["params/b"].lower()
    assert found.info.logs == {"loss": 0.5}
    assert found.versions["jax"] == jax.__version__
    assert found.nbytes == sum(each[2] for each in expected.values())
    text = str(found)
    assert "6 leaves" in text
    assert "epoch 1, loss=0.5" in text
    assert "params/w" in text
    assert "float32[8,4]" in text
    assert flaxckpt.describe(ckpt.latest).leaves == found.leaves


def test_no_value_is_read(tmp_path):
    with ModelCheckpoint(tmp_path / "x") as ckpt:
        path = ckpt.save({"w": jnp.ones(2**19)}, epoch=0)
    for file in path.rglob("*"):
        if file.is_file() and file.stat().st_size > 2**20:
            file.unlink()
    assert rows(path) == {"w": ("jax", "float32[524288]", 2**21, True)}


def test_plain_orbax_s(tmp_path, tree):
    del tree["key"], tree["name"]
    with v0.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "x", tree)
    found = flaxckpt.describe(tmp_path / "x")
    assert rows(tmp_path / "x")["params/w"] == ("array", "float32[8,4]", 128, None)
    assert {leaf.name: leaf.sharding for leaf in found.leaves}["params/w"] == (
        "P('x', 'y') on x=4, y=2"
    )
    assert (found.info, found.versions) == (None, {})
    with v0.CheckpointManager(tmp_path / "m") as manager:
        items = {"model": v0.args.StandardSave(tree["params"]),
                 "more": v0.args.StandardSave({"z": jnp.ones(2)})}  # fmt: skip
        manager.save(3, args=v0.args.Composite(**items))
        manager.wait_until_finished()
    assert set(rows(tmp_path / "m/3")) == {"model/w", "model/b", "more/z"}
    assert set(rows(tmp_path / "m/3/model")) == {"w", "b"}


def test_files_of_other_libraries(tmp_path):
    with ModelCheckpoint(tmp_path / "x") as ckpt:
        path = ckpt.save({"params": {"w": jnp.ones((2, 3))}, "step": 1}, epoch=0)
    for name in ("x.npz", "x.safetensors", "x.msgpack"):
        file = flaxckpt.export(path, tmp_path / name)
        found = flaxckpt.describe(file)
        assert [(x.name, str(x), x.is_weight) for x in found.leaves] == [
            ("params/w", "float32[2,3]", None)
        ]
        assert found.info is None


def test_errors(tmp_path):
    with ModelCheckpoint(tmp_path / "x") as ckpt:
        path = ckpt.save({"w": jnp.ones(3)}, epoch=0)
    with pytest.raises(CheckpointNotFoundError):
        flaxckpt.describe(tmp_path / "y")
    (path / "state/_sharding").unlink()  # which only plain Orbax needs
    assert flaxckpt.describe(path).leaves[0].sharding == ""
    shutil.copytree(path, tmp_path / "z")
    (tmp_path / "z/flaxckpt_leaves.json").write_text("{}")
    with pytest.raises(CheckpointCorruptError):
        flaxckpt.describe(tmp_path / "z")
    with v0.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "p", {"w": jnp.ones(3)})
    (tmp_path / "p/_METADATA").write_text("{")
    with pytest.raises(CheckpointCorruptError):
        flaxckpt.describe(tmp_path / "p")


def test_in_a_store(url):
    with ModelCheckpoint(f"{url}/x") as ckpt:
        path = ckpt.save({"w": jnp.ones(3)}, epoch=0)
    found = flaxckpt.describe(path)
    assert str(found.path) == str(path)
    assert "cpu" in found.leaves[0].sharding.lower()
