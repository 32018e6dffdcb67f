"""Keras's weights, read as trees."""

import re
import sys

import h5py
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from saved_trees import assert_same, saved

import flaxckpt
from flaxckpt.errors import CheckpointCorruptError, CheckpointError, SettingError


@pytest.fixture(scope="module", autouse=True)
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def model():
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(2, dtype="bfloat16"),
        ]
    )
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def layers_of(model):
    """The tree of a model's variables, as its file names them."""
    return {
        "layers": {
            layer.name: {
                "vars": {str(i): v.value for i, v in enumerate(layer.variables)}
            }
            for layer in model.layers
        }
    }


@pytest.fixture
def file(model, tmp_path):
    model.save_weights(tmp_path / "m.weights.h5")
    return tmp_path / "m.weights.h5"


def renamed(tree):
    """Number the layers as the file does, from 0 for each class."""
    return {
        "layers": {
            name: tree["layers"][layer]
            for name, layer in zip(
                ["dense", "batch_normalization", "dense_1"], tree["layers"], strict=True
            )
        }
    }


def test_weights_load_under_the_names_of_the_file(model, file):
    weights = renamed(layers_of(model))
    assert_same(flaxckpt.load_weights(file), weights)
    assert_same(flaxckpt.load_weights(file, weights), weights)
    assert (
        flaxckpt.load_weights(file)["layers"]["dense_1"]["vars"]["0"].dtype
        == "bfloat16"
    )
    assert set(flaxckpt.load(file)) == {"layers", "optimizer"}


def test_a_whole_model_s_weights_load_too(model, file, tmp_path):
    model.save(tmp_path / "m.keras")
    assert_same(flaxckpt.load(tmp_path / "m.keras"), flaxckpt.load(file))
    (tmp_path / "m.keras").rename(tmp_path / "plain")
    assert_same(flaxckpt.load(tmp_path / "plain"), flaxckpt.load(file))


def test_a_name_without_a_suffix_loads(file):
    weights = flaxckpt.load(file)
    file.rename(file.with_name("plain"))
    assert_same(flaxckpt.load(file.with_name("plain")), weights)


def test_it_goes_to_many_devices(model, file):
    mesh = Mesh(np.array(jax.devices()[:4]), "x")
    weights = renamed(layers_of(model))
    sharding = NamedSharding(mesh, P(None, "x"))
    like = jax.tree.map(lambda leaf: leaf, weights)
    kernel = like["layers"]["dense"]["vars"]["0"]
    like["layers"]["dense"]["vars"]["0"] = jax.device_put(kernel, sharding)
    loaded = flaxckpt.load_weights(file, like)
    assert_same(loaded, weights)
    assert loaded["layers"]["dense"]["vars"]["0"].sharding == sharding


def test_the_bytes_of_numbers_may_be_in_any_order(file):
    values = np.arange(4, dtype=np.float32)
    with h5py.File(file, "w") as other:
        other["x"] = values.astype(">f4")
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:4]), "x"), P("x"))
    for like in (None, {"x": jax.device_put(values, sharding)}):
        assert_same(flaxckpt.load(file, like), {"x": jnp.asarray(values)})


def test_weights_of_keras_become_another_format(model, file, tmp_path):
    exported = flaxckpt.export(file, tmp_path / "m.safetensors")
    assert_same(flaxckpt.load(exported), renamed(layers_of(model)))


@pytest.mark.parametrize("name", ["m.weights.h5", "m.keras", "m.h5"])
def test_only_keras_writes_them(tmp_path, name):
    path = saved(tmp_path / "runs", {"w": jnp.ones(2)})
    with pytest.raises(SettingError, match=r"model\.save_weights"):
        flaxckpt.export(path, tmp_path / name)


@pytest.mark.parametrize("keep", [0, 10, 5000, -1])
def test_a_truncated_file_is_damaged(file, keep):
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointCorruptError, match=re.escape(str(file))):
        flaxckpt.load(file)


def test_no_other_file_is_opened(file):
    """A file from somebody else must not bring in what this user can read."""
    with h5py.File(file.with_name("other.h5"), "w") as other:
        other["secret"] = np.ones(2)
    layout = h5py.VirtualLayout((2,), "f8")
    layout[:] = h5py.VirtualSource("other.h5", "secret", (2,))

    def external(group):
        group["x"] = h5py.ExternalLink("other.h5", "secret")

    def soft(group):
        group["x"] = h5py.SoftLink("/layers")

    def virtual(group):
        group.create_virtual_dataset("x", layout)

    def outside(group):
        group.create_dataset("x", (2,), "f8", external=[("other.h5", 0, 16)])

    for add in (external, soft, virtual, outside):
        with h5py.File(file, "w") as damaged:
            add(damaged.create_group("layers"))
        with pytest.raises(CheckpointCorruptError, match="layers/x is no array"):
            flaxckpt.load(file)


def test_a_missing_library_is_named_with_its_extra(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(CheckpointError, match=re.escape("pip install '.[keras]'")):
        flaxckpt.load(file)
