"""Safetensors files: read as trees, and written so that other libraries read them."""

import functools
import json
import os
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.flax
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from saved_trees import assert_same, bits_of, saved

import flaxckpt
from flaxckpt._files import safetensors as room
from flaxckpt.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointPathError,
    CheckpointWriteError,
    SettingError,
    UnsupportedLeafError,
)

DTYPES = [
    "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "float16", "float32",
    "bfloat16", "complex64", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2",
    "float8_e5m2fnuz", "float8_e8m0fnu",
]  # fmt: skip


def tree():
    return {
        "encoder": {
            "kernel": jnp.arange(32.0).reshape(8, 4),
            "bias": jnp.arange(4, dtype=jnp.bfloat16),
        },
        "layers": [jnp.ones((2, 3), jnp.int8), jnp.zeros((0, 3))],
        "scale": jnp.float32(2),
    }


def tree_with_dicts():
    return {**tree(), "layers": dict(zip("01", tree()["layers"], strict=True))}


@pytest.fixture
def file(tmp_path):
    return flaxckpt.export(saved(tmp_path / "runs", tree()), tmp_path / "m.safetensors")


def header_of(file):
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size])


def test_an_export_is_what_the_library_for_flax_reads(file):
    loaded = safetensors.flax.load_file(file)
    assert sorted(loaded) == [
        "encoder.bias", "encoder.kernel", "layers.0", "layers.1", "scale",
    ]  # fmt: skip
    assert_same([loaded[name] for name in sorted(loaded)], jax.tree.leaves(tree()))
    # transformers reads no file that does not say this.
    assert header_of(file)["__metadata__"] == {"format": "flax"}


def test_an_export_loads_with_and_without_like(file):
    assert_same(flaxckpt.load(file, tree()), tree())
    assert_same(flaxckpt.load(file), tree_with_dicts())
    assert_same(flaxckpt.load_weights(file), tree_with_dicts())


