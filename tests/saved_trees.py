"""A tree is saved in one line, and compared bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np

import flaxckpt


def saved(directory, tree, **settings):
    """Save a tree and return its path."""
    with flaxckpt.ModelCheckpoint(directory / "{epoch}", **settings) as ckpt:
        return ckpt.save(tree, epoch=len(ckpt.checkpoints))


def bits_of(leaf):
    """Return type, dtype, shape and bytes of a leaf; of PRNG keys, those of their data."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    return type(leaf), array.dtype, array.shape, array.tobytes()


def structs_of(tree):
    """Return a tree with `ShapeDtypeStruct`s in place of its JAX arrays."""

    def struct(leaf):
        if not isinstance(leaf, jax.Array):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    return jax.tree.map(struct, tree)


def assert_same(one, other):
    """Equal in structure, kind, dtype and bits."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert isinstance(a, jax.Array) == isinstance(b, jax.Array)
        if isinstance(a, jax.Array):
            assert a.dtype == b.dtype
            if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
                a, b = jax.random.key_data(a), jax.random.key_data(b)
        else:
            assert type(a) is type(b)
            if isinstance(a, int):  # numpy has no large ones
                assert a == b
                continue
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
