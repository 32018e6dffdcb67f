"""What is remembered of a tree is used only for a tree that is like it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import flaxckpt
from flaxckpt import ModelCheckpoint
from flaxckpt._trees.remembered import Remembered
from tests.saved_trees import bits_of


@jax.tree_util.register_pytree_node_class
class Scaled:
    """A node whose static data may be an array, which has no truth value."""

    def __init__(self, w, scale):
        self.w, self.scale = w, scale

    def tree_flatten(self):
        return (self.w,), self.scale

    @classmethod
    def tree_unflatten(cls, scale, children):
        return cls(*children, scale)


def test_all_others_are_forgotten_where_there_would_be_too_many():
    remembered = Remembered(2)
    assert remembered.get("a") is None
    assert remembered.keep("a", 1) == 1
    remembered.keep("b", 2)
    remembered.keep("a", 3)
    assert (remembered.get("a"), remembered.get("b")) == (3, 2)
    remembered.keep("c", 4)
    assert (remembered.get("b"), remembered.get("c")) == (None, 4)


@pytest.mark.parametrize("scale", [np.arange(3), jnp.arange(3), [1, 2], {"a": 1}])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"save_weights_only": True},
        {"frozen": lambda path, _: "frozen" in str(path)},
    ],
)
def test_static_data_may_be_arrays_and_other_things_that_do_not_hash(
    tmp_path, scale, settings
):
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))

    def tree_of(number, scale):
        placed = NamedSharding(mesh, PartitionSpec())
        w = jax.device_put(jnp.full(3, number, jnp.float32), placed)
        return {"params": {"a": Scaled(w, scale), "frozen": jnp.ones(2)}}

    paths = []
    with ModelCheckpoint(tmp_path / "{epoch}", "loss", **settings) as ckpt:
        state = ckpt.init(like=tree_of(0, scale))
        for epoch in range(3):
            paths.append(ckpt.save(tree_of(epoch, scale), epoch))
            # Between them, static data that hashes.
            paths.append(ckpt.save(tree_of(epoch, "text"), epoch + 10))
            state = ckpt.update(state, tree_of(epoch, scale), {"loss": 1.0}, epoch + 20)
            ckpt.wait()
            paths.append(ckpt.latest.path)
    for number, path in enumerate(paths):
        loaded = flaxckpt.load(path, tree_of(9, scale))
        np.testing.assert_array_equal(loaded["params"]["a"].w, np.full(3, number // 3))


@pytest.mark.parametrize("number", [0, 1])
def test_a_leaf_may_change_between_saves(tmp_path, number):
    """Each other shape, dtype, kind, place or deletion of a leaf is noticed."""
    placed = jax.sharding.SingleDeviceSharding(jax.devices()[-1])
    leaves = [
        jnp.ones(3),
        jnp.ones(4),
        jnp.ones(3, jnp.int32),
        np.ones(3, np.float32),
        7,
        jax.random.key(1),
        jax.random.key(1, impl="rbg"),
        jax.device_put(jnp.ones(3), placed),
        jnp.ones(3),
        None,
    ]

    def tree_with(leaf):
        return {"a": jnp.zeros(2), "b": jnp.zeros(2)} | {"ab"[number]: leaf}

    paths = []
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        for epoch, leaf in enumerate(leaves):
            paths.append(ckpt.save(tree_with(leaf), epoch))
        deleted = tree_with(jnp.ones(3))
        deleted["ab"[number]].delete()
        with pytest.raises(flaxckpt.UnsupportedLeafError, match="was deleted"):
            ckpt.save(deleted, 99)
    for path, leaf in zip(paths, leaves, strict=True):
        tree = tree_with(leaf)
        loaded = flaxckpt.load(path, tree)
        assert jax.tree.map(bits_of, loaded) == jax.tree.map(bits_of, tree)