@pytest.mark.parametrize("name", ["plain", "m.safetensors"])
def test_a_file_of_the_library_for_flax_loads(tmp_path, name):
    file = tmp_path / name
    flat = {
        "a.b.c": jnp.arange(3.0),
        "a.d": jnp.ones((), jnp.bfloat16),
        "": jnp.ones(1),
    }
    safetensors.flax.save_file(dict(flat), file)
    loaded = flaxckpt.load(str(file))
    assert_same(
        loaded, {"": flat[""], "a": {"b": {"c": flat["a.b.c"]}, "d": flat["a.d"]}}
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_survives(tmp_path, dtype):
    value = np.arange(6).reshape(3, 2).astype(jnp.dtype(dtype))
    kept = {"t": value.T, "s": value[:1, 0].reshape(()), "x": jnp.asarray(value)}
    file = flaxckpt.export(saved(tmp_path, kept), tmp_path / "m.safetensors")
    for name, array in flaxckpt.load(file).items():
        assert isinstance(array, jax.Array)
        assert bits_of(np.asarray(array)) == bits_of(np.asarray(kept[name]))
    assert_same(flaxckpt.load(file, kept), kept)
    with safetensors.safe_open(file, "np") as opened:  # the header is right
        assert opened.get_slice("t").get_shape() == [2, 3]


def test_arrays_of_64_bits_are_never_cut(tmp_path):
    file = tmp_path / "m.safetensors"
    flat = {"a.i": np.array([2**40]), "a.f": np.array([0.1])}
    safetensors.numpy.save_file(flat, file)
    loaded = flaxckpt.load(file)
    assert_same(loaded, {"a": {"i": flat["a.i"], "f": flat["a.f"]}})
    loaded["a"]["f"][0] = 1  # it is the caller's own
    with jax.enable_x64(True):
        assert all(
            isinstance(each, jax.Array) for each in flaxckpt.load(file)["a"].values()
        )
    with pytest.raises(CheckpointMismatchError, match="a/f"):
        flaxckpt.load(file, {"a": {"f": jnp.zeros(1), "i": flat["a.i"]}})
    cast = flaxckpt.load(file, {"a": {"f": jnp.zeros(1), "i": flat["a.i"]}}, cast=True)
    assert cast["a"]["f"].dtype == jnp.float32


def test_what_differs_is_named(file):
    like = tree_with_dicts() | {"scale": jnp.zeros(2), "more": jnp.zeros(1)}
    with pytest.raises(CheckpointMismatchError) as caught:
        flaxckpt.load(file, like)
    assert {each.path for each in caught.value.differences} == {"scale", "more"}
    assert caught.value.path == str(file)


def test_keys_with_dots_come_back_if_like_has_them(tmp_path):
    flat = {"model.0.w": jnp.arange(3.0), "model.0": {"b": jnp.ones(2)}}
    file = flaxckpt.export(saved(tmp_path, flat), tmp_path / "m.safetensors")
    assert set(safetensors.flax.load_file(file)) == {"model.0.w", "model.0.b"}
    assert_same(flaxckpt.load(file, flat), flat)
    nested = {"model": {"0": {"b": jnp.ones(2), "w": jnp.arange(3.0)}}}
    assert_same(flaxckpt.load(file), nested)
    assert_same(flaxckpt.load(file, nested), nested)


def test_names_that_begin_others_are_not_split(tmp_path):
    for flat in ({"a.b": 1, "a": 2, "c.d": 3}, {"a": 2, "a.b": 1, "c.d": 3}):
        flat = {name: jnp.int32(number) for name, number in flat.items()}
        safetensors.flax.save_file(dict(flat), tmp_path / "m.safetensors")
        assert_same(flaxckpt.load(tmp_path / "m.safetensors"), flat)
        again = flaxckpt.export(tmp_path / "m.safetensors", tmp_path / "n.safetensors",
                                overwrite=True)  # fmt: skip
        assert_same(safetensors.flax.load_file(again), flat)


# Shards


def export_in_shards(tmp_path, limit=100, **settings):
    return flaxckpt.export(
        saved(tmp_path / "runs", tree()),
        tmp_path / "out" / "model.safetensors",
        max_shard_bytes=limit,
        **settings,
    )


def test_shards_are_those_of_hugging_face(tmp_path):
    index = export_in_shards(tmp_path)
    directory = index.parent
    assert index == tmp_path / "out" / "model.safetensors.index.json"
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(os.listdir(directory)) == [*names, index.name]
    fields = json.loads(index.read_text())
    assert fields["metadata"] == {"total_size": 8 + 128 + 6 + 0 + 4}
    assert fields["weight_map"] == {
        "encoder.bias": names[0],
        "encoder.kernel": names[1],  # larger than the limit: alone
        "layers.0": names[2],
        "layers.1": names[2],
        "scale": names[2],
    }
    for name in names:
        held = safetensors.flax.load_file(directory / name)
        assert {each for each, at in fields["weight_map"].items() if at == name} == {
            *held
        }
    for path in (index, directory, directory / "model.safetensors"):
        assert_same(flaxckpt.load(path, tree()), tree())
        assert_same(flaxckpt.load_weights(path), tree_with_dicts())


def test_what_fits_is_one_file(tmp_path):
    assert export_in_shards(tmp_path, 146).name == "model.safetensors"
    assert_same(flaxckpt.load(tmp_path / "out"), tree_with_dicts())


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "5GB"])
def test_a_limit_is_a_number_of_bytes(tmp_path, limit):
    with pytest.raises(SettingError, match="max_shard_bytes"):
        export_in_shards(tmp_path, limit)


def test_an_export_takes_no_file_s_place_unless_told(tmp_path):
    index = export_in_shards(tmp_path)
    with pytest.raises(CheckpointPathError, match=r"index\.json.*overwrite=True"):
        export_in_shards(tmp_path)
    with pytest.raises(CheckpointPathError, match="overwrite=True"):
        export_in_shards(tmp_path, None)
    single = export_in_shards(tmp_path, None, overwrite=True)
    assert os.listdir(index.parent) == [single.name]
    assert export_in_shards(tmp_path, overwrite=True) == index
    assert len(os.listdir(index.parent)) == 4


