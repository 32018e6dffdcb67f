"""What Orbax's older classes, and Flax by them, write loads as it is."""

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0
import pytest
from flax.training import checkpoints
from saved_trees import assert_same

import flaxckpt


def tree():
    return {
        "params": {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(2, jnp.bfloat16)},
        "list": [np.arange(2), jnp.zeros(())],
        "step": 3,
    }


def pytree(path, **options):
    v0.PyTreeCheckpointer(**options).save(path, tree())
    return path


def old_zarr3(path):
    handler = v0.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)
    v0.Checkpointer(handler).save(path, tree())
    return path


def standard(path):
    with v0.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree())
    return path


def manager(path):
    with v0.CheckpointManager(path) as steps:
        steps.save(1200, args=v0.args.StandardSave(tree()))
    return path / "1200"


def manager_with_checkpointer(path):
    with v0.CheckpointManager(path, v0.PyTreeCheckpointer()) as steps:
        steps.save(5, tree())
    return path / "5"


def flax(path):
    return checkpoints.save_checkpoint(path, tree(), 7)


WAYS = [
    pytree,
    lambda path: pytree(path, use_ocdbt=False),
    old_zarr3,
    standard,
    manager,
    manager_with_checkpointer,
    flax,
]


@pytest.mark.parametrize("write", WAYS)
def test_it_loads(tmp_path, write):
    path = write(tmp_path / "plain")
    assert_same(flaxckpt.load(path), tree())
    assert_same(flaxckpt.load(path, tree()), tree())


def test_each_item_loads(tmp_path):
    with v0.CheckpointManager(tmp_path) as steps:
        args = v0.args
        items = args.Composite(
            params=args.StandardSave(tree()["params"]),
            opt=args.PyTreeSave({"m": jnp.ones(2)}),
            meta=args.JsonSave({"a": 1}),
        )
        steps.save(1, args=items)
    loaded = flaxckpt.load(tmp_path / "1")
    assert set(loaded) == {"params", "opt", "meta"}
    assert_same(flaxckpt.load(tmp_path / "1" / "params"), tree()["params"])
