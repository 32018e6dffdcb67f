"""What others do: each way to save, behind the same three calls.

`save(tree, step)` starts a save, and returns when the training loop may go on;
`wait()` returns when all is done, as far as that way can tell; `load(tree)` reads the
last one back. Each keeps the newest save only.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0
import safetensors.numpy
from orbax.checkpoint import v1

import flaxckpt


class Flaxckpt:
    """flaxckpt, in its default settings but for those given."""

    def __init__(self, directory: Path, **settings) -> None:
        self._ckpt = flaxckpt.ModelCheckpoint(directory / "last", **settings)
        self.counts = self._ckpt.counts

    def save(self, tree, step):
        self._ckpt.save(tree, epoch=step)

    def wait(self):
        self._ckpt.wait()

    def load(self, like):
        return self._ckpt.restore(like).tree

    def load_unverified(self, like):
        return self._ckpt.restore(like, verify=False).tree

    def close(self):
        self._ckpt.close()


class OrbaxManager:
    """Orbax's v0 `CheckpointManager`, asynchronous, keeping one."""

    def __init__(self, directory: Path) -> None:
        options = v0.CheckpointManagerOptions(max_to_keep=1)
        self._manager = v0.CheckpointManager(directory, options=options)

    def save(self, tree, step):
        self._manager.save(step, args=v0.args.StandardSave(tree), force=True)

    def wait(self):
        self._manager.wait_until_finished()

    def load(self, like):
        step = self._manager.latest_step()
        return self._manager.restore(step, args=v0.args.StandardRestore(like))

    def close(self):
        self._manager.close()


class OrbaxCheckpointer:
    """Orbax's v1 `training.Checkpointer`, asynchronous, keeping one.

    With `best`, in the settings that measured best here: no compression, a file for
    each array, no validation.
    """

    def __init__(self, directory: Path, best: bool = False) -> None:
        context = v1.Context()
        if best:
            context.array.saving.use_compression = False
            context.array.saving.use_ocdbt = False
            context.array.saving.enable_post_merge_validation = False
            context.memory.deepcopy_host_arrays = False
        policy = v1.training.preservation_policies.LatestN(1)
        self._checkpointer = v1.training.Checkpointer(
            directory, context=context, preservation_policy=policy
        )
        self._running = None

    def save(self, tree, step):
        self.wait()
        self._running = self._checkpointer.save_async(step, tree, force=True)

    def wait(self):
        if self._running:
            self._running.result()

    def load(self, like):
        return self._checkpointer.load(abstract_state=like)

    def close(self):
        self._checkpointer.close()


class KerasOrbax:
    """Keras's `OrbaxCheckpoint`, on a Keras model with variables of the same sizes."""

    def __init__(self, directory: Path) -> None:
        import keras

        self._directory, self._keras, self._callback = directory, keras, None

    def save(self, tree, step):
        model = self._model(tree)
        if self._callback is None:
            self._callback = self._make()
            self._callback.set_model(model)
        self._save(step)

    def _make(self):
        return self._keras.callbacks.OrbaxCheckpoint(
            self._directory, max_to_keep=1, save_weights_only=True
        )

    def _save(self, step):
        self._callback._save_checkpoint(step)

    def _model(self, tree):
        if not hasattr(self, "_built"):
            layer = self._keras.layers.Layer()
            for name, value in tree.items():
                layer.add_weight(shape=value.shape, dtype=str(value.dtype), name=name)
            self._built = self._keras.Sequential([layer])
            self._built.build((1, 1))
            self._built.compile("sgd", "mse")
        for variable, value in zip(self._built.weights, tree.values(), strict=True):
            # As Keras's trainer does. A copy, for the loop donates its own.
            variable.assign(jnp.copy(value))
        return self._built

    def wait(self):
        if self._callback is not None:
            self._callback.wait_until_finished()

    def load(self, like):
        raise NotImplementedError

    def close(self):
        self.wait()


class KerasModelCheckpoint(KerasOrbax):
    """Keras's `ModelCheckpoint`, weights only, in HDF5."""

    def _make(self):
        path = str(self._directory / "last.weights.h5")
        self._directory.mkdir(parents=True, exist_ok=True)
        return self._keras.callbacks.ModelCheckpoint(path, save_weights_only=True)

    def _save(self, step):
        self._callback._save_model(epoch=step, batch=None, logs={})

    def wait(self):
        pass


class Msgpack:
    """Flax's msgpack, as `flax.training.checkpoints` wrote it."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / "last.msgpack"

    def save(self, tree, step):
        temporary = self._path.with_suffix(".tmp")
        temporary.write_bytes(flax.serialization.to_bytes(jax.device_get(tree)))
        temporary.replace(self._path)

    def wait(self):
        pass

    def load(self, like):
        return flax.serialization.from_bytes(like, self._path.read_bytes())

    def close(self):
        pass


class Safetensors(Msgpack):
    """safetensors, from numpy."""

    def save(self, tree, step):
        temporary = self._path.with_suffix(".tmp")
        safetensors.numpy.save_file(jax.device_get(tree), temporary)
        temporary.replace(self._path)

    def load(self, like):
        return safetensors.numpy.load_file(self._path)


class Raw(Msgpack):
    """The arrays' bytes into one file: what the system's `write` takes."""

    sync = False

    def save(self, tree, step):
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("wb", buffering=0) as file:
            for value in jax.tree.leaves(tree):
                left = memoryview(np.asarray(value).reshape(-1).view(np.uint8))
                while left:
                    left = left[file.write(left) :]
            if self.sync:
                os.fsync(file.fileno())
        temporary.replace(self._path)

    def load(self, like):
        found, offset = [], 0
        for leaf in jax.tree.leaves(like):
            count = int(np.prod(leaf.shape))
            found.append(
                np.fromfile(self._path, leaf.dtype, count, offset=offset).reshape(
                    leaf.shape
                )
            )
            offset += found[-1].nbytes
        return jax.tree.unflatten(jax.tree.structure(like), found)


class RawSynced(Raw):
    """The same, and `fsync`."""

    sync = True


ALL = {
    "flaxckpt": Flaxckpt,
    "Orbax v0 CheckpointManager": OrbaxManager,
    "Orbax v1 Checkpointer": OrbaxCheckpointer,
    "Orbax v1, best settings": lambda path: OrbaxCheckpointer(path, best=True),
    "Keras OrbaxCheckpoint": KerasOrbax,
    "Keras ModelCheckpoint": KerasModelCheckpoint,
    "Flax msgpack": Msgpack,
    "safetensors": Safetensors,
    "raw write": Raw,
    "raw write + fsync": RawSynced,
}


def make(name: str, root: Path):
    """Make a way to save, in an empty directory of its own."""
    directory = root / name.replace(" ", "-").replace(",", "")
    shutil.rmtree(directory, ignore_errors=True)
    return ALL[name](directory)


def make_all(root: Path, names: Sequence[str] = ()):
    """Make all ways to save, or those named."""
    return {name: make(name, root) for name in names or ALL}