def test_an_interrupted_replacement_never_mixes_two_exports(tmp_path, monkeypatch):
    """At each of its file operations the export ends; there is one export, or none."""
    other = jax.tree.map(lambda leaf: leaf + leaf, tree())
    path = saved(tmp_path / "other", other)
    target = tmp_path / "out" / "model.safetensors"
    seen = set()
    for new_limit in (100, None):
        for ends_at in range(20):
            export_in_shards(tmp_path, overwrite=True)
            left = ends_at

            def counted(call):
                def run(*arguments, **named):
                    nonlocal left
                    if left == 0:
                        raise KeyboardInterrupt
                    left -= 1
                    return call(*arguments, **named)

                return run

            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", counted(os.replace))
                patch.setattr(type(target), "unlink", counted(type(target).unlink))
                try:
                    flaxckpt.export(
                        path, target, max_shard_bytes=new_limit, overwrite=True
                    )
                except KeyboardInterrupt:
                    pass
                else:
                    break
            try:
                loaded = flaxckpt.load(target, tree())
            except CheckpointNotFoundError:
                seen.add("none")
                continue
            is_new = bool(loaded["scale"] == other["scale"])
            assert_same(loaded, other if is_new else tree())
            seen.add(is_new)
        assert ends_at > 2
        assert_same(flaxckpt.load(target, tree()), other)
    assert seen == {"none", False, True}
    assert not [each for each in os.listdir(target.parent) if each.startswith(".")]


def test_a_read_begins_again_if_the_shards_are_replaced(tmp_path, monkeypatch):
    index = export_in_shards(tmp_path)
    other = jax.tree.map(lambda leaf: leaf + leaf, tree())
    path = saved(tmp_path / "other", other)
    arrays_in, calls = room._arrays_in, []

    def replaced_meanwhile(shard):
        calls.append(shard.name)
        if len(calls) == 2:
            flaxckpt.export(path, index.parent / "model.safetensors",
                            max_shard_bytes=100, overwrite=True)  # fmt: skip
        return arrays_in(shard)

    monkeypatch.setattr(room, "_arrays_in", replaced_meanwhile)
    assert_same(flaxckpt.load(index, tree()), other)
    assert len(calls) == 6


# Many devices


def test_each_device_reads_its_part(file, monkeypatch):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    parts = []
    part = room._part

    def noted(content, described, at):
        value = part(content, described, at)
        parts.append(value.shape)
        return value

    monkeypatch.setattr(room, "_part", noted)
    place = functools.partial(NamedSharding, mesh)
    like = jax.tree.map(lambda leaf: leaf, tree())
    like["encoder"]["kernel"] = jax.ShapeDtypeStruct(
        (8, 4), jnp.float32, sharding=place(P("x", "y"))
    )
    loaded = flaxckpt.load(file, like)
    assert_same(loaded, tree())
    assert loaded["encoder"]["kernel"].sharding == place(P("x", "y"))
    assert parts.count((2, 2)) == 8
    assert (8, 4) not in parts
    everywhere = flaxckpt.load(file, place(P()))
    assert everywhere["encoder"]["kernel"].sharding == place(P())
    like["encoder"]["kernel"] = jax.ShapeDtypeStruct(
        (8, 4), jnp.float16, sharding=place(P("x", "y"))
    )
    cast = flaxckpt.load(file, like, cast=True)["encoder"]["kernel"]
    assert cast.dtype == jnp.float16
    assert cast.sharding == place(P("x", "y"))
    assert np.array_equal(cast, tree()["encoder"]["kernel"])


# Damage


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_a_truncated_file_is_damaged(file, keep):
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointCorruptError, match=re.escape(str(file))):
        flaxckpt.load(file, tree())


def test_a_file_of_something_else_is_damaged(file):
    file.write_bytes(b"not at all" * 100)
    with pytest.raises(CheckpointCorruptError, match=re.escape(str(file))):
        flaxckpt.load(file)


