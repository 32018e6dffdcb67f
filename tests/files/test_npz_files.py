"""numpy's `.npz` files, read as trees and written."""

import pickle
import re
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from saved_trees import assert_same, saved

import flaxckpt
from flaxckpt.errors import (
    CheckpointCorruptError,
    CheckpointError,
    SettingError,
    UnsupportedLeafError,
)


def tree():
    return {
        "params": {"w": jnp.arange(6.0).reshape(2, 3), "file": jnp.ones((), jnp.int8)},
        "opt_state": [jnp.zeros(3), np.arange(999.0)],
    }


@pytest.fixture
def file(tmp_path):
    path = saved(tmp_path / "runs", tree())
    return flaxckpt.export(path, tmp_path / "m.npz", weights_only=False)


def test_an_export_is_what_numpy_reads(file):
    with np.load(file) as loaded:
        assert sorted(loaded) == [
            "opt_state/0", "opt_state/1", "params/file", "params/w",
        ]  # fmt: skip
        leaves = [loaded[name] for name in sorted(loaded)]
    assert_same(leaves, list(map(np.asarray, jax.tree.leaves(tree()))))


def test_an_export_loads_with_and_without_like(file):
    assert_same(flaxckpt.load(file, tree()), tree())
    opt_state = dict(zip("01", tree()["opt_state"], strict=True))
    assert_same(flaxckpt.load(file), {**tree(), "opt_state": opt_state})
    assert_same(flaxckpt.load_weights(file), {"params": tree()["params"]})


@pytest.mark.parametrize("name", ["m.npz", "plain"])
@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_a_file_of_numpy_loads(tmp_path, name, write):
    w = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    with open(tmp_path / name, "wb") as out:
        write(out, **{"a/w": w.T, "a/big": w.astype(">f4"), "n": np.int64(7)})
    loaded = flaxckpt.load(tmp_path / name)
    assert_same(
        loaded, {"a": {"w": jnp.asarray(w.T), "big": jnp.asarray(w)}, "n": np.array(7)}
    )


def test_names_that_begin_others_are_not_split(tmp_path):
    for names in (["a/b", "a", "c/d"], ["a", "a/b", "c/d"]):
        flat = {name: np.float32(len(name)) for name in names}
        np.savez(tmp_path / "m.npz", **flat)
        loaded = flaxckpt.load(tmp_path / "m.npz")
        assert_same(loaded, {name: jnp.asarray(each) for name, each in flat.items()})


def test_an_array_in_another_order_becomes_another_format(tmp_path):
    w = np.arange(6.0).reshape(2, 3).T
    np.savez(tmp_path / "m.npz", w=w, big=w.astype(">f4"))
    for suffix in (".safetensors", ".msgpack", ".npz"):
        file = flaxckpt.export(tmp_path / "m.npz", tmp_path / f"n{suffix}")
        loaded = flaxckpt.load(file)
        assert np.array_equal(loaded["w"], w)
        assert_same(loaded["big"], jnp.asarray(w, jnp.float32))


def test_a_slash_in_a_key_comes_back_if_like_has_it(tmp_path):
    haiku = {"mlp/~/linear": {"w": jnp.ones(2)}}
    file = flaxckpt.export(saved(tmp_path, haiku), tmp_path / "m.npz")
    assert_same(flaxckpt.load(file, haiku), haiku)
    assert_same(flaxckpt.load(file), {"mlp": {"~": {"linear": {"w": jnp.ones(2)}}}})


def test_it_goes_to_many_devices(file):
    mesh = Mesh(np.array(jax.devices()[:2]), "x")
    like = tree()
    sharding = NamedSharding(mesh, P("x"))
    like["params"]["w"] = jax.device_put(like["params"]["w"], sharding)
    loaded = flaxckpt.load(file, like)
    assert_same(loaded, tree())
    assert loaded["params"]["w"].sharding == sharding


def test_only_what_is_asked_for_is_read(file):
    """What nobody reads may be damaged."""
    with zipfile.ZipFile(file) as members:
        member = members.getinfo("opt_state/1.npy")
    content = bytearray(file.read_bytes())
    content[member.header_offset + member.file_size] ^= 1  # one of the last values
    file.write_bytes(content)
    assert_same(flaxckpt.load_weights(file), {"params": tree()["params"]})
    with pytest.raises(CheckpointCorruptError, match=re.escape(str(file))):
        flaxckpt.load(file)


def test_nothing_is_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("unpickled",)

    with pytest.raises(pytest.fail.Exception):
        pickle.loads(pickle.dumps(Trap()))
    np.savez(tmp_path / "m.npz", trap=np.array([Trap()], dtype=object))
    with pytest.raises(CheckpointError, match=r"trap \(object\)"):
        flaxckpt.load(tmp_path / "m.npz")


def test_a_dtype_that_numpy_has_lost_is_named(tmp_path):
    np.savez(tmp_path / "m.npz", w=np.ones(2, jnp.bfloat16), t=np.array(["text"]))
    with pytest.raises(CheckpointError, match=r"w \(void16\), t \(str128\)"):
        flaxckpt.load(tmp_path / "m.npz")


def test_what_numpy_would_lose_is_refused(tmp_path):
    held = {
        "w": jnp.ones(2, jnp.bfloat16), "i": jnp.ones(2, jnp.int4), "k": "text",
        "a\0b": jnp.ones(2), "ok": np.ones(2, np.complex128), "n": 1j,
    }  # fmt: skip
    path = saved(tmp_path / "runs", held)
    with pytest.raises(UnsupportedLeafError) as caught:
        flaxckpt.export(path, tmp_path / "m.npz")
    assert {name for name, _ in caught.value.leaves} == {"w", "i", "k", "a\0b"}
    assert ".safetensors" in str(caught.value)
    with pytest.raises(SettingError, match="max_shard_bytes"):
        flaxckpt.export(path, tmp_path / "m.npz", max_shard_bytes=10)


@pytest.mark.parametrize("keep", [0, 30, 300, -1])
def test_a_truncated_file_is_damaged(file, keep):
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointCorruptError, match=re.escape(str(file))):
        flaxckpt.load(file)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000,)}",
        "{",
        "1" * 60,
    ],
)
def test_a_wrong_header_is_damaged(tmp_path, header):
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
    with zipfile.ZipFile(tmp_path / "m.npz", "w") as members:
        members.writestr("w.npy", content + bytes(8))
    with pytest.raises(CheckpointCorruptError, match=r"m\.npz"):
        flaxckpt.load(tmp_path / "m.npz")


def test_a_zip_file_of_something_else_is_damaged(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.npz", "w") as members:
        members.writestr("w.txt", "text")
    with pytest.raises(CheckpointCorruptError, match=r"m\.npz"):
        flaxckpt.load(tmp_path / "m.npz")
