"""Frozen leaves: one copy on disk, whole checkpoints, and no trust in "frozen"."""

import json
import os
import shutil
import threading

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

import flaxckpt
from flaxckpt import ModelCheckpoint, SettingError
from flaxckpt._checkpoints import finish as _finish
from flaxckpt._checkpoints import series_writer as _series_writer
from flaxckpt._disk.record import encode_record, read_record
from flaxckpt._trees.digest import digests


def tree_of(base=0, lora=0):
    return {
        "base": jnp.full((64, 32), base, jnp.float32),
        "emb": np.full(100, base, np.float32),
        "lora": jnp.full(8, lora, jnp.float32),
        "step": lora,
    }


def is_frozen(path, leaf):
    return path[0] in ("base", "emb")


def opened(directory, **settings):
    settings = {"frozen": is_frozen, "sync": False, **settings}
    return ModelCheckpoint(directory / "{epoch}", "loss", **settings)


def inodes(path, name):
    """The files that hold a leaf's values."""
    return {file.stat().st_ino for file in data_files(path / "state" / name)}


def data_files(directory):
    files = [file for file in directory.rglob("*") if file.is_file()]
    return [file for file in files if file.name != "zarr.json"]


def assert_holds(path, base, lora):
    flaxckpt.verify(path)
    for tree in (flaxckpt.load(path), ocp.load(path)):
        for name, value in tree_of(base, lora).items():
            assert np.array_equal(tree[name], value), name


def test_stored_once_and_each_checkpoint_whole(tmp_path):
    tree = tree_of()
    with opened(tmp_path) as ckpt:
        paths = [
            ckpt.save({**tree, "lora": tree_of(0, i)["lora"], "step": i}, i)
            for i in range(4)
        ]
        ckpt.wait()
        counts = ckpt.counts
    for name in ("base", "emb"):
        assert len({frozenset(inodes(path, name)) for path in paths}) == 1
    assert len({frozenset(inodes(path, "lora")) for path in paths}) == 4
    assert counts.linked_bytes >= 3 * (64 * 32 + 100) * 4
    for i, path in enumerate(paths):
        assert_holds(path, 0, i)
    shutil.rmtree(paths[0])
    shutil.rmtree(paths[2])
    assert_holds(paths[1], 0, 1)
    assert_holds(paths[3], 0, 3)


