"""Log checkpoints to TensorBoard, by way of tensorboardX."""

import os
from collections.abc import Callable
from typing import Any

from flaxckpt._disk.info import CheckpointInfo
from flaxckpt.errors import SettingError
from flaxckpt.integrations._needed import needed
from flaxckpt.integrations._values import values_of

_FLUSH_SECS = 1  # at each save a few events, which TensorBoard may be waiting for


def log_to(
    writer: str | os.PathLike[str] | Any, *, prefix: str = "checkpoint"
) -> Callable[[CheckpointInfo], None]:
    """Return a function for `on_saved` that writes event files for TensorBoard.

    For each checkpoint it writes, at the checkpoint's `step`, the numbers in the logs
    (`checkpoint/val_loss`), the path as text (`checkpoint/path`), and whether it is the
    best by then (`checkpoint/is_best`, 1 or 0).

    Args:
        writer: The directory of the event files, or a `SummaryWriter` of tensorboardX
            or PyTorch, which the loop may use as well.
        prefix: What the tags begin with.

    Raises:
        ModuleNotFoundError: If `writer` is a directory and tensorboardX is missing.
        SettingError: If `writer` is neither.

    Example:
        >>> import flaxckpt, numpy as np
        >>> with flaxckpt.ModelCheckpoint(
        ...     "runs/{epoch}", on_saved=log_to("events")
        ... ) as ckpt:
        ...     path = ckpt.save({"w": np.ones(2)}, epoch=0, logs={"val_loss": 0.5})
        >>> [name.partition(".")[0] for name in os.listdir("events")]
        ['events']
    """
    events: Any = writer
    if isinstance(writer, str | os.PathLike):
        library, directory = needed("tensorboardX", "tensorboard"), os.fspath(writer)
        events = library.SummaryWriter(directory, flush_secs=_FLUSH_SECS)
    if not hasattr(events, "add_scalar"):
        shown = f"<{type(writer).__name__}>"
        raise SettingError("writer", shown, "pass a directory, or a SummaryWriter.")

    def log(info: CheckpointInfo) -> None:
        for tag, value in values_of(info, prefix).items():
            events.add_scalar(tag, value, info.step)
        events.add_text(f"{prefix}/path", str(info.path), info.step)
        events.flush()

    log.__qualname__ = "tensorboard.log_to"  # as errors name it
    return log
