"""Orbax saves every tree; a fault of the direct way costs no checkpoint."""

import errno
import warnings
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1
from orbax.checkpoint._src.futures import future

import flaxckpt
from flaxckpt import CheckpointWriteError, ModelCheckpoint, SettingError
from flaxckpt._checkpoints import read as _read
from flaxckpt._checkpoints import write as _write
from flaxckpt._direct import form as _form
from flaxckpt._direct import write as _direct_write
from flaxckpt._disk.files import Draft


def small_tree(epoch):
    return {"w": jnp.full((4, 3), epoch, jnp.float32), "s": str(epoch), "n": epoch}


def large_tree(epoch):
    return {"big": jnp.full((1024, 1024), epoch, jnp.float32), "n": epoch}


def frozen_tree(epoch):
    return {"base": jnp.arange(6.0), "n": epoch}


TREES = {"database": small_tree, "files": large_tree, "frozen": frozen_tree}
SETTINGS = {"frozen": {"frozen": lambda path, leaf: path[0] == "base"}}
# What the direct way calls, and how often at most while it writes one of these trees.
CALLS = [
    (_write, "write_values"),
    (_form.Form, "current"),
    (_direct_write, "digest_as_stored"),
    (_direct_write, "database_at"),
    (_direct_write, "write_array"),
    (_direct_write, "chunks_of"),
    (_direct_write, "write_file"),
    (_direct_write, "trailer_of"),
    (Draft, "writing"),
    (Draft, "link"),
    (Draft, "stamp"),
    (Draft, "finish"),
]


@pytest.mark.direct
@pytest.mark.parametrize("kind", TREES)
@pytest.mark.parametrize(
    ("owner", "name"), CALLS, ids=lambda x: getattr(x, "__name__", x)
)
def test_a_fault_at_any_call_of_the_direct_way_costs_no_checkpoint(
    tmp_path, monkeypatch, owner, name, kind
):
    tree, original, failed = TREES[kind], getattr(owner, name), []

    def fail(*args, **kwargs):
        if not failed:
            failed.append(name)
            raise RuntimeError("injected")
        return original(*args, **kwargs)

    with ModelCheckpoint(tmp_path / "{epoch}", **SETTINGS.get(kind, {})) as ckpt:
        ckpt.save(tree(0), 0)
        ckpt.save(tree(1), 1)
        ckpt.wait()
        assert ckpt.counts.direct == 1
        monkeypatch.setattr(owner, name, fail)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            ckpt.save(tree(2), 2)
            ckpt.wait()
        assert len(told) == len(failed)
        assert all("(RuntimeError: injected)" in str(each.message) for each in told)
        for epoch in (3, 4):
            ckpt.save(tree(epoch), epoch)
            ckpt.wait()
        assert ckpt.counts.direct == (1 if failed else 4)  # it is not tried again
    assert [info.epoch for info in ckpt.checkpoints] == [0, 1, 2, 3, 4]
    for info in ckpt.checkpoints:
        assert_is(info, tree)


def assert_is(info, tree):
    flaxckpt.verify(info.path)
    wanted = tree(info.epoch)
    for found in (v1.load(info.path), flaxckpt.load(info.path)):
        for name, value in wanted.items():
            np.testing.assert_array_equal(found[name], value)


@pytest.mark.direct
def test_orbax_writes_a_tree_once_for_the_process(tmp_path):
    for name, counts in (("one", (1, 1)), ("other", (2, 0))):
        with ModelCheckpoint(tmp_path / name / "{epoch}") as ckpt:
            for epoch in range(2):
                ckpt.save(small_tree(epoch), epoch)
                ckpt.wait()
            assert (ckpt.counts.direct, ckpt.counts.by_orbax) == counts