def test_a_leaf_that_changes_is_written_again(tmp_path):
    with opened(tmp_path) as ckpt:
        paths = [ckpt.save(tree_of(i // 2, i), i) for i in range(6)]
    for i, path in enumerate(paths):
        assert_holds(path, i // 2, i)
    assert inodes(paths[2], "base") == inodes(paths[3], "base")
    assert inodes(paths[1], "base") != inodes(paths[2], "base")


def test_a_loop_that_donates_all(tmp_path):
    """The arrays are others in each step; their values are not."""
    train = jax.jit(lambda tree: {**tree, "lora": tree["lora"] + 1}, donate_argnums=0)
    tree = {"base": jnp.ones((64, 32)), "lora": jnp.zeros(8)}
    with opened(tmp_path) as ckpt:
        for epoch in range(5):
            ckpt.save(tree, epoch)
            tree = train(tree)
        ckpt.wait()
        paths = [info.path for info in ckpt.checkpoints]
    assert len({frozenset(inodes(path, "base")) for path in paths}) == 1
    for epoch, path in enumerate(paths):
        found = flaxckpt.load(path)
        assert (found["lora"] == epoch).all()
        assert (found["base"] == 1).all()


def test_what_is_stored_is_not_copied_again(tmp_path):
    """The same array once more: nothing of it is read, not even for its digest."""
    tree = tree_of()
    with opened(tmp_path) as ckpt:
        ckpt.save(tree, 0)
        ckpt.wait()
        frozen = ckpt._saves._parts.disk.way.frozen
        leaf = frozen.leaf(tree["base"], is_known=True)
        assert leaf.digest
        assert not frozen.leaf(jnp.copy(tree["base"]), is_known=True).digest
        del leaf
        array, tree = tree.pop("base"), None
        del array
        assert not frozen._known


def test_a_restart_links_to_what_is_there(tmp_path):
    for epoch in range(3):
        with opened(tmp_path) as ckpt:
            ckpt.save(tree_of(7, 2 * epoch), 2 * epoch)
            ckpt.save(tree_of(7, 2 * epoch + 1), 2 * epoch + 1)
    paths = [tmp_path / str(i + 1) for i in range(6)]
    assert len({frozenset(inodes(path, "base")) for path in paths}) == 1
    for i, path in enumerate(paths):
        assert_holds(path, 7, i)
    with opened(tmp_path) as ckpt:
        ckpt.save(tree_of(8, 6), 6)
    assert_holds(tmp_path / "7", 8, 6)


def test_a_restart_links_to_what_an_earlier_version_has_digested(tmp_path):
    """Its digest of a leaf in one file was the one that adds up, see `_digest`."""
    with opened(tmp_path) as ckpt:
        for i in range(2):
            path = ckpt.save(tree_of(7, i), i)
    table = json.loads((path / "flaxckpt_leaves.json").read_bytes())
    table["digests"] = digests(list(tree_of(7, 1).values()))
    text = json.dumps(table).encode()
    (path / "flaxckpt_leaves.json").write_bytes(text)
    record = encode_record(read_record(path), _finish.versions(), text)
    (path / "flaxckpt.json").write_bytes(record)
    assert_holds(path, 7, 1)
    with opened(tmp_path) as ckpt:
        for i in (2, 3):
            ckpt.save(tree_of(7, i), i)
    for i in (2, 3):
        assert inodes(tmp_path / f"{i + 1}", "base") == inodes(path, "base")
        assert_holds(tmp_path / f"{i + 1}", 7, i)


def test_another_object_links_to_what_is_there(tmp_path):
    """In the same process, where the form is known."""
    for epoch in range(3):
        with opened(tmp_path) as ckpt:
            ckpt.save(tree_of(7, epoch), epoch)
        assert bool(ckpt.counts.linked_bytes) == bool(epoch)
        assert_holds(tmp_path / f"{epoch + 1}", 7, epoch)


def test_the_best_in_one_place(tmp_path):
    """Its directory is exchanged and written over, and the links stay right."""
    with ModelCheckpoint(tmp_path / "best", "loss", frozen=is_frozen) as ckpt:
        for i in range(6):
            ckpt.save(tree_of(i // 3, i), i)
            ckpt.wait()
            assert_holds(tmp_path / "best", i // 3, i)
            if i == 2:
                shutil.copytree(
                    tmp_path / "best", tmp_path / "kept", copy_function=os.link
                )
    assert_holds(tmp_path / "kept", 0, 2)


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=8))
@settings(max_examples=25)
def test_any_history(tmp_path_factory, history):
    """Whatever changes, is deleted by retention or by hand: what is listed is right."""
    directory = tmp_path_factory.mktemp("history")
    with opened(directory, max_to_keep=2) as ckpt:
        for epoch, (base, delete) in enumerate(history):
            ckpt.save(tree_of(base, epoch), epoch)
            if delete:
                ckpt.wait()
                shutil.rmtree(ckpt.latest.path)
        ckpt.wait()
        for info in ckpt.checkpoints:
            assert_holds(info.path, history[info.epoch][0], info.epoch)


def test_nnx_filters_and_types(tmp_path):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.base = nnx.Linear(4, 4, rngs=rngs)
            self.lora = nnx.LoRA(4, 2, 4, rngs=rngs)

    model = Model(nnx.Rngs(0))
    state = nnx.state(model)
    with opened(tmp_path, frozen=nnx.Not(nnx.LoRAParam)) as ckpt:
        for epoch in range(2):
            ckpt.save(state, epoch)
            ckpt.wait()
    other = tmp_path / "2"
    links = {
        str(file.relative_to(other / "state")): file.stat().st_nlink
        for file in data_files(other / "state")
        if file.stat().st_size < 200 and "zarr" not in file.name
    }
    assert {n for name, n in links.items() if name.startswith("base.")} == {2}
    assert {n for name, n in links.items() if name.startswith("lora.")} == {1}
    restored = flaxckpt.load(other, like=state)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), restored, state))


def test_sharded(tmp_path):
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    base = jax.device_put(
        jnp.arange(64.0).reshape(8, 8), NamedSharding(mesh, P("x", "y"))
    )
    with opened(tmp_path) as ckpt:
        for epoch in range(3):
            ckpt.save({"base": jnp.copy(base), "lora": jnp.float32(epoch)}, epoch)
    assert len(inodes(tmp_path / "1", "base")) == 8
    assert inodes(tmp_path / "1", "base") == inodes(tmp_path / "3", "base")
    found = flaxckpt.load(tmp_path / "3", like={"base": base, "lora": jnp.float32(0)})
    assert (found["base"] == base).all()
    with opened(tmp_path) as ckpt:  # sharded otherwise: other files
        ckpt.save({"base": jnp.copy(base).reshape(8, 8), "lora": jnp.float32(3)}, 3)
        whole = jax.device_put(np.asarray(base), jax.devices()[0])
        ckpt.save({"base": whole, "lora": jnp.float32(4)}, 4)
    for name in ("4", "5"):
        flaxckpt.verify(tmp_path / name)


def test_weights_only_and_the_last(tmp_path):
    tree = {
        "params": tree_of()["base"],
        "lora": jnp.zeros(3),
        "opt_state": jnp.zeros(4),
    }
    settings = {"save_weights_only": True, "save_last": True, "save_best_only": True}
    with opened(
        tmp_path, frozen=lambda path, leaf: "params" in path, **settings
    ) as ckpt:
        state = ckpt.init()
        for epoch, loss in enumerate([0.5, 0.6, 0.4, 0.7, 0.8]):
            state = ckpt.update(state, tree, {"loss": loss}, epoch)
            ckpt.wait()
        names = sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("."))
        assert names == ["1", "3", "last"]
        assert ckpt.latest.path.name == "last"
    files = {frozenset(inodes(tmp_path / name, "params")) for name in names}
    assert len(files) == 1
    assert ckpt.restore(like=tree).epoch == 4


def test_without_hard_links(tmp_path, monkeypatch):
    """As on file systems that have none: it is all written each time."""

    def refuse(source, target):
        raise OSError(95, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    with opened(tmp_path) as ckpt:
        paths = [ckpt.save(tree_of(0, i), i) for i in range(3)]
    assert ckpt.counts.linked_bytes == 0
    for i, path in enumerate(paths):
        assert_holds(path, 0, i)


def test_what_is_shorter_by_now_is_not_linked(tmp_path):
    tree = tree_of()
    with opened(tmp_path) as ckpt:
        for i in range(3):
            path = ckpt.save({**tree, "lora": tree_of(0, i)["lora"], "step": i}, i)
            ckpt.wait()
            if i == 1:
                (data,) = data_files(path / "state/base")
                os.truncate(data, 100)
    assert_holds(path, 0, 2)


def test_a_donated_array_whose_file_is_gone(tmp_path):
    """An error, not a wrong checkpoint; and the next save is whole."""
    tree = {"base": jnp.ones((64, 32)), "lora": jnp.zeros(3)}
    with opened(tmp_path) as ckpt:
        path = ckpt.save(tree, 0)
        ckpt.wait()
        shutil.rmtree(path)
        tree["base"].delete()
        with pytest.raises(flaxckpt.UnsupportedLeafError, match="deleted"):
            ckpt.save(tree, 1)
        tree["base"] = jnp.ones((64, 32))
        path = ckpt.save(tree, 2)
    assert (flaxckpt.load(path)["base"] == 1).all()


def test_bad_filters(tmp_path):
    with pytest.raises(SettingError, match="frozen='base' cannot work"):
        opened(tmp_path, frozen="base")
    with pytest.raises(SettingError, match="not linked"):
        opened(tmp_path, compress=True)
    with (
        opened(tmp_path, frozen=lambda path, leaf: False) as ckpt,
        pytest.raises(SettingError, match=r"for no leaf\. The tree has base, emb"),
    ):
        ckpt.save(tree_of(), 0)
    with (
        opened(tmp_path, frozen=lambda path: True) as ckpt,
        pytest.raises(
            SettingError, match=r"called with \('base',\) and the leaf, it raised"
        ),
    ):
        ckpt.save(tree_of(), 0)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_linked_stays_as_orbax_wrote_it(tmp_path, monkeypatch):
    """On a restart, on a file system without links: the best is replaced by a whole one."""
    for epoch in range(2):
        with ModelCheckpoint(tmp_path / "best", "loss", frozen=is_frozen) as ckpt:
            ckpt.save(tree_of(0, epoch), epoch)
        assert_holds(tmp_path / "best", 0, epoch)

        def refuse(source, target):
            raise PermissionError(1, "no links here")

        monkeypatch.setattr(os, "link", refuse)


def test_files_that_others_have_put_there_are_not_linked(tmp_path):
    """Two objects of one series: what the one knows, the other has replaced."""
    one, other = opened(tmp_path), opened(tmp_path)
    with one, other:
        for i in range(2):
            one.save(tree_of(1, i), i)
        one.wait()
        for i in range(2):
            other.save(tree_of(2, i), i)
        other.wait()
        one.save(tree_of(1, 3), 3)
    assert_holds(tmp_path / "4", 1, 3)


def test_a_path_with_another_dtype_in_between(tmp_path):
    trees = [
        {"base": jnp.full(64, 7, dtype), "lora": jnp.zeros(3)}
        for dtype in (jnp.float32, jnp.int32)
    ]
    with ModelCheckpoint(tmp_path / "best", "loss", frozen=is_frozen) as ckpt:
        for i in (0, 0, 1, 1, 0, 1, 0):
            ckpt.save({**trees[i], "base": jnp.copy(trees[i]["base"])}, i)
            ckpt.wait()
            flaxckpt.verify(tmp_path / "best")
            found = ocp.load(tmp_path / "best")["base"]
            assert (found.dtype, found[0]) == (trees[i]["base"].dtype, 7)


def test_damage_is_not_passed_on_after_a_restart(tmp_path):
    with opened(tmp_path) as ckpt:
        ckpt.save(tree_of(3, 0), 0)
        path = ckpt.save(tree_of(3, 1), 1)
    (data,) = data_files(path / "state/base")
    content = bytearray(data.read_bytes())
    content[40] ^= 1
    data.write_bytes(content)
    with opened(tmp_path) as ckpt:
        for i in (2, 3):
            ckpt.save(tree_of(3, i), i)
    assert_holds(tmp_path / "3", 3, 2)
    assert_holds(tmp_path / "4", 3, 3)


def test_frozen_leaves_may_be_donated_while_a_save_is_under_way(tmp_path, monkeypatch):
    go = threading.Event()
    write = _series_writer.SeriesWriter.write

    def late(*args, **kwargs):
        go.wait(60)
        return write(*args, **kwargs)

    donate = jax.jit(lambda x: x * 2, donate_argnums=0)
    x, y = tree_of(1, 0), tree_of(2, 0)
    with opened(tmp_path, max_in_flight=4) as ckpt:
        ckpt.save(x, 0)
        ckpt.save(x, 1)
        ckpt.wait()
        monkeypatch.setattr(_series_writer.SeriesWriter, "write", late)
        ckpt.save({**y, "base": y["base"]}, 2)  # another value under the same name
        ckpt.save(x, 3)
        ckpt.save({**x, "merged": jnp.ones(3)}, 4)  # which Orbax writes
        donate(x["base"])
        go.set()
    assert_holds(tmp_path / "3", 2, 0)
    assert_holds(tmp_path / "4", 1, 0)
    assert (flaxckpt.load(tmp_path / "5")["base"] == 1).all()


def test_text_may_be_called_frozen(tmp_path):
    tree = {**tree_of(), "name": "llama"}
    with opened(tmp_path, frozen=lambda path, leaf: path != ("lora",)) as ckpt:
        for i in range(3):
            ckpt.save({**tree, "name": f"llama {i}"}, i)
    assert flaxckpt.load(tmp_path / "3")["name"] == "llama 2"
