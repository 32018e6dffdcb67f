"""Exports in every format: what is exported comes back, from any checkpoint."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from multiprocess import pod
from orbax.checkpoint import v1 as ocp
from saved_trees import assert_same, saved

import flaxckpt
from flaxckpt._files import formats
from flaxckpt.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointPathError,
    SettingError,
    UnsupportedLeafError,
)

SUFFIXES = [".safetensors", ".npz", ".msgpack"]
SEPARATORS = {".safetensors": ".", ".npz": "/"}


# Round trips

dtypes = st.sampled_from(
    ["bool", "int8", "uint16", "int32", "float16", "float32", "bfloat16",
     "float8_e4m3fn", "complex64"]
)  # fmt: skip
keys = st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), max_size=4
) | st.sampled_from(["a", "a.b", "a/b", "b", ".", "/", "%2E", "0", "file"])


@st.composite
def arrays(draw):
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    dtype = jnp.dtype(draw(dtypes))
    nbytes = int(np.prod(shape, dtype=int)) * dtype.itemsize
    content = draw(st.binary(min_size=nbytes, max_size=nbytes))
    value = np.frombuffer(content, dtype).reshape(shape)
    if dtype == np.bool_:
        value = np.frombuffer(content, np.uint8).reshape(shape) > 127
    return jnp.asarray(value)


trees = st.dictionaries(
    keys,
    st.recursive(
        arrays(),
        lambda below: (
            st.dictionaries(keys, below, min_size=1, max_size=3)
            | st.lists(below, min_size=1, max_size=3)
        ),
        max_leaves=6,
    ),
    min_size=1,
    max_size=3,
)


def names_of(tree, separator):
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    key = lambda entry: str(getattr(entry, "key", getattr(entry, "idx", None)))  # noqa: E731
    return [separator.join(map(key, path)) for path, _ in paths]


@hypothesis.settings(max_examples=20)
@hypothesis.given(tree=trees)
def test_every_tree_comes_back(tmp_path_factory, tree):
    directory = tmp_path_factory.mktemp("any")
    path = saved(directory / "runs", tree)
    for suffix in SUFFIXES:
        _check_format(path, tree, directory / f"m{suffix}")


def _check_format(path, tree, file):
    separator = SEPARATORS.get(file.suffix)
    names = names_of(tree, separator) if separator else []
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}
    collide = len({*names}) < len(names)
    are_lost = file.suffix == ".npz" and dtypes & {"bfloat16", "float8_e4m3fn"}
    if collide or are_lost:
        with pytest.raises(UnsupportedLeafError):
            flaxckpt.export(path, file, weights_only=False)
        assert not file.exists()
        return
    flaxckpt.export(path, file, weights_only=False)
    assert_same(flaxckpt.load(file, tree), tree)
    if separator:  # without `like`, the keys of the tree make the same names
        assert sorted(names_of(flaxckpt.load(file), separator)) == sorted(names)
        again = file.with_stem("n")
        flaxckpt.export(file, again, weights_only=False)
        assert_same(flaxckpt.load(again, tree), tree)


# Where from


def test_a_listed_checkpoint_is_exported_only_while_it_is_there(tmp_path):
    saved(tmp_path / "runs", {"w": jnp.ones(2)})
    (info,) = flaxckpt.list_checkpoints(tmp_path / "runs")
    file = flaxckpt.export(info, tmp_path / "m.npz")
    assert_same(flaxckpt.load(file), {"w": jnp.ones(2)})
    with flaxckpt.ModelCheckpoint(tmp_path / "runs" / "{epoch}") as ckpt:
        ckpt.save({"w": jnp.zeros(2)}, epoch=0)
    with pytest.raises(CheckpointNotFoundError, match="was replaced"):
        flaxckpt.export(info, tmp_path / "n.npz")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damage_is_found_before_anything_has_the_name(tmp_path, suffix):
    path = saved(tmp_path / "runs", {"w": jnp.arange(2.0**20)})
    (largest,) = [
        file
        for file in path.rglob("*")
        if file.is_file() and file.stat().st_size >= 2**22
    ]
    content = bytearray(largest.read_bytes())
    content[2**21] ^= 1
    largest.write_bytes(content)
    with pytest.raises(CheckpointCorruptError, match="w"):
        flaxckpt.export(path, tmp_path / "out" / f"m{suffix}")
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_plain_orbax_s_weights_are_exported(tmp_path, suffix):
    tree = {"params": {"w": jnp.ones(2)}, "opt_state": {"m": jnp.zeros(2)}}
    ocp.save(tmp_path / "plain", tree)
    file = flaxckpt.export(tmp_path / "plain", tmp_path / f"m{suffix}")
    assert_same(flaxckpt.load(file), {"params": tree["params"]})


def test_a_checkpoint_in_a_store_is_exported(gs, tmp_path):
    tree = {"w": jnp.ones(2)}
    with flaxckpt.ModelCheckpoint(f"{gs}/{{epoch}}") as ckpt:
        ckpt.save(tree, epoch=0)
    file = flaxckpt.export(f"{gs}/1", tmp_path / "m.safetensors")
    assert_same(flaxckpt.load(file), tree)
    with pytest.raises(CheckpointPathError, match="copy it to a disk"):
        flaxckpt.load(f"{gs}/m.safetensors")


def test_one_of_several_processes_exports_what_all_have_saved(tmp_path):
    said = pod.run(tmp_path, "export_by_one", 2, tmp_path / "run", ".safetensors",
                   script="exporting.py")  # fmt: skip
    assert said == [["same"]] * 2
    loaded = flaxckpt.load(tmp_path / "run" / "m.safetensors")
    w = jnp.arange(64, dtype=jnp.float32).reshape(8, 8)
    half = jnp.arange(8, dtype=jnp.bfloat16)
    assert_same(loaded, {"half": half, "same": jnp.arange(3), "w": w})


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(3, 2, rngs=rngs)
        self.head = nnx.Linear(2, 3, rngs=rngs)
        self.out = self.embed


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_module_comes_back_with_its_parts_shared(tmp_path, suffix):
    model, other = Tied(nnx.Rngs(0)), Tied(nnx.Rngs(1))
    file = flaxckpt.export(saved(tmp_path / "runs", model), tmp_path / f"m{suffix}")
    plain = flaxckpt.load(file)
    assert set(plain) == {"embed", "head"}  # what is shared has its first name
    loaded = flaxckpt.load(file, other)
    assert loaded.out is loaded.embed
    assert_same(nnx.state(loaded), nnx.state(model))
    nnx.update(other, plain)
    assert_same(nnx.state(other), nnx.state(model))


def test_functions_are_left_out(tmp_path):
    path = saved(tmp_path / "runs", {"f": jnp.tanh, "w": jnp.ones(2)})
    for suffix in SUFFIXES:
        file = flaxckpt.export(path, tmp_path / f"m{suffix}", weights_only=False)
        loaded = flaxckpt.load(file)
        assert loaded.pop("f", None) is None
        assert_same(loaded, {"w": jnp.ones(2)})


def test_weights_that_were_computed_are_not_there(tmp_path):
    path = saved(tmp_path / "runs", {"w": jnp.ones(2)},
                 weights=lambda tree: {"w": tree["w"] * 2})  # fmt: skip
    with pytest.raises(CheckpointError, match="computed"):
        flaxckpt.export(path, tmp_path / "m.npz")
    flaxckpt.export(path, tmp_path / "m.npz", weights_only=False)


# Where to


@pytest.mark.parametrize("name", ["m", "m.pt", "m.safetensors.index.json", "m.npz.bak"])
def test_the_suffix_names_the_format(tmp_path, name):
    with pytest.raises(SettingError, match=r"\.safetensors or \.npz or \.msgpack"):
        flaxckpt.export("no/matter", tmp_path / name)


def test_a_target_is_a_path_on_a_disk():
    with pytest.raises(CheckpointPathError, match="Export to a disk"):
        flaxckpt.export("no/matter", "gs://bucket/m.npz")
    with pytest.raises(SettingError, match="to="):
        flaxckpt.export("no/matter", {"w": 1})


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nothing_is_replaced_unless_told(tmp_path, suffix):
    file = tmp_path / f"m{suffix}"
    path = saved(tmp_path / "runs", {"w": jnp.ones(2)})
    file.write_bytes(b"precious")
    with pytest.raises(CheckpointPathError, match="overwrite=True"):
        flaxckpt.export(path, file)
    assert file.read_bytes() == b"precious"
    flaxckpt.export(path, file, overwrite=True)
    assert_same(flaxckpt.load(file), {"w": jnp.ones(2)})


def test_a_file_that_appears_meanwhile_stays(tmp_path, monkeypatch):
    file, write = tmp_path / "m.npz", formats.write

    def write_late(*arguments):
        write(*arguments)
        file.write_bytes(b"precious")

    monkeypatch.setattr(formats, "write", write_late)
    with pytest.raises(CheckpointPathError, match="overwrite=True"):
        flaxckpt.export(saved(tmp_path / "runs", {"w": jnp.ones(2)}), file)
    assert file.read_bytes() == b"precious"


def test_a_name_of_a_checkpoint_is_a_checkpoint(tmp_path):
    with flaxckpt.ModelCheckpoint(tmp_path / "best.keras") as ckpt:
        path = ckpt.save({"w": jnp.ones(2)}, epoch=0)
    assert_same(flaxckpt.load(path), {"w": jnp.ones(2)})


# What else reads a file


def test_an_object_restores_from_a_file(tmp_path):
    tree = {"w": jnp.ones(2)}
    file = flaxckpt.export(saved(tmp_path / "old", tree), tmp_path / "m.npz")
    with flaxckpt.ModelCheckpoint(tmp_path / "new" / "{epoch}") as ckpt:
        assert_same(ckpt.restore(tree, which=file).tree, tree)


def test_a_file_has_no_digests_and_no_record(tmp_path):
    file = flaxckpt.export(saved(tmp_path, {"w": jnp.ones(2)}), tmp_path / "m.npz")
    assert flaxckpt.load(file, with_info=True).info is None
    with pytest.raises(CheckpointError, match="another library, which records no"):
        flaxckpt.verify(file)


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + ".npz", "a\0b.npz"])
def test_what_no_file_can_be_named_is_not_found(tmp_path, name):
    with pytest.raises(CheckpointNotFoundError):
        flaxckpt.load(tmp_path / name)


def test_a_file_of_no_known_kind_is_no_checkpoint(tmp_path):
    for content in (b"", b"some text", bytes(100)):
        (tmp_path / "plain").write_bytes(content)
        with pytest.raises(CheckpointNotFoundError):
            flaxckpt.load(tmp_path / "plain")


@pytest.mark.parametrize("depth", [150, 450, 900, 5000])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_tree_deeper_than_python_reads_is_damage(tmp_path, suffix, depth):
    file = tmp_path / f"m{suffix}"
    if suffix == ".msgpack":
        file.write_bytes(b"\x81\xa1a" * depth + b"\x01")
    elif suffix == ".npz":
        np.savez(file, **{"/".join("a" * depth): np.ones(1)})
    else:
        safetensors.numpy.save_file({".".join("a" * depth): np.ones(1)}, file)
    with pytest.raises(CheckpointCorruptError, match=r"deep|[Rr]ecursion|Stack"):
        flaxckpt.load(file)


def test_what_differs_is_named_for_every_format(tmp_path):
    path = saved(tmp_path / "runs", {"a": {"w": jnp.ones(2)}})
    for suffix in SUFFIXES:
        file = flaxckpt.export(path, tmp_path / f"m{suffix}")
        with pytest.raises(CheckpointMismatchError, match=r"a/w.*wanted float32\[3\]"):
            flaxckpt.load(file, {"a": {"w": jnp.ones(3)}})


def test_no_other_library_is_loaded_than_the_one_in_need(tmp_path):
    np.savez(tmp_path / "m.npz", w=np.ones(2, np.float32))
    code = f"""
        import sys
        import flaxckpt
        from flaxckpt._files import formats
        flaxckpt.load({str(tmp_path / "m.npz")!r})
        flaxckpt.export({str(tmp_path / "m.npz")!r}, {str(tmp_path / "n.npz")!r})
        print(*({{"flax", "keras", "h5py", "safetensors"}} & {{*sys.modules}}))
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(flaxckpt.__file__).parents[1])}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        check=True, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert result.stdout.strip() == ""
