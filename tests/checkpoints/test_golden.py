"""Checkpoints that earlier versions wrote can be read, whole and bit for bit."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from golden import make

import flaxckpt
from flaxckpt._disk.record import FORMAT

FORMATS = sorted(make.HERE.glob("format-*"))


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if isinstance(b, jax.Array) and jax.dtypes.issubdtype(
            b.dtype, jax.dtypes.prng_key
        ):
            assert a.dtype == b.dtype
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert type(a) is type(b)
        if hasattr(b, "dtype"):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            a, b = np.asarray(a).tobytes(), np.asarray(b).tobytes()
        assert a == b


def test_there_is_one_of_each_format():
    names = [directory.name for directory in FORMATS]
    assert names == [f"format-{number + 1}" for number in range(FORMAT)]


@pytest.mark.parametrize("directory", FORMATS, ids=lambda path: path.name)
def test_reads(directory):
    infos = flaxckpt.list_checkpoints(directory)
    assert [info.path.name for info in infos] == ["01-0.50", "02-0.25", "weights"]
    assert [(info.epoch, info.batch) for info in infos] == [(0, 1), (1, 1), (7, None)]
    assert infos[0].logs["val_loss"] == 0.5
    assert np.isnan(infos[0].logs["nan"])
    for info in infos[:2]:
        flaxckpt.verify(info.path)
        assert_same(flaxckpt.load(info.path, make.tree_of(5)), make.tree_of(info.epoch))
        params = flaxckpt.load_weights(info.path)["params"]
        assert params["float32"].tolist() == [[0, 1 * info.epoch, 2 * info.epoch],
                                              [3 * info.epoch, 4 * info.epoch, 5 * info.epoch]]  # fmt: skip
    assert infos[2].weights_only
    weights = {"params": make.tree_of(7)["params"]}
    assert_same(flaxckpt.load(infos[2].path, weights), weights)


@pytest.mark.parametrize("directory", FORMATS, ids=lambda path: path.name)
def test_goes_on(directory, tmp_path):
    """A run that an earlier version began is resumed."""
    here = Path(shutil.copytree(directory, tmp_path / "run"))
    path = here / "{epoch:02d}-{val_loss:.2f}"
    with flaxckpt.ModelCheckpoint(path, save_freq=2, max_to_keep=2) as ckpt:
        found = ckpt.restore(like=make.tree_of(0))
        assert (found.epoch, found.batch, int(found.state.batches)) == (1, 1, 4)
        assert_same(found.tree, make.tree_of(1))
        state = ckpt.update(found.state, found.tree, {"val_loss": 0.3}, 2, 0)
        ckpt.update(state, found.tree, {"val_loss": 0.125}, 2, 1)
    names = [info.path.name for info in ckpt.checkpoints]
    assert names == ["02-0.25", "03-0.12"]
