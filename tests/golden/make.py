"""Writes checkpoints of today's format, for tests of later versions to read.

    python tests/golden/make.py

Run it once for each number of `FORMAT` in flaxckpt/_disk/record.py, and never again for an
old one: what is in a directory here stays as it was written then.
"""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import flaxckpt
from flaxckpt._disk.record import FORMAT

HERE = Path(__file__).parent


def tree_of(epoch):
    """A leaf of each kind."""
    return {
        "params": {
            "float32": np.arange(6, dtype=np.float32).reshape(2, 3) * epoch,
            "bfloat16": np.array([1.5, -2, np.inf], ml_dtypes.bfloat16),
            "int8": jnp.array([[-128, 127]], jnp.int8),
            "bool": np.array([True, False]),
            "complex64": np.array([1 + 2j], np.complex64),
            "empty": np.zeros((0, 4), np.float32),
        },
        "opt_state": ((jnp.array(0.25), None), []),
        "step": np.int64(2**40 + epoch),
        "key": jax.random.key(epoch),
        "rbg": jax.random.key(epoch, impl="rbg"),
        "epoch": epoch,
        "rate": 0.1,
        "done": False,
        "name": f"epoch {epoch}, ünïcode",
        "raw": b"\x00\xff",
    }


def main():
    directory = HERE / f"format-{FORMAT}"
    shutil.rmtree(directory, ignore_errors=True)
    path = directory / "{epoch:02d}-{val_loss:.2f}"
    with flaxckpt.ModelCheckpoint(path, save_freq=2, save_last=True) as ckpt:
        state = ckpt.init()
        for epoch, loss in enumerate([0.5, 0.25]):
            for batch in range(2):
                logs = {"val_loss": loss, "nan": float("nan")}
                state = ckpt.update(state, tree_of(epoch), logs, epoch, batch)
    with flaxckpt.ModelCheckpoint(
        directory / "weights", save_best_only=True, save_weights_only=True
    ) as ckpt:
        ckpt.update(ckpt.init(), tree_of(7), {"val_loss": 0.125}, 7)


if __name__ == "__main__":
    main()
