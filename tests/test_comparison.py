"""What docs/comparison.md and docs/migration say was seen of other libraries.

If one of these fails with a newer version of a library, the pages have to change.
"""

import contextlib
import math
import os
import signal
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint import v1

import flaxckpt

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
SAVE_FOREVER = """
import keras
model = keras.Sequential([keras.Input((2000,)), keras.layers.Dense(4000)])
model.save("model.keras")
print("saved", flush=True)
while True:
    model.save("model.keras")
"""
MANAGE = """
import sys, time
import jax.numpy as jnp
import orbax.checkpoint as ocp
options = ocp.CheckpointManagerOptions(save_interval_steps=1000)
with ocp.CheckpointManager(sys.argv[1], options=options) as manager:
    for step in range(1, 10_000):
        manager.save(step, args=ocp.args.StandardSave({"w": jnp.ones(3)}))
        if manager.reached_preemption(step):
            break
        time.sleep(0.05)
        if step == 3:
            print("running", flush=True)
"""


@pytest.fixture
def tree():
    return {"w": np.random.default_rng(0).normal(size=(300, 300)).astype("float32")}


def flip_a_bit(path):
    """Flip one bit in the middle of a file, or of the largest file of a directory."""
    files = [file for file in (path, *path.rglob("*")) if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    stored = bytearray(largest.read_bytes())
    stored[len(stored) // 2] ^= 64
    largest.write_bytes(stored)


def save_all(directory, losses, **options):
    """Save a tree with each of some losses, and return the manager's best and all."""
    options = ocp.CheckpointManagerOptions(**options)
    with ocp.CheckpointManager(directory, options=options) as manager:
        for step, loss in enumerate(losses):
            args = ocp.args.StandardSave({"w": jnp.ones(3)})
            manager.save(step, args=args, metrics={"loss": loss})
        manager.wait_until_finished()
        return manager.best_step(), manager.all_steps()


def test_a_flipped_bit_comes_back_from_orbax_in_silence(tmp_path, tree):
    v1.save(tmp_path / "v1", tree)
    flip_a_bit(tmp_path / "v1")
    assert not np.array_equal(v1.load(tmp_path / "v1")["w"], tree["w"])
    with ocp.CheckpointManager(tmp_path / "v0") as manager:
        manager.save(0, args=ocp.args.StandardSave(tree))
    flip_a_bit(tmp_path / "v0")
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "v0/0/default", tree)
    assert not np.array_equal(restored["w"], tree["w"])


def test_a_flipped_bit_comes_back_from_msgpack_in_silence(tmp_path, tree):
    from flax import serialization

    path = tmp_path / "file"
    path.write_bytes(serialization.to_bytes(tree))
    flip_a_bit(path)
    restored = serialization.from_bytes(tree, path.read_bytes())
    assert not np.array_equal(restored["w"], tree["w"])


def test_a_flipped_bit_is_an_error_here(tmp_path, tree):
    with flaxckpt.ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        path = ckpt.save(tree, epoch=0)
    flip_a_bit(path)
    with pytest.raises(flaxckpt.CheckpointCorruptError, match=r"\bw\b"):
        flaxckpt.load(path)


def test_best_fn_with_a_nan_kept_a_worse_one(tmp_path):
    options = {
        "best_fn": lambda metrics: metrics["loss"],
        "best_mode": "min",
        "max_to_keep": 1,
    }
    plain = save_all(tmp_path / "plain", [0.5, 0.2, 0.3, 0.4], **options)
    assert plain == (1, [1])
    with_nan = save_all(tmp_path / "nan", [0.5, 0.2, math.nan, 0.4], **options)
    assert with_nan == (3, [3])


def test_a_checkpoint_manager_refuses_jit_and_lower_steps(tmp_path):
    with ocp.CheckpointManager(tmp_path) as manager:

        def save(step, w, **force):
            args = ocp.args.StandardSave({"w": w})
            return manager.save(step, args=args, **force)

        assert [save(step, jnp.ones(2)) for step in (30, 10)] == [True, False]
        assert save(10, jnp.ones(2), force=True)
        with pytest.raises(ValueError, match="TypeHandler lookup failed"):
            jax.jit(lambda w: save(40, w))(jnp.ones(2))


def test_two_checkpoint_managers_both_save(tmp_path):
    with ocp.CheckpointManager(tmp_path) as one, ocp.CheckpointManager(tmp_path) as two:
        for step, manager in enumerate([one, two]):
            assert manager.save(step, args=ocp.args.StandardSave({"w": jnp.ones(2)}))
            manager.wait_until_finished()


def test_partial_loading_of_orbax(tmp_path):
    stored = {"w": jnp.ones(3), "h": jnp.ones(2)}
    v1.save(tmp_path / "v1", stored)
    context = v1.Context()
    context.pytree_options.loading.partial_load = True
    with context:
        loaded = v1.load(tmp_path / "v1", {"w": jnp.zeros(3), "new": jnp.zeros(4)})
        assert {name: leaf.shape for name, leaf in loaded.items()} == {
            "w": (3,),
            "new": (4,),
        }
        with pytest.raises(ValueError, match="not compatible with the stored shape"):
            v1.load(tmp_path / "v1", {"w": jnp.zeros(5)})


def test_sigterm_ends_a_checkpoint_manager_of_one_process(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", MANAGE, tmp_path / "run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        process.stdout.readline()
        process.terminate()
    assert process.returncode == -signal.SIGTERM
    names = {path.name for path in (tmp_path / "run").glob("[0-9]*")}
    assert names <= {"1", "1.orbax-checkpoint-tmp"}  # the first, done or not


@pytest.fixture
def keras(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    return pytest.importorskip("keras")


def make_model(keras):
    model = keras.Sequential([keras.Input((300,)), keras.layers.Dense(300)])
    model.compile("sgd", "mse")
    return model


def test_a_flipped_bit_in_files_of_keras(tmp_path, keras):
    model = make_model(keras)
    kernel = model.get_weights()[0].copy()
    model.save_weights(tmp_path / "model.weights.h5")
    flip_a_bit(tmp_path / "model.weights.h5")
    model.load_weights(tmp_path / "model.weights.h5")
    assert not np.array_equal(model.get_weights()[0], kernel)
    model.save(tmp_path / "model.keras")
    flip_a_bit(tmp_path / "model.keras")
    with pytest.raises(zipfile.BadZipFile):
        keras.models.load_model(tmp_path / "model.keras")


def test_what_the_callback_of_keras_takes_for_the_best(tmp_path, keras):
    def best_of(losses):
        saver = keras.callbacks.ModelCheckpoint(
            str(tmp_path / "best.keras"), "val_loss", save_best_only=True
        )
        saver.set_model(make_model(keras))
        for epoch, loss in enumerate(losses):
            saver.on_epoch_end(epoch, {"val_loss": loss})
        return saver.best

    assert math.isnan(best_of([math.nan, 0.5, 0.2]))
    assert best_of([0.9]) == 0.9  # of a new run, beside a better file


def test_a_kill_may_lose_the_file_of_keras(tmp_path, keras):
    """Where it comes late, the file is whole by then: one of ten is early enough."""
    for number in range(10):
        directory = tmp_path / str(number)
        directory.mkdir()
        kill_in_a_save(directory)
        if not (directory / "model.keras").exists():
            return
        with contextlib.suppress(ValueError, zipfile.BadZipFile):
            keras.models.load_model(directory / "model.keras")
            continue
        return
    pytest.fail("none of ten kills lost the file")


def kill_in_a_save(directory):
    """Kill a process of SAVE_FOREVER once its file has neither its old nor no size."""
    with subprocess.Popen(
        [sys.executable, "-c", SAVE_FOREVER],
        cwd=directory,
        env={**os.environ, "KERAS_BACKEND": "jax"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        process.stdout.readline()
        file = directory / "model.keras"
        whole = file.stat().st_size
        while (file.stat().st_size if file.exists() else 0) in (0, whole):
            assert process.poll() is None
        process.kill()
