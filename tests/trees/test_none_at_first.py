"""State that is None when a run begins and is filled later."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from hypothesis import given, settings
from saved_trees import assert_same

import flaxckpt
from flaxckpt import ModelCheckpoint

TX = optax.sgd(0.1)
CARRY = {
    "h": jnp.arange(3),
    "key": jax.random.key(1),
    "pair": (np.float32(2), [1.5, "text"]),
    "none": None,
}


class WithCarry(TrainState):
    carry: object = None


def begun(carry=None):
    return WithCarry.create(
        apply_fn=None, params={"w": jnp.ones(2)}, tx=TX, carry=carry
    )


def test_a_run_resumes_what_was_filled_meanwhile(tmp_path):
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        ckpt.save(begun(), epoch=0)
        tree, _, _ = ckpt.resume(begun())
        assert tree.carry is None
        ckpt.save(begun(CARRY), epoch=1)
        for like in (begun(), begun(CARRY)):
            tree, _, start = ckpt.resume(like)
            assert_same(tree, begun(CARRY))
        assert start == 2
        assert ckpt.restore(begun(), which=tmp_path / "1").tree.carry is None


def test_what_is_not_filled_yet_is_no_value_to_restore(tmp_path):
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        path = ckpt.save(begun(), epoch=0)
    with pytest.raises(
        flaxckpt.CheckpointMismatchError, match="checkpoint has nothing"
    ):
        flaxckpt.load(path, begun(CARRY))


def test_a_none_beside_a_function_or_with_cast(tmp_path):
    with jax.enable_x64(True), ModelCheckpoint(tmp_path / "a") as ckpt:
        path = ckpt.save({"f": None, "c": {"w": jnp.ones(2)}, "e": {}}, epoch=0)
    like = {"f": jnp.tanh, "c": None, "e": None}
    with pytest.raises(flaxckpt.CheckpointMismatchError, match="cast=True"):
        flaxckpt.load(path, like)
    found = flaxckpt.load(path, like, cast=True)
    assert found["c"]["w"].dtype == jnp.float32
    assert found["e"] is None


def with_none_at(tree, places):
    """Return a tree with None in place of some of its nodes."""
    if () in places:
        return None
    if not isinstance(tree, dict | list | tuple):
        return tree
    children = tree.items() if isinstance(tree, dict) else enumerate(tree)
    below = {
        key: with_none_at(child, {place[1:] for place in places if place[:1] == (key,)})
        for key, child in children
    }
    return below if isinstance(tree, dict) else type(tree)(below.values())


def places_in(tree, above=()):
    if isinstance(tree, dict | list | tuple):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, child in pairs:
            yield (*above, key)
            yield from places_in(child, (*above, key))


TREE = {
    "a": [1, {"b": np.arange(4), "c": (jnp.ones(2), "x", [2.5])}],
    "d": {"e": {"f": jnp.zeros((2, 2)), "g": None}},
    "i": jnp.int32(7),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    with ModelCheckpoint(tmp_path_factory.mktemp("none") / "a") as ckpt:
        return ckpt.save(TREE, epoch=0)


@given(st.sets(st.sampled_from(sorted(places_in(TREE), key=str)), max_size=6))
@settings(max_examples=60)
def test_a_none_anywhere_stands_for_what_is_stored_there(saved, places):
    like = with_none_at(TREE, places)
    assert_same(flaxckpt.load(saved, like), TREE)
