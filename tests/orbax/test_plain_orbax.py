"""Plain Orbax, v1 and v0, reads what was saved in each way."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1

from flaxckpt import ModelCheckpoint
from flaxckpt._checkpoints import write as _write

WAYS = {
    "direct": {},
    "by Orbax": {"engine": "orbax"},
    "compressed": {"compress": True},
    "linked": {"frozen": lambda path, leaf: path[0] == "base"},
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

    def bits(leaf):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(
            leaf.dtype, jax.dtypes.prng_key
        ):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        return str(array.dtype), array.shape, array.tobytes()

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): bits(leaf) for path, leaf in leaves}


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
    like = jax.tree.map(
        lambda x: (
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            if isinstance(x, jax.Array)
            else x
        ),
        tree,
    )
    assert plain(v1.load(path)) == plain(tree)
    assert plain(v1.load(path, like)) == plain(tree)
    with v0.StandardCheckpointer() as reader:
        assert plain(reader.restore(path / "state", like)) == plain(tree)
        assert plain(reader.restore(path / "state")) == plain(tree)
