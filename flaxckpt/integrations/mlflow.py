"""Log checkpoints to MLflow."""

import re
from collections.abc import Callable

from flaxckpt._disk.info import CheckpointInfo
from flaxckpt._object_store.url import is_url
from flaxckpt.errors import CheckpointPathError, SettingError
from flaxckpt.integrations._needed import needed
from flaxckpt.integrations._values import values_of

_REFUSED = re.compile(r"[^\w\-. :/]")  # in names of metrics


def log_to(
    run_id: str | None = None, *, prefix: str = "checkpoint", files: bool = False
) -> Callable[[CheckpointInfo], None]:
    """Return a function for `on_saved` that logs to a run of MLflow.

    For each checkpoint it logs, at the checkpoint's `step`, the numbers in the logs
    (`checkpoint/val_loss`) and whether it is the best by then (`checkpoint/is_best`, 1
    or 0). The run's tags `checkpoint/path` and `checkpoint/best_path` are the paths of
    the newest and of the best checkpoint.

    Args:
        run_id: The run; None for the active run of this thread.
        prefix: What the names begin with.
        files: Whether to upload the checkpoint's files, as the artifact
            `checkpoint/NAME`. MLflow takes files on a disk alone.

    Raises:
        ModuleNotFoundError: If MLflow is missing.
        SettingError: If there is no active run.

    Example:
        >>> import flaxckpt, mlflow, numpy as np
        >>> with mlflow.start_run() as run:
        ...     with flaxckpt.ModelCheckpoint(
        ...         "runs/{epoch}", on_saved=log_to()
        ...     ) as ckpt:
        ...         path = ckpt.save({"w": np.ones(2)}, 0, logs={"val_loss": 0.5})
        >>> mlflow.get_run(run.info.run_id).data.metrics["checkpoint/val_loss"]
        0.5
    """
    library = needed("mlflow", "mlflow")
    entities = needed("mlflow.entities", "mlflow")
    if run_id is None:
        active = library.active_run()
        if active is None:
            advice = "call mlflow.start_run() first, or pass a run's id."
            raise SettingError("run_id", None, advice)
        run_id = active.info.run_id
    # The active run is that of a thread, and `on_saved` is called on another one.
    client = library.MlflowClient()

    def log(info: CheckpointInfo) -> None:
        time = int(info.time.timestamp() * 1000)
        metrics = [
            entities.Metric(_REFUSED.sub("_", name), value, time, info.step)
            for name, value in values_of(info, prefix).items()
        ]
        tags = {f"{prefix}/path": str(info.path)}
        if info.is_best:
            tags[f"{prefix}/best_path"] = str(info.path)
        tags = [entities.RunTag(name, text) for name, text in tags.items()]
        client.log_batch(run_id, metrics=metrics, tags=tags)
        if files:
            if is_url(info):
                raise CheckpointPathError(
                    str(info.path),
                    "is in an object store, and MLflow takes files on a disk alone. "
                    "Leave out files=True: the run's tags say where the checkpoint is.",
                )
            client.log_artifacts(run_id, str(info.path), f"{prefix}/{info.path.name}")

    log.__qualname__ = "mlflow.log_to"  # as errors name it
    return log
