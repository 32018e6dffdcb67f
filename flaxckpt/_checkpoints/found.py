"""A checkpoint at a path or URL: its record, and the root of its series, with a mark.

Whoever has a checkpoint but no filepath template finds the lock and the mark of its
series by this.
"""

import os
from pathlib import Path

from flaxckpt._disk.info import CheckpointInfo
from flaxckpt._disk.open import is_there
from flaxckpt._disk.record import HIDDEN_PREFIX, read_record
from flaxckpt._disk.series_names import MARK_SUFFIX, mark_of, names_of
from flaxckpt._object_store.opening import Stores, open_store
from flaxckpt._object_store.url import is_url


def found_at(
    path: str, stores: Stores = open_store
) -> tuple[str, CheckpointInfo] | None:
    """Return the root of the series of the checkpoint at a path, and its record.

    Args:
        path: An absolute path, or a URL.
        stores: Opens a store.

    Returns:
        None if there is no checkpoint of flaxckpt.

    Raises:
        CheckpointCorruptError: If its record is damaged.
        CheckpointPathError: If this process cannot read it.
        CheckpointError: If the object store cannot be reached.
    """
    if is_url(path):
        from flaxckpt._object_store import listing

        return listing.found_at(path, stores)
    info = read_record(Path(path))
    return None if info is None else (root_of(info), info)


def root_of(info: CheckpointInfo) -> str:
    """Return the path or URL of the root of a checkpoint's series.

    If somebody has moved the checkpoint there by hand, that is the directory it is in.
    """
    *directories, _ = (info.saved_as or "").split("/")
    parts, depth = os.fspath(info).split("/"), len(directories) + 1
    is_moved = parts[-depth:-1] != directories
    return "/".join(parts[: -1 if is_moved else -depth]) or "/"


def is_finished(root: str, series: str, stores: Stores) -> bool:
    """Tell whether the run of a series has ended, and saved no more.

    Args:
        root: Path or URL of the series' root.
        series: The name of the series, or of its slot's series.
        stores: Opens a store.
    """
    mark = mark_of(names_of(series)[0])
    if is_url(root):
        return stores(root).read(mark).content is not None
    return is_there(f"{root}/{mark}")


def has_mark(directory: str, stores: Stores) -> bool:
    """Tell whether any series with this very root has ended."""
    if is_url(directory):
        keys = stores(directory).keys_below("")
        names = [key for key in keys if "/" not in key]
    else:
        names = os.listdir(directory) if os.path.isdir(directory) else []
    return any(
        name.startswith(HIDDEN_PREFIX) and name.endswith(MARK_SUFFIX) for name in names
    )
