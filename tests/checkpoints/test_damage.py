"""A damaged checkpoint raises, or gives what was saved: never anything else."""

import json
import os
import random
import shutil
import struct
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from saved_trees import bits_of

import flaxckpt
from flaxckpt import CheckpointCorruptError, CheckpointError, ModelCheckpoint
from flaxckpt._checkpoints import write as _write
from flaxckpt._direct.crc32c import crc32c

# Orbax leaves tasks of its own behind where it raises.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("none_left_behind"),
]
FULL = os.environ.get("FLAXCKPT_FAULTS") == "full"
FLIPS, OTHERS = (170, 17) if FULL else (30, 6)  # of each of twelve kinds of checkpoint


def tree_of(dtype, sharded):
    random = np.random.default_rng(0)
    values = jnp.asarray(random.normal(size=(64, 40)) * 50).astype(dtype)
    if sharded:
        mesh = jax.make_mesh((4, 2), ("x", "y"))
        values = jax.device_put(values, NamedSharding(mesh, P("x", "y")))
    return {
        "w": values,
        "ones": jnp.ones((32, 32), dtype),
        "key": jax.random.key(3),
        "host": np.arange(500),
        "n": 12345,
        "x": 0.5,
        "s": "text",
    }


def flip(path, randomly):
    data = bytearray(path.read_bytes())
    data[randomly.randrange(len(data))] ^= 1 << randomly.randrange(8)
    path.write_bytes(data)


def truncate(path, randomly):
    os.truncate(path, randomly.randrange(path.stat().st_size))


def zero_page(path, randomly):
    size = path.stat().st_size
    start = randomly.randrange(size) // 512 * 512
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(min(512, size - start)))


def swap(path, randomly):
    above = [path.parent]
    while not (above[-1] / "flaxckpt.json").exists():
        above.append(above[-1].parent)
    others = [p for p in files_of(randomly.choice(above)) if p != path]
    other = randomly.choice(others or [path])
    ours, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(ours)


def remove(path, randomly):
    path.unlink()


def files_of(directory):
    return sorted(p for p in directory.rglob("*") if p.is_file() and p.stat().st_size)


def bits(tree):
    return jax.tree.map(bits_of, tree)


