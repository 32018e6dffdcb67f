"""Checked by mypy and pyright, never run: the public names as a user types them."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import flaxckpt
from flaxckpt.integrations import keras as of_keras
from flaxckpt.integrations import mlflow, tensorboard, wandb


def train(params: dict[str, jax.Array]) -> None:
    with flaxckpt.ModelCheckpoint(
        Path("runs") / "{epoch}", "val_loss", save_best_only=True, max_to_keep=2
    ) as ckpt:
        found = ckpt.restore(like=params)
        state = ckpt.init() if found is None else found.state
        for epoch in range(3):
            state = ckpt.update(state, params, {"val_loss": jnp.ones(())}, epoch)
        path: Path = ckpt.save(params, epoch=3, logs=None, state=state)
        params, state, start = ckpt.resume(params)
        for step in range(start, 3):
            state = ckpt.update(state, params, {}, step=step)
        ckpt.save(params, step=3)
        batch: int = start.batch_in(0)
        print(batch)
        ckpt.wait()
        best = ckpt.best
        if best is not None:
            epoch_of_best: int = best.epoch
            print(epoch_of_best, best.logs["val_loss"], best.path / "x", path)
    tree: Any = flaxckpt.load_weights(path)
    print(tree)
    file: Path = flaxckpt.export(path, "m.safetensors", max_shard_bytes=5 * 10**9)
    print(file)
    for info in flaxckpt.watch("runs", poll_secs=0.5, timeout_secs=60):
        flaxckpt.delete(info)
    flaxckpt.delete(path)


def tell(info: flaxckpt.CheckpointInfo) -> None:
    print(info.path, info.is_best)


def train_and_tell(params: dict[str, jax.Array]) -> None:
    with flaxckpt.ModelCheckpoint("runs/{epoch}", on_saved=tell) as ckpt:
        if not ckpt.finished:
            ckpt.save(params, epoch=0)
            ckpt.finish()
    flaxckpt.ModelCheckpoint(
        "runs/{epoch}", on_saved=[tell, print, wandb.log_to(), mlflow.log_to()]
    )
    flaxckpt.ModelCheckpoint("x", on_saved=tensorboard.log_to("events"))


def decide(state: flaxckpt.CheckpointState, loss: jax.Array) -> jax.typing.ArrayLike:
    state, save = flaxckpt.step(state, {"val_loss": loss}, 0, batch=None)
    return save


def fit_keras(path: Path) -> None:
    saver = of_keras.ModelCheckpoint(path / "{epoch}", "loss", max_to_keep=2)
    infos: tuple[flaxckpt.CheckpointInfo, ...] = saver.checkpoints
    for info in (*infos, saver.best, saver.latest):
        if info is not None:
            print(info.epoch)


def fails() -> None:
    flaxckpt.ModelCheckpoint("x", save_top_k=3)  # type: ignore[arg-type]
    try:
        flaxckpt.load("x")
    except flaxckpt.CheckpointMismatchError as error:
        print(error.differences[0].path)