def test_a_fifo_does_not_keep_the_program_waiting(tmp_path):
    os.mkfifo(tmp_path / "m.safetensors")
    with pytest.raises(CheckpointNotFoundError):
        flaxckpt.load(tmp_path / "m.safetensors")


def test_a_lacking_shard_is_named(tmp_path):
    index = export_in_shards(tmp_path)
    shard = index.parent / "model-00002-of-00003.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(CheckpointCorruptError, match="model-00002"):
        flaxckpt.load(index)
    shard.write_bytes((index.parent / "model-00001-of-00003.safetensors").read_bytes())
    with pytest.raises(CheckpointCorruptError, match=r"encoder\.kernel is missing"):
        flaxckpt.load(index)
    shard.unlink()
    with pytest.raises(CheckpointCorruptError, match="model-00002"):
        flaxckpt.load(index.parent)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}',
     '{"weight_map": {"a": "../m.safetensors"}}',
     '{"weight_map": {"a": "/m.safetensors"}}'],
)  # fmt: skip
def test_a_wrong_index_is_damaged(file, text):
    directory = file.parent / "inner"
    directory.mkdir()
    index = directory / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(CheckpointCorruptError, match=re.escape(str(index))):
        flaxckpt.load(directory)


def test_a_dtype_that_jax_lacks_is_named(tmp_path):
    content = json.dumps({"a.x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}})
    file = tmp_path / "m.safetensors"
    file.write_bytes(len(content).to_bytes(8, "little") + content.encode() + b"\0")
    with pytest.raises(CheckpointError, match=r"a\.x \(F4 of safetensors\)"):
        flaxckpt.load(file)


def test_no_file_is_not_found_and_others_are_named(file):
    with pytest.raises(CheckpointNotFoundError, match=r"near it: .*m\.safetensors"):
        flaxckpt.load(file.with_name("n.safetensors"))


# What cannot be written


def test_what_the_format_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    held = {
        "key": jax.random.key(0),
        "complex": np.zeros(2, np.complex128),
        "number": 1j,
        "text": "x",
        "bytes": b"x",
        "large": 2**70,
        "int4": jnp.zeros(2, jnp.int4),
        "fine": jnp.zeros(2),
        "a.b": jnp.zeros(2),
        "a": {"b": jnp.zeros(2)},
        "__metadata__": jnp.zeros(1),
    }
    path = saved(tmp_path / "runs", held)
    with pytest.raises(UnsupportedLeafError) as caught:
        flaxckpt.export(path, tmp_path / "out" / "m.safetensors", weights_only=False)
    assert {name for name, _ in caught.value.leaves} == {*held} - {"fine", "a"}
    assert "exported" in str(caught.value)
    assert "has the name 'a.b', as has a/b" in str(caught.value)
    assert os.listdir(tmp_path / "out") == []
    with pytest.raises(UnsupportedLeafError, match="no name"):
        flaxckpt.export(
            saved(tmp_path / "bare", jnp.ones(2)), tmp_path / "m.safetensors"
        )


def test_numbers_become_scalar_arrays_and_come_back(tmp_path):
    held = {"step": 3, "rate": 0.1, "is_on": True, "w": np.float32(2)}
    path = saved(tmp_path / "runs", held)
    file = flaxckpt.export(path, tmp_path / "m.safetensors")
    assert safetensors.numpy.load_file(file)["rate"] == np.float64(0.1)
    assert_same(flaxckpt.load(file, held), held)


def test_a_full_disk_is_an_error_that_says_so(tmp_path, monkeypatch):
    def full(*_):
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    path = saved(tmp_path / "runs", tree())
    with pytest.raises(CheckpointWriteError, match="No space left"):
        flaxckpt.export(path, tmp_path / "out" / "m.safetensors")
    assert os.listdir(tmp_path / "out") == []


def test_a_missing_library_is_named_with_its_extra(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    install = re.escape("pip install '.[safetensors]'")
    with pytest.raises(CheckpointError, match=install):
        flaxckpt.load(file)
    with pytest.raises(CheckpointError, match=install):
        flaxckpt.export(file, file.with_name("n.safetensors"))
