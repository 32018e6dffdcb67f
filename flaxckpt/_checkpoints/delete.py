"""Delete one checkpoint, as the writer of its series would."""

import os
from pathlib import Path
from typing import Never

from flaxckpt._checkpoints.found import found_at
from flaxckpt._checkpoints.undisturbed import check_same, not_found
from flaxckpt._disk.area import Area
from flaxckpt._disk.disk_area import DiskArea
from flaxckpt._disk.info import CheckpointInfo
from flaxckpt._disk.record import read_record
from flaxckpt._disk.series_names import names_of
from flaxckpt._object_store.scratch import mirrored
from flaxckpt._object_store.source import fetched
from flaxckpt._object_store.store_area import StoreArea
from flaxckpt._object_store.url import absolute, check_is_path, is_url
from flaxckpt._orbax.recognize import is_readable
from flaxckpt.errors import CheckpointNotFoundError, CheckpointPathError


def delete(checkpoint: str | os.PathLike[str]) -> None:
    """Delete a checkpoint: its name at once, and then its files.

    Whenever the process is killed, the checkpoint is whole or gone. Nobody else may be
    writing the checkpoints of its filepath. In the process that writes them, and so in
    a function of `on_saved`, the call works at any time.

    Args:
        checkpoint: The checkpoint's path or URL. A `CheckpointInfo` stands for that
            very checkpoint: one that has replaced it stays.

    Raises:
        CheckpointNotFoundError: If no checkpoint is there, or another one by now.
        CheckpointPathError: If Orbax alone wrote it, if another checkpoint is in it, or
            if it cannot be deleted.
        CheckpointCorruptError: If its record is damaged, so nobody knows whose it is.
        CheckpointLockedError: If another process writes these checkpoints.
        SettingError: If `checkpoint` is no path.
        CheckpointError: If the object store cannot be reached.

    Example:
        >>> import flaxckpt, numpy as np
        >>> with flaxckpt.ModelCheckpoint("some/{epoch}") as ckpt:
        ...     for epoch in range(2):
        ...         path = ckpt.save({"w": np.ones(2)}, epoch)
        >>> delete(flaxckpt.list_checkpoints("some")[0])
        >>> [info.epoch for info in flaxckpt.list_checkpoints("some")]
        [1]
    """
    check_is_path("checkpoint", checkpoint, "pass a checkpoint, or its path.")
    shown = absolute(checkpoint)
    found = found_at(shown)
    if found is None:
        _refuse(shown)
    root, info = found
    wanted = checkpoint if isinstance(checkpoint, CheckpointInfo) else info
    area, path = _area_of(root, info, shown)
    try:
        _delete(area, path, wanted, shown)
    except FileNotFoundError as error:  # somebody has deleted it by hand
        raise CheckpointNotFoundError(shown) from error
    except OSError as error:
        raise CheckpointPathError(
            shown,
            f"cannot be deleted: {error.strerror}. It is whole. Make its directory "
            "writable, or have its owner delete it.",
        ) from error


def _refuse(shown: str) -> Never:
    """Raise the error for a path or URL at which flaxckpt wrote no checkpoint."""
    if is_url(shown):
        with fetched(shown):  # raises, unless plain Orbax wrote one
            pass
    elif not is_readable(Path(shown)):
        raise not_found(Path(shown))
    raise CheckpointPathError(
        shown,
        "has files of Orbax's and is no checkpoint of flaxckpt, so it is not deleted. "
        "Pass the directory of a checkpoint; remove one of plain Orbax by hand.",
    )


def _area_of(root: str, info: CheckpointInfo, shown: str) -> tuple[Area, Path]:
    """Return the area of a checkpoint's series, and the checkpoint's path in it."""
    depth = shown.removeprefix(root).strip("/").count("/") + 1
    if not is_url(root):
        path = Path(shown)
        return DiskArea(Path(root), names_of(info.series), depth, sync=True), path
    path = Path(mirrored(shown))
    return StoreArea(path.parents[depth - 1], names_of(info.series), depth), path


def _delete(area: Area, path: Path, wanted: CheckpointInfo, shown: str) -> None:
    area.open()
    try:
        with area.claim.turn:
            area.refresh(path)
            there = read_record(path)
            if there is None:
                raise CheckpointNotFoundError(shown)
            check_same(wanted, there, shown)
            area.remove(path)
    finally:
        area.close()
