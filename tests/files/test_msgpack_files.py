"""Flax's msgpack files, read as trees and written so that Flax reads them."""

import re
import sys

import flax
import flax.serialization
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import optax
import pytest
from flax.training import checkpoints
from flax.training.train_state import TrainState
from saved_trees import assert_same, saved

import flaxckpt
from flaxckpt.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    UnsupportedLeafError,
)

TX = optax.adam(0.1)


def train_state(scale=1.0):
    params = {"dense": {"w": scale * jnp.arange(6.0), "b": jnp.ones(2, jnp.bfloat16)}}
    return TrainState.create(apply_fn=None, params=params, tx=TX).replace(
        step=int(scale)
    )


@pytest.fixture
def checkpoint(tmp_path):
    flax.config.update("flax_use_orbax_checkpointing", False)
    try:
        path = checkpoints.save_checkpoint(tmp_path, train_state(5.0), 7)
    finally:
        flax.config.update("flax_use_orbax_checkpointing", True)
    return path


def test_a_checkpoint_of_flax_training_loads(checkpoint):
    state = train_state(5.0)
    assert_same(flaxckpt.load(checkpoint, train_state()), state)
    loaded = flaxckpt.load(checkpoint)
    assert loaded["step"] == 5
    assert_same(loaded["params"], state.params)
    assert set(loaded["opt_state"]) == {"0", "1"}
    assert_same(flaxckpt.load_weights(checkpoint), {"params": state.params})
    with pytest.raises(CheckpointMismatchError, match="params/dense/w"):
        flaxckpt.load(checkpoint, train_state().replace(params={"dense": {}}))


def test_one_that_orbax_wrote_for_flax_loads(tmp_path):
    path = checkpoints.save_checkpoint(tmp_path, train_state(5.0), 7)
    assert_same(flaxckpt.load(path, train_state()), train_state(5.0))


def test_an_export_is_what_flax_reads(tmp_path):
    path = saved(tmp_path / "runs", train_state(5.0))
    file = flaxckpt.export(path, tmp_path / "m.msgpack", weights_only=False)
    loaded = flax.serialization.from_bytes(train_state(), file.read_bytes())
    assert jax.tree.structure(loaded) == jax.tree.structure(train_state())
    for one, other in zip(
        *map(jax.tree.leaves, (loaded, train_state(5.0))), strict=True
    ):
        assert np.asarray(one).dtype == np.asarray(other).dtype
        assert np.array_equal(one, other)
    assert_same(flaxckpt.load(file, train_state()), train_state(5.0))
    weights = flaxckpt.export(path, tmp_path / "w.msgpack")
    assert_same(
        flax.serialization.msgpack_restore(weights.read_bytes()),
        {"params": jax.tree.map(np.asarray, train_state(5.0).params)},
    )


def test_all_kinds_of_values_survive(tmp_path):
    held = {
        "int": 2**40, "float": 0.1, "bool": True, "complex": 1 + 2j, "none": None,
        "text": "ä", "bytes": b"\xff", "scalar": np.float32(2), "empty": {},
        "float8": jnp.ones(3, jnp.float8_e5m2), "int4": jnp.ones(3, jnp.int4),
        "wide": np.arange(3.0), "list": [jnp.zeros((0, 2)), (1, 2)],
    }  # fmt: skip
    file = flaxckpt.export(
        saved(tmp_path, held), tmp_path / "m.msgpack", weights_only=False
    )
    assert_same(flaxckpt.load(file, held), held)
    lists = {"0": held["list"][0], "1": {"0": 1, "1": 2}}
    assert_same(flaxckpt.load(file), {**held, "list": lists})
    flaxckpt.load(file)["wide"][0] = 1  # it is the caller's own


def test_an_array_alone_survives(tmp_path):
    file = flaxckpt.export(saved(tmp_path, jnp.ones(2)), tmp_path / "m.msgpack")
    assert_same(flaxckpt.load(file), jnp.ones(2))


def test_what_the_format_cannot_hold_is_refused(tmp_path):
    held = {"key": jax.random.key(0), "large": 2**70, "text": "\ud800", "fine": 1}
    path = saved(tmp_path / "runs", held)
    with pytest.raises(UnsupportedLeafError) as caught:
        flaxckpt.export(path, tmp_path / "m.msgpack", weights_only=False)
    assert {name for name, _ in caught.value.leaves} == {"key", "large", "text"}


def test_arrays_of_several_processes_are_with_flax(tmp_path):
    placeholder = {"w": "//GDAPlaceholder:w"}
    content = flax.serialization.msgpack_serialize(placeholder)
    (tmp_path / "checkpoint_3").write_bytes(content)
    with pytest.raises(CheckpointError, match="checkpoint_3_gda"):
        flaxckpt.load(tmp_path / "checkpoint_3")


@pytest.mark.parametrize("keep", [0, 1, 50, -1])
def test_a_truncated_file_is_damaged(checkpoint, tmp_path, keep):
    file = tmp_path / "m.msgpack"
    with open(checkpoint, "rb") as whole:
        file.write_bytes(whole.read()[:keep])
    with pytest.raises(CheckpointCorruptError, match=re.escape(str(file))):
        flaxckpt.load(file)


@pytest.mark.parametrize(
    "tree",
    [{"w": msgpack.ExtType(1, b"")}, {"w": msgpack.ExtType(1, msgpack.packb([[2], "f4", b""]))},
     {"__msgpack_chunked_array__": 1}],
)  # fmt: skip
def test_wrong_values_are_damage(tmp_path, tree):
    (tmp_path / "m.msgpack").write_bytes(msgpack.packb(tree))
    with pytest.raises(CheckpointCorruptError, match=r"m\.msgpack"):
        flaxckpt.load(tmp_path / "m.msgpack")


def test_values_that_are_not_loaded_are_named(tmp_path):
    tree = {"a": {"w": msgpack.Timestamp(0)}}
    (tmp_path / "m.msgpack").write_bytes(msgpack.packb(tree))
    with pytest.raises(UnsupportedLeafError, match="a/w"):
        flaxckpt.load(tmp_path / "m.msgpack")


def test_a_missing_library_is_named_with_its_extra(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flax.serialization", None)
    install = re.escape("pip install '.[flax]'")
    with pytest.raises(CheckpointError, match=install):
        flaxckpt.load(checkpoint)
    path = saved(tmp_path / "runs", {"w": jnp.ones(2)})
    with pytest.raises(CheckpointError, match=install):
        flaxckpt.export(path, tmp_path / "m.msgpack")
