"""Plain Orbax, v1 and v0, reads what was saved in each way."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1
from saved_trees import bits_of, structs_of

import flaxckpt
from flaxckpt import ModelCheckpoint
from flaxckpt._checkpoints import write as _write
from flaxckpt._orbax import engine as _engine

WAYS = {
    "direct": {"engine": "auto"},
    "by Orbax": {"engine": "orbax"},
    "compressed": {"compress": True},
    "linked": {"frozen": lambda path, leaf: path[0] == "base", "engine": "auto"},
}


def tree_of(epoch):
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    spread = NamedSharding(mesh, PartitionSpec("x", "y"))
    return {
        "base": jnp.arange(6.0),
        "w": jax.device_put(jnp.full((8, 4), epoch, jnp.float32), spread),
        "half": jnp.full(5, epoch, jnp.bfloat16),
        "host": np.arange(3) + epoch,
        "key": jax.random.key(epoch),
        "layers": [{"b": jnp.full(2, epoch)}, {"b": jnp.zeros(2)}],
        "n": epoch,
    }


def plain(tree):
    """Return bits and dtype of each leaf, by its path in dicts and lists."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): bits_of(leaf)[1:] for path, leaf in leaves}


@pytest.mark.parametrize("large", [False, True], ids=["database", "files"])
@pytest.mark.parametrize("way", WAYS)
def test_plain_orbax_reads_it(tmp_path, monkeypatch, way, large):
    monkeypatch.setattr(_write, "_LARGE_LEAF", 0 if large else 2**40)
    with ModelCheckpoint(tmp_path / "{epoch}", **WAYS[way]) as ckpt:
        for epoch in range(3):
            path = ckpt.save(tree_of(epoch), epoch)
            ckpt.wait()
    assert ckpt.counts.direct == (2 if way in ("direct", "linked") else 0)
    tree = tree_of(2)
    like = structs_of(tree)
    assert plain(v1.load(path)) == plain(tree)
    assert plain(v1.load(path, like)) == plain(tree)
    with v0.StandardCheckpointer() as reader:
        assert plain(reader.restore(path / "state", like)) == plain(tree)
        assert plain(reader.restore(path / "state")) == plain(tree)


def zarr2(saving):
    saving.use_zarr3 = False


def small_chunks(saving):
    saving.storage_options.chunk_byte_size = 16


def small_files(saving):
    saving.ocdbt_target_data_file_size = 64


def no_metadata_of_arrays(saving):
    saving.array_metadata_store = None


def replicas_apart(saving):
    saving.enable_replica_parallel_separate_folder = True


@pytest.mark.parametrize("large", [False, True], ids=["database", "files"])
@pytest.mark.parametrize(
    "change", [zarr2, small_chunks, small_files, no_metadata_of_arrays, replicas_apart]
)
def test_what_another_orbax_would_write_is_saved_and_read(
    tmp_path, monkeypatch, change, large
):
    monkeypatch.setattr(_write, "_LARGE_LEAF", 0 if large else 2**40)
    original = _engine.orbax_context

    def changed(**options):
        context = original(**options)
        change(context.array.saving)
        return context

    monkeypatch.setattr(_engine, "orbax_context", changed)
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        for epoch in range(3):
            ckpt.save(tree_of(epoch), epoch)
            ckpt.wait()
        assert ckpt.counts.saved == ckpt.counts.by_orbax + ckpt.counts.direct == 3
        if change is zarr2:
            assert ckpt.counts.direct == 0
        assert plain(ckpt.restore(tree_of(0)).tree) == plain(tree_of(2))
    monkeypatch.undo()
    for info in ckpt.checkpoints:
        flaxckpt.verify(info.path)
        assert plain(flaxckpt.load(info.path)) == plain(tree_of(info.epoch))
        assert plain(v1.load(info.path)) == plain(tree_of(info.epoch))
