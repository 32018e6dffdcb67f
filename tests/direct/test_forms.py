"""Which forms are remembered, and for how long."""

import jax
import jax.numpy as jnp
import pytest

from flaxckpt import ModelCheckpoint
from flaxckpt._direct import forms as _forms
from flaxckpt._direct.forms import shared_forms


def save(directory, tree, times, **settings):
    with ModelCheckpoint(directory / "{epoch}", **settings) as ckpt:
        for epoch in range(times):
            ckpt.save(tree, epoch)
            ckpt.wait()
    return ckpt.counts


def tree_of(size):
    return {"w": jnp.ones(size)}


@pytest.mark.direct
def test_the_forms_used_last_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(_forms, "_REMEMBERED", 2)
    for number, (size, direct) in enumerate(
        [(1, 0), (2, 0), (1, 1), (3, 0), (1, 1), (2, 0), (3, 0)]
    ):
        counts = save(tmp_path / str(number), tree_of(size), 1)
        assert (counts.direct, counts.by_orbax) == (direct, 1 - direct), number


@pytest.mark.direct
def test_one_series_does_not_push_out_the_forms_of_others(tmp_path):
    save(tmp_path / "one", tree_of(3), 1)
    frozen = {"frozen": lambda path, leaf: True, "engine": "orbax"}
    assert save(tmp_path / "other", tree_of(5), 3, **frozen).by_orbax == 3
    assert len(shared_forms()._known) == 2
    assert save(tmp_path / "one more", tree_of(3), 1).direct == 1


@pytest.mark.direct
@pytest.mark.parametrize(
    ("other", "is_known"),
    [
        (lambda: {"w": jnp.zeros(4)}, True),
        (lambda: {"w": jnp.zeros(5)}, False),
        (lambda: {"w": jnp.zeros(4, jnp.int32)}, False),
        (lambda: {"v": jnp.zeros(4)}, False),
        (lambda: {"w": jnp.zeros((4,)), "n": 1}, False),
        (lambda: [jnp.zeros(4)], False),
        (lambda: {"w": jax.device_put(jnp.zeros(4), jax.devices()[1])}, False),
        (lambda: {"w": jnp.zeros(4).__array__()}, False),
    ],
)
def test_a_form_is_for_one_structure_and_placement(tmp_path, other, is_known):
    save(tmp_path / "one", tree_of(4), 1)
    assert save(tmp_path / "other", other(), 1).direct == is_known
