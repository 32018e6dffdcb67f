"""Parts of what plain Orbax wrote: as they are in the whole, and nothing else is read."""

import os
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as v0
import pytest
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1
from saved_trees import bits_of

import flaxckpt
from flaxckpt import CheckpointCorruptError


def tree_of():
    mesh = Mesh(np.array(jax.devices()), "x")
    spread = NamedSharding(mesh, PartitionSpec("x"))
    params = {"w": jax.device_put(jnp.arange(16.0), spread), "b": jnp.ones(3)}
    state = TrainState.create(apply_fn=None, params=params, tx=optax.adam(1e-3))
    return {
        "state": state,
        "half": jnp.zeros(2, jnp.bfloat16),
        "host": np.arange(3),
        "layers": [{"b": jnp.ones(1)}, {"b": jnp.zeros(2)}],
        "none": None,
        "n": 3,
        "f": 2.5,
    }


def write_v1(path, tree):
    v1.save(path, tree)
    return path


def write_v0(path, tree):
    with v0.CheckpointManager(path) as manager:
        manager.save(0, args=v0.args.StandardSave(tree))
    return path / "0"


def write_items(path, tree):
    with v0.CheckpointManager(path, item_names=("state", "other")) as manager:
        items = {"state": tree, "other": {"y": jnp.ones(2)}}
        args = {name: v0.args.StandardSave(item) for name, item in items.items()}
        manager.save(0, args=v0.args.Composite(**args))
    return path / "0"


def write_an_item(path, tree):
    with v0.CheckpointManager(path, item_names=("mine", "other")) as manager:
        args = v0.args.Composite(
            mine=v0.args.PyTreeSave(tree), other=v0.args.JsonSave({"y": 2})
        )
        manager.save(0, args=args)
    return path / "0/mine"


# An error in one of Orbax's tasks leaves others behind, which nobody awaits.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("none_left_behind"),
]
WAYS = [write_v1, write_v0, write_items, write_an_item]


def shown(tree):
    """Type and bits of each leaf, and its sharding if it has one."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): (
            type(leaf), bits_of(leaf), getattr(leaf, "sharding", None)
        )
        for path, leaf in leaves
    }  # fmt: skip


@pytest.mark.parametrize("write", WAYS)
def test_a_part_is_as_in_the_whole(tmp_path, write):
    path = write(tmp_path / "orbax", tree_of())
    whole = flaxckpt.load(path)
    for name in ("half", "host", "layers", "n", "f", "state"):
        assert shown(flaxckpt.load(path, select=name)) == shown(whole[name]), name
    chosen = flaxckpt.load(path, select=lambda place, leaf: place[-1] == "b")
    assert shown(chosen["state"]["params"]) == {"['b']": shown(whole)["['state']['params']['b']"]}  # fmt: skip
    assert len(jax.tree.leaves(chosen)) == 5
    like = {"f": 0.0, "new": jnp.ones(2), "layers": [{"b": jnp.ones(1)}]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = flaxckpt.load(path, like, partial=True)
    assert (loaded["f"], loaded["new"].shape) == (2.5, (2,))
    assert loaded["layers"][0]["b"] == 1


@pytest.mark.parametrize("write", WAYS)
def test_keys_and_arrays_of_64_bits_are_as_in_the_whole(tmp_path, write):
    """Orbax's metadata does not tell a key from its data."""
    tree = {"keys": jax.random.split(jax.random.key(3)), "w": jnp.ones(2)}
    path = write(tmp_path / "keys", tree)
    assert shown(flaxckpt.load(path, select="keys")) == shown(
        flaxckpt.load(path)["keys"]
    )
    with jax.enable_x64(True):
        tree = {"n": jnp.arange(3), "w": jnp.ones(2)}
        path = write(tmp_path / "wide", tree)
        assert shown(flaxckpt.load(path, select="n")) == shown(flaxckpt.load(path)["n"])
    assert shown(flaxckpt.load(path, select="n")) == shown(flaxckpt.load(path)["n"])


@pytest.mark.parametrize("write", WAYS)
def test_a_read_within_enable_x64_gets_64_bits(tmp_path, write):
    """Orbax makes arrays in threads that do not know of this thread's setting."""
    with jax.enable_x64(True):
        tree = {"n": jnp.arange(3) << 40, "z": jnp.ones(2, complex), "w": jnp.ones(2)}
        tree["half"] = jnp.ones(2, jnp.bfloat16)
        tree["placed"] = jax.device_put(jnp.arange(8.0) / 3, jax.devices()[1])
        path = write(tmp_path / "wide", tree)
        whole = flaxckpt.load(path)
        assert shown(whole) == shown(tree)
        for name, leaf in tree.items():
            assert shown(flaxckpt.load(path, select=name)) == shown(leaf)
    narrow = flaxckpt.load(path)
    assert narrow["w"].dtype == np.float32


ON_ONE_DEVICE = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 1)
jax.config.update("jax_enable_x64", sys.argv[2] == "everywhere")
import numpy as np
import flaxckpt
with jax.enable_x64(sys.argv[2] != "nowhere"):
    for wanted in ({}, {"select": "spread"}, {"select": "other"}):
        found = jax.tree.map(np.asarray, flaxckpt.load(sys.argv[1], **wanted))
        print(jax.tree.map(np.ndarray.tolist, found))
"""


@pytest.mark.parametrize("x64", ["nowhere", "here", "everywhere"])
def test_what_was_saved_on_more_devices_is_read(tmp_path, x64):
    spread = NamedSharding(Mesh(np.array(jax.devices()), "x"), PartitionSpec("x"))
    tree = {
        "spread": jax.device_put(jnp.arange(8.0), spread),
        "other": jax.device_put(jnp.ones(2), jax.devices()[5]),
    }
    write_v1(tmp_path / "orbax", tree)
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ON_ONE_DEVICE, tmp_path / "orbax", x64],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    plain = jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), tree)
    assert done.stdout.splitlines() == [
        str(plain), str(plain["spread"]), str(plain["other"])
    ]  # fmt: skip


def test_what_is_not_wanted_is_not_read(tmp_path):
    """Each leaf has files of its own here, and those of the others are damaged."""
    tree = {"a": jnp.arange(4.0), "b": {"c": jnp.ones(3), "d": np.arange(2)}}
    with v0.Checkpointer(v0.PyTreeCheckpointHandler(use_ocdbt=False)) as writer:
        writer.save(tmp_path / "orbax", tree)
    damaged = 0
    for file in (tmp_path / "orbax").rglob("*"):
        of_another = file.parent.name.startswith("b.") or "b." in str(file.parent)
        if file.is_file() and of_another and not file.name.startswith("."):
            file.write_bytes(b"damaged")
            damaged += 1
    assert damaged == 2
    with pytest.raises(CheckpointCorruptError):
        flaxckpt.load(tmp_path / "orbax")
    assert flaxckpt.load(tmp_path / "orbax", select="a").tolist() == [0, 1, 2, 3]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        part = flaxckpt.load(tmp_path / "orbax", {"a": jnp.ones(4)}, partial=True)
    assert part["a"].tolist() == [0, 1, 2, 3]
    with pytest.raises(CheckpointCorruptError):
        flaxckpt.load(tmp_path / "orbax", select="b")
