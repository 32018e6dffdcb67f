"""Arrays that were deleted or donated: an error of ours at the call, and no crash."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxckpt import (
    CheckpointState,
    MetricError,
    ModelCheckpoint,
    SettingError,
    Snapshot,
    UnsupportedLeafError,
    step,
)

TREE = {"w": np.arange(3.0)}
GONE = "was deleted or donated"
SETTINGS = {"best": {"save_best_only": True}, "batches": {"save_freq": 2}}
settings = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def deleted(shape=(), dtype=jnp.float32):
    value = jnp.array(np.ones(shape, dtype))
    value.delete()
    return value


def donated(tree):
    """Return a tree whose arrays a jitted function has taken."""
    tree = jax.tree.map(jnp.array, tree)
    jax.jit(lambda tree: tree, donate_argnums=0)(tree)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(tree))
    return tree


@pytest.mark.parametrize("shape", [(), (1,), (3,)])
@pytest.mark.parametrize("name", ["val_loss", "other"])
def test_metrics(tmp_path, shape, name):
    ckpt = ModelCheckpoint(tmp_path / "{epoch}", save_best_only=True)
    logs = {"val_loss": 0.5, name: deleted(shape)}
    nested = {"val": {"loss": 0.5, "other": 1.0, name[4:]: deleted(shape)}}
    calls = [
        lambda: ckpt.update(ckpt.init(), TREE, logs, 0),
        lambda: ckpt.save(TREE, 0, logs=logs),
        lambda: ckpt.save(TREE, 0, logs=nested),
        lambda: jax.jit(lambda x: ckpt.update(ckpt.init(), x, logs, 0))(TREE),
    ]
    if name == "val_loss":  # where only the monitored one is looked at
        calls.append(lambda: step(ckpt.init(), logs, 0))
        calls.append(lambda: step(ckpt.init(), nested, 0))
    snapshot = Snapshot.like(TREE, dict.fromkeys(logs, 0.5), monitor="val_loss")
    calls.append(lambda: snapshot.take(True, TREE, logs, 0))
    for call in calls:
        with pytest.raises(MetricError, match=GONE):
            call()
    ckpt.close()
    assert list(tmp_path.iterdir()) == []


@settings
def test_epoch_and_batch(tmp_path, settings):
    ckpt = ModelCheckpoint(tmp_path / "{epoch}", **settings)
    gone, logs = deleted(dtype=jnp.int32), {"val_loss": 0.5}
    calls = [
        lambda: ckpt.update(ckpt.init(), TREE, logs, gone),
        lambda: ckpt.update(ckpt.init(), TREE, logs, 0, force=deleted(dtype=bool)),
        lambda: ckpt.save(TREE, gone),
        lambda: ckpt.save(TREE, 0, gone),
        lambda: Snapshot.like(TREE, logs).take(True, TREE, logs, gone),
        lambda: Snapshot.like(TREE, logs).take(True, TREE, logs, 0, gone),
        lambda: Snapshot.like(TREE, logs).take(deleted(dtype=bool), TREE, logs, 0),
    ]
    if "save_freq" in settings:
        del calls[0]  # where nothing is due, an epoch is not looked at
        calls += [
            lambda: step(ckpt.init(), logs, gone, 0),
            lambda: step(ckpt.init(), logs, 0, gone),
            lambda: ckpt.update(ckpt.init(), TREE, logs, 0, gone),
        ]
    for call in calls:
        with pytest.raises(SettingError, match=f"<deleted>.*{GONE}"):
            call()
    assert list(tmp_path.iterdir()) == []


def emptied(tree):
    """Return a tree whose arrays were deleted."""
    return jax.tree.map(lambda leaf: deleted(dtype=leaf.dtype), tree)


@settings
@pytest.mark.parametrize("lose", [donated, emptied])
def test_a_state(tmp_path, settings, lose):
    ckpt = ModelCheckpoint(tmp_path / "{epoch}", **settings)
    state, batch = lose(ckpt.init()), 1 if "save_freq" in settings else None
    logs = {"val_loss": 0.5}
    calls = [
        lambda: ckpt.update(state, TREE, logs, 0, batch),
        lambda: ckpt.update(state, TREE, {"val_loss": jnp.ones(())}, 0, batch),
        lambda: ckpt.save(TREE, 0, batch, logs, state),
        lambda: step(state, logs, 0, batch),
        lambda: jax.jit(lambda x: ckpt.update(state, x, logs, 0, batch))(TREE),
        lambda: state.best,
    ]
    for call in calls:
        with pytest.raises(SettingError, match=GONE):
            call()
    assert repr(state).startswith("CheckpointState(best_value=<deleted>, has_best=<del")
    assert list(tmp_path.iterdir()) == []


def test_what_jit_takes_by_donation():
    take = jax.jit(lambda s, x: step(s, {"val_loss": x}, 0), donate_argnums=0)
    before = jax.tree.map(jnp.array, CheckpointState.create(save_best_only=True))
    after, _ = take(before, 0.5)
    assert before.best_value.is_deleted()
    with pytest.raises(SettingError, match=GONE):
        step(before, {"val_loss": 0.25}, 1)
    assert step(after, {"val_loss": 0.25}, 1)[1]
    assert "best_value=Array(0.5, dtype=float32)" in repr(after)


def test_a_snapshot_and_its_trees(tmp_path):
    logs = {"val_loss": 0.5}
    snapshot = Snapshot.like({"w": jnp.ones(3)}, logs)
    with pytest.raises(SettingError, match=rf"\['w'\] {GONE}"):
        snapshot.take(True, {"w": deleted((3,))}, logs, 0)
    gone = donated(snapshot.take(True, {"w": jnp.ones(3)}, logs, 0))
    calls = [
        lambda: gone.take(True, {"w": jnp.ones(3)}, logs, 1),
        gone.entries,
        lambda: ModelCheckpoint(tmp_path / "{epoch}").save_snapshot(gone),
    ]
    for call in calls:
        with pytest.raises(SettingError, match=GONE):
            call()
    assert repr(gone).startswith("Snapshot(trees=({'w': <deleted>},), values=<deleted>")
    Snapshot.like({"w": deleted((3,))}, {"val_loss": deleted()})  # their forms count


def test_a_tree(tmp_path):
    ckpt = ModelCheckpoint(tmp_path / "{epoch}")
    with pytest.raises(UnsupportedLeafError, match="was deleted"):
        ckpt.update(ckpt.init(), {"w": deleted()}, None, 0)
    assert list(tmp_path.iterdir()) == []