@pytest.mark.parametrize("written", ["zstd", "database", "files"])
@pytest.mark.parametrize(
    ("dtype", "sharded"),
    [("float32", False), ("bfloat16", False), ("int8", False), ("float32", True)],
    ids=["f32", "bf16", "i8", "f32-sharded"],
)
def test_no_damage_is_silent(tmp_path, monkeypatch, dtype, sharded, written):
    if written == "files":
        monkeypatch.setattr(_write, "_LARGE_LEAF", 0)
    tree = tree_of(dtype, sharded)
    with ModelCheckpoint(tmp_path / "good", compress=written == "zstd") as ckpt:
        ckpt.save(tree, epoch=0)  # by Orbax
        ckpt.wait()
        good = ckpt.save(tree, epoch=0)  # in its form, unless compressed
    is_database = (good / "state/manifest.ocdbt").exists()
    assert is_database == (written != "files")
    expected = bits(tree)
    assert bits(flaxckpt.load(good, tree)) == expected
    randomly = random.Random(f"{dtype}{sharded}{written}")
    names = [str(path.relative_to(good)) for path in files_of(good)]
    sizes = [(good / name).stat().st_size for name in names]
    # By size, as disks fail, and each file alike, as small ones matter most.
    chosen_names = randomly.choices(names, sizes, k=FLIPS // 2)
    chosen_names += randomly.choices(names, k=FLIPS - FLIPS // 2)
    damages = [(flip, name) for name in chosen_names]
    for kind in (truncate, zero_page, swap, remove):
        damages += [(kind, randomly.choice(names)) for _ in range(OTHERS)]
    bad = tmp_path / "bad"
    raised = 0
    for damage, name in damages:
        shutil.copytree(good, bad)
        damage(bad / name, randomly)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                got = flaxckpt.load(bad, tree)
        except CheckpointError:
            raised += 1
        else:
            assert bits(got) == expected, f"silent: {damage.__name__} of {name}"
        shutil.rmtree(bad)
    assert raised > len(damages) // 4


def test_unverified_it_would_be_silent(tmp_path):
    """The test above can fail: without digests, flipped bits load."""
    tree = {"w": jnp.asarray(np.random.default_rng(0).normal(size=5000))}
    with ModelCheckpoint(tmp_path / "good") as ckpt:
        good = ckpt.save(tree, epoch=0)
    data = max(files_of(good), key=lambda path: path.stat().st_size)
    silent = 0
    for index in range(20):
        randomly = random.Random(index)
        before = data.read_bytes()
        flip(data, randomly)
        try:
            wrong = bits(flaxckpt.load(good, verify=False)) != bits(tree)
        except CheckpointError:
            wrong = False
        if wrong:
            silent += 1
            with pytest.raises(CheckpointCorruptError):
                flaxckpt.load(good)
            with pytest.raises(CheckpointCorruptError):
                flaxckpt.verify(good)
        data.write_bytes(before)
    assert silent > 10
    flaxckpt.verify(good)


def damage_values(path):
    """Change a value so that only the digest can tell."""
    data = max(files_of(path), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)


def saved(tmp_path, losses, **settings):
    ckpt = ModelCheckpoint(tmp_path / "{epoch}", **settings)
    state = ckpt.init()
    random = np.random.default_rng(0)
    for epoch, loss in enumerate(losses):
        tree = {"w": random.normal(size=5000), "epoch": epoch}
        state = ckpt.update(state, tree, {"val_loss": loss}, epoch)
    ckpt.close()
    return ckpt


def test_restore_falls_back_to_the_next_good_one(tmp_path):
    ckpt = saved(tmp_path, [0.3, 0.1, 0.2, 0.4])
    damage_values(tmp_path / "4")
    (tmp_path / "2/flaxckpt_leaves.json").unlink()
    with pytest.warns(UserWarning, match=r"PASSED OVER.*'.*/4' is damaged"):
        assert ckpt.restore().tree["epoch"] == 2
    with pytest.warns(UserWarning, match=r"PASSED OVER.*'.*/2' is damaged"):
        assert ckpt.restore(which="best").tree["epoch"] == 2
    for which in ("4", "2"):
        with pytest.raises(CheckpointCorruptError, match="is damaged"):
            ckpt.restore(which=tmp_path / which)
    assert ckpt.restore(which=tmp_path / "4", verify=False).epoch == 3


def test_a_damaged_best_need_not_be_beaten(tmp_path):
    ckpt = saved(tmp_path, [0.5, 0.4, 0.1], save_best_only=True)
    damage_values(ckpt.latest.path)
    with pytest.warns(UserWarning, match="PASSED OVER"):
        restored = ckpt.restore()
    assert restored.epoch == 1
    assert float(restored.state.best) == np.float32(0.4)


def test_if_all_are_damaged_it_raises_rather_than_start_anew(tmp_path):
    ckpt = saved(tmp_path, [0.3, 0.1])
    damage_values(tmp_path / "1")
    (tmp_path / "2/flaxckpt.json").write_text("{}")
    with (
        pytest.warns(UserWarning, match="PASSED OVER"),
        pytest.raises(CheckpointCorruptError, match="is damaged"),
    ):
        ckpt.restore()
    (tmp_path / "1/flaxckpt.json").write_text("[")
    with pytest.raises(CheckpointCorruptError, match="its record does not parse"):
        ckpt.restore()
    with pytest.warns(UserWarning, match="Left out of the listing") as caught:
        assert flaxckpt.list_checkpoints(tmp_path) == ()
    assert len(caught) == 2


def test_the_error_names_leaves_and_files(tmp_path):
    saved(tmp_path, [0.3])
    damage_values(tmp_path / "1")
    with pytest.raises(CheckpointCorruptError) as caught:
        flaxckpt.load(tmp_path / "1")
    assert "not what was saved: w (in one of the files state/" in str(caught.value)


def test_verify(tmp_path):
    saved(tmp_path, [0.3])
    assert flaxckpt.verify(tmp_path / "1") is None
    with pytest.raises(flaxckpt.CheckpointNotFoundError):
        flaxckpt.verify(tmp_path / "2")
    from orbax.checkpoint import v1 as ocp

    ocp.save(tmp_path / "plain", {"w": np.ones(2)})
    with pytest.raises(
        CheckpointError, match="written by plain Orbax, which records no"
    ):
        flaxckpt.verify(tmp_path / "plain")


def test_a_cast_is_verified_before_it_is_cast(tmp_path):
    with ModelCheckpoint(tmp_path / "x") as ckpt:
        path = ckpt.save({"w": jnp.linspace(0, 1, 5000)}, epoch=0)
    like = {"w": jnp.zeros(5000, jnp.bfloat16)}
    assert flaxckpt.load(path, like, cast=True)["w"].dtype == jnp.bfloat16
    damage_values(path)
    with pytest.raises(CheckpointCorruptError):
        flaxckpt.load(path, like, cast=True)


MANY = {
    "one": jnp.asarray(np.random.default_rng(1).normal(size=(64, 16)), jnp.float32),
    "several": jnp.asarray(
        np.random.default_rng(2).normal(size=(64, 16)), jnp.bfloat16
    ),
    "host": np.random.default_rng(3).integers(0, 256, (32, 64), np.uint8),
    "keys": jax.random.split(jax.random.key(4), 256),
    "scalar": jnp.float32(0.123456),
    "number": 0x123456789ABCDEF,
    "rate": 0.987654321,
    "text": "some words that are found again",
    "raw": np.random.default_rng(5).bytes(2000),
}


def mesh_and(*axes):
    return NamedSharding(jax.make_mesh((4, 2), ("x", "y")), P(*axes))


def needle(name):
    """Bytes of a leaf that are found in its file; of a sharded one, in one of them."""
    value = MANY[name]
    if name == "several":
        value = value[:16, :8]
    if isinstance(value, str | bytes):
        return value if isinstance(value, bytes) else value.encode()
    return np.asarray(jax.random.key_data(value) if name == "keys" else value).tobytes()


@pytest.mark.parametrize("wanted", ["plain", "same", "otherwise"])
@pytest.mark.parametrize("written", ["files", "database", "linked", "by Orbax"])
def test_one_bit_of_any_leaf_shows(tmp_path, monkeypatch, written, wanted):
    monkeypatch.setattr(_write, "_LARGE_LEAF", 2**40 if written == "database" else 0)
    tree = {**MANY, "several": jax.device_put(MANY["several"], mesh_and("x", "y"))}
    frozen = (lambda path, leaf: True) if written == "linked" else None
    with ModelCheckpoint(tmp_path / "{epoch}", frozen=frozen) as ckpt:
        for epoch in range(1 if written == "by Orbax" else 3):
            path = ckpt.save(tree, epoch)
            ckpt.wait()
    if written == "database" and not ckpt.counts.direct:
        pytest.skip("Orbax's database has no shard's bytes in one piece")
    assert bool(ckpt.counts.linked_bytes) == (written == "linked")
    table = json.loads((path / "flaxckpt_leaves.json").read_bytes())
    marks = {leaf["path"][0]: d for leaf, d in zip(table["leaves"], table["digests"])}  # noqa: B905
    if ckpt.counts.direct:
        of_parts = {name for name, mark in marks.items() if mark.startswith("sum:")}
        assert of_parts == {"several", "text"}
        assert all(marks[name].startswith("xxh3:") for name in set(MANY) - of_parts)
    like = {"plain": None, "same": tree}.get(wanted, tree)
    if wanted == "otherwise":
        spread = {"one": ("y", "x"), "several": (None, "y"), "keys": ("x",)}
        placed = {
            name: jax.device_put(MANY[name], mesh_and(*axes))
            for name, axes in spread.items()
        }
        like = {
            **tree,
            **placed,
            "host": jax.device_put(MANY["host"], mesh_and("x", "y")),
        }
    expected = None if like is None else bits(like)
    got = bits(flaxckpt.load(path, like))
    assert expected is None or got == expected
    for name in MANY:
        bad = Path(shutil.copytree(path, tmp_path / f"bad {name}"))
        flipped = 0
        for file in files_of(bad):
            content = bytearray(file.read_bytes())
            at = content.find(needle(name))
            if at >= 0 and not file.name.startswith("flaxckpt"):
                content[at + len(needle(name)) // 2] ^= 1
                file.write_bytes(content)
                flipped += 1
        assert flipped, name
        for read in (lambda: flaxckpt.load(bad, like), lambda: flaxckpt.verify(bad)):  # noqa: B023
            with pytest.raises(CheckpointCorruptError) as caught:
                read()
            if len(needle(name)) > 1024 or written != "database":
                assert f"not what was saved: {name} (" in str(caught.value)


@pytest.mark.parametrize("axes", [(), ("x",), ("y", "x")])
def test_what_only_orbax_can_read_is_verified(tmp_path, axes):
    """A file as it would not be written here, of a leaf that has a checksum only."""
    tree = {"w": MANY["one"], "large": jnp.zeros(2**20)}
    with ModelCheckpoint(tmp_path / "x") as ckpt:
        path = ckpt.save(tree, epoch=0)
    file = path / "state/w/c/0/0"
    values = needle("one")
    index = struct.pack("<QQ", 8, len(values))
    index += struct.pack("<I", crc32c(index))
    like = {**tree, "w": jax.device_put(tree["w"], mesh_and(*axes))}
    file.write_bytes(bytes(8) + values + index)
    assert bits(flaxckpt.load(path, like)) == bits(tree)
    flaxckpt.verify(path)
    file.write_bytes(bytes(8) + values[:-1] + bytes([values[-1] ^ 1]) + index)
    with pytest.raises(CheckpointCorruptError, match="not what was saved: w"):
        flaxckpt.load(path, like)
    assert bits(flaxckpt.load(path, like, verify=False)) != bits(tree)


@pytest.mark.direct
@pytest.mark.parametrize("file", ["files", "database"])
def test_the_error_names_the_files_of_the_leaf(tmp_path, monkeypatch, file):
    monkeypatch.setattr(_write, "_LARGE_LEAF", 0 if file == "files" else 2**40)
    with ModelCheckpoint(tmp_path / "x") as ckpt:
        for _ in range(2):
            path = ckpt.save({"a": jnp.ones(500), "b": jnp.zeros(500)}, epoch=0)
            ckpt.wait()
    for data in path.glob("state/b/c*" if file == "files" else "state/**/d/*"):
        content = bytearray(data.read_bytes())
        at = content.find(bytes(400))
        if at >= 0:
            content[at + 200] ^= 1
            data.write_bytes(content)
    with pytest.raises(
        CheckpointCorruptError, match=r"files state/\S+(, state/\S+)*\)"
    ) as caught:
        flaxckpt.verify(path)
    if file == "files":
        assert "state/b/c" in str(caught.value)
        assert "state/a/" not in str(caught.value)


def test_a_checkpoint_without_its_record_is_damaged_and_not_plain_orbax_s(tmp_path):
    saved(tmp_path, [0.5, 0.3])
    (tmp_path / "2/flaxckpt.json").unlink()
    with pytest.raises(CheckpointCorruptError, match="its record cannot be read"):
        flaxckpt.load(tmp_path / "2")
    with pytest.raises(CheckpointCorruptError, match="its record cannot be read"):
        flaxckpt.verify(tmp_path / "2")
    with pytest.warns(UserWarning, match="its record cannot be read"):
        assert len(flaxckpt.list_checkpoints(tmp_path)) == 1


def test_a_number_is_not_taken_for_one_of_another_kind(tmp_path):
    tree = {"step": 12345, "rate": 0.001, "w": jnp.zeros(2**20)}
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        ckpt.save(tree, 0)
        path = ckpt.save(tree, 1)
    step, rate = (path / "state" / name / "zarr.json" for name in ("step", "rate"))
    texts = step.read_bytes(), rate.read_bytes()
    step.write_bytes(texts[1])
    for like in (None, tree):
        with pytest.raises(CheckpointCorruptError, match="step"):
            flaxckpt.load(path, like)
    rate.write_bytes(texts[0])
    with pytest.raises(CheckpointCorruptError):
        flaxckpt.verify(path)


@pytest.mark.direct
def test_keys_of_another_shape_and_strange_texts_are_damage(tmp_path):
    tree = {"key": jax.random.key(1), "text": "\U0001f600", "w": jnp.zeros(2**20)}
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        for epoch in range(4):
            ckpt.save(tree, epoch)
    key = tmp_path / "4" / "state" / "key" / "zarr.json"
    key.write_bytes(key.read_bytes().replace(b'"shape":[2]', b'"shape":[0]'))
    texts = tmp_path / "3" / "state" / "_strings.json"
    texts.write_bytes(texts.read_bytes().replace(b"\\ud83d", b"\\ue83d"))
    record = tmp_path / "2" / "flaxckpt.json"
    record.write_bytes(record.read_bytes().replace(b'"epoch": 1', b'"epoch": 1e999'))
    for name in "432":
        with pytest.raises(CheckpointCorruptError):
            flaxckpt.load(tmp_path / name)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = ckpt.restore(like=tree)
    assert found.epoch == 0
    assert len([w for w in told if "PASSED OVER" in str(w.message)]) >= 2