@pytest.mark.direct
def test_a_wrong_byte_that_the_first_look_finds_costs_no_checkpoint(
    tmp_path, monkeypatch
):
    original = Draft.write

    def spoil(draft, name, parts):
        parts = [bytes(part) for part in parts]
        if name.endswith("zarr.json"):
            parts = [parts[0].replace(b"float32", b"float16")]
        original(draft, name, parts)

    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        ckpt.save(large_tree(0), 0)
        ckpt.wait()
        monkeypatch.setattr(Draft, "write", spoil)
        ckpt.save(large_tree(1), 1)
        with pytest.warns(UserWarning, match="is not all there"):
            ckpt.wait()
        assert (ckpt.counts.direct, ckpt.counts.by_orbax) == (0, 2)
    for info in ckpt.checkpoints:
        assert_is(info, large_tree)


@pytest.mark.direct
def test_an_error_of_the_disk_is_an_error_of_the_save(tmp_path, monkeypatch):
    """Orbax would meet with it as well."""

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        ckpt.save(large_tree(0), 0)
        ckpt.wait()
        with monkeypatch.context() as patch:
            patch.setattr(Draft, "finish", fail)
            ckpt.save(large_tree(1), 1)
            with pytest.raises(CheckpointWriteError, match="No space left"):
                ckpt.wait()
        ckpt.save(large_tree(2), 2)
        ckpt.wait()
        assert (ckpt.counts.direct, ckpt.counts.by_orbax) == (1, 1)


@pytest.mark.parametrize("kind", TREES)
def test_engine_orbax_writes_all_of_it(tmp_path, kind):
    tree = TREES[kind]
    with ModelCheckpoint(
        tmp_path / "{epoch}", engine="orbax", **SETTINGS.get(kind, {})
    ) as ckpt:
        for epoch in range(3):
            ckpt.save(tree(epoch), epoch)
            ckpt.wait()
        assert (ckpt.counts.direct, ckpt.counts.by_orbax) == (0, 3)
    for info in ckpt.checkpoints:
        assert_is(info, tree)


def test_engine_is_one_of_two(tmp_path):
    with pytest.raises(SettingError, match='pass "auto" or "orbax"'):
        ModelCheckpoint(tmp_path, engine="direct")


@pytest.mark.parametrize("engine", ["auto", "orbax"])
def test_a_user_s_own_saves_by_orbax_go_on_beside(tmp_path, engine):
    def save_by_orbax():
        for number in range(20):
            v1.save_async(tmp_path / f"own-{number}", small_tree(number)).result()

    with futures.ThreadPoolExecutor() as pool:
        saved = pool.submit(save_by_orbax)
        with ModelCheckpoint(tmp_path / "ours/{epoch}", engine=engine) as ckpt:
            for epoch in range(20):
                ckpt.save(small_tree(epoch), epoch)
                ckpt.wait()
                if epoch % 5 == 0:
                    ckpt.restore()
        saved.result(timeout=120)
    for number in range(20):
        found = v1.load(tmp_path / f"own-{number}")
        for name, value in small_tree(number).items():
            np.testing.assert_array_equal(found[name], value)


def test_orbax_keeps_nothing_of_a_save_that_is_over(tmp_path):
    contract = future.AwaitableSignalsContract.get_awaitable_signals_from_contract
    with ModelCheckpoint(tmp_path / "{epoch}", engine="orbax") as ckpt:
        for epoch in range(3):
            ckpt.save({"text": "some", **small_tree(epoch)}, epoch)
        ckpt.wait()
    assert not any(contract(str(-number)) for number in range(1, 1000))


def test_orbax_reads_64_bits_within_enable_x64(tmp_path, monkeypatch):
    """It makes arrays in threads that do not know of this thread's setting."""
    spread = NamedSharding(jax.make_mesh((8,), ("x",)), PartitionSpec("x"))
    monkeypatch.setattr(_read, "_read_files", lambda *_, **__: ({}, [], {}))
    with jax.enable_x64(True), ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        tree = {
            "w": jax.device_put(jnp.arange(8.0) / 3, spread),
            "n": jax.device_put(jnp.arange(3) << 40, jax.devices()[2]),
            "half": jax.device_put(jnp.ones(8, jnp.bfloat16), spread),
        }
        ckpt.save(tree, 0)
        found = ckpt.restore(tree).tree
        for name, leaf in tree.items():
            assert found[name].dtype == leaf.dtype
            assert found[name].sharding == leaf.sharding
            assert jnp.array_equal(found[name], leaf)
