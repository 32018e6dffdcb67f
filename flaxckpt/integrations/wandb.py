"""Log checkpoints to Weights & Biases."""

import re
from collections.abc import Callable
from typing import Any

from flaxckpt._disk.info import CheckpointInfo
from flaxckpt._object_store.url import is_url
from flaxckpt.errors import SettingError
from flaxckpt.integrations._needed import needed
from flaxckpt.integrations._values import values_of


def log_to(
    run: Any = None,
    *,
    prefix: str = "checkpoint",
    files: bool = False,
    commit: bool = True,
) -> Callable[[CheckpointInfo], None]:
    """Return a function for `on_saved` that logs to a run of Weights & Biases.

    For each checkpoint it logs a row: the numbers in the logs (`checkpoint/val_loss`),
    the path (`checkpoint/path`), and whether it is the best by then
    (`checkpoint/is_best`, 1 or 0). Charts show them over `checkpoint/step`. The run's
    summary has the path of the best checkpoint, `checkpoint/best_path`.

    Args:
        run: The run; None for the one that `wandb.init` has begun.
        prefix: What the names begin with.
        files: Whether to log the checkpoint as an artifact `checkpoint-RUN` of type
            `model`, with the alias `best` if it is the best: its files from a disk, a
            reference from an object store, for which W&B needs `wandb[gcp]` or
            `wandb[aws]`.
        commit: Whether each checkpoint is a row of its own, which ends the row that the
            loop has begun. A loop that calls `run.log` several times with one `step`
            passes False: the values then go into the row that the loop ends next.

    Raises:
        ModuleNotFoundError: If wandb is missing.
        SettingError: If no run has begun.

    Example:
        >>> import flaxckpt, wandb, numpy as np
        >>> with wandb.init() as run:
        ...     with flaxckpt.ModelCheckpoint(
        ...         "runs/{epoch}", on_saved=log_to(run)
        ...     ) as ckpt:
        ...         path = ckpt.save({"w": np.ones(2)}, 0, logs={"val_loss": 0.5})
        ...     run.summary["checkpoint/val_loss"]
        0.5
    """
    library = needed("wandb", "wandb")
    run = run or library.run
    if run is None:
        raise SettingError("run", None, "call wandb.init() first, or pass its run.")
    run.define_metric(f"{prefix}/step", hidden=True)
    run.define_metric(f"{prefix}/*", step_metric=f"{prefix}/step")
    name = re.sub(r"[^\w\-.]", "_", f"{prefix}-{run.id}")

    def log(info: CheckpointInfo) -> None:
        path = str(info.path)
        row = {f"{prefix}/step": info.step, f"{prefix}/path": path}
        run.log({**row, **values_of(info, prefix)}, commit=commit)
        if info.is_best:
            run.summary[f"{prefix}/best_path"] = path
        if files:
            of_info = {"path": path, "step": info.step, "epoch": info.epoch}
            artifact = library.Artifact(
                name, "model", metadata={**of_info, "logs": dict(info.logs)}
            )
            if is_url(info):
                artifact.add_reference(path, checksum=False)
            else:
                artifact.add_dir(path)
            aliases = ["latest", *["best"] * bool(info.is_best)]
            run.log_artifact(artifact, aliases=aliases)

    log.__qualname__ = "wandb.log_to"  # as errors name it
    return log
