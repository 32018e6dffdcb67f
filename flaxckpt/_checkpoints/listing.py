"""Lists the checkpoints in a directory, without a `ModelCheckpoint`."""

import os
import warnings

from flaxckpt._disk.info import CheckpointInfo
from flaxckpt._disk.listing import Infos, Known, LeftOut, list_below
from flaxckpt._disk.open import is_there
from flaxckpt._disk.record import RECORD_FILE
from flaxckpt._object_store.opening import Stores, open_store
from flaxckpt._object_store.url import absolute, check_is_path, is_url
from flaxckpt._runtime.frames import outside
from flaxckpt.errors import CheckpointPathError


def list_checkpoints(directory: str | os.PathLike[str]) -> tuple[CheckpointInfo, ...]:
    """List the checkpoints in a directory and in the directories below it.

    Reads their records; changes nothing and needs no JAX device. Any process may call
    it at any time.

    Args:
        directory: The directory, or a `gs://` or `s3://` URL. A directory that does not
            exist holds no checkpoints.

    Returns:
        The checkpoints that flaxckpt wrote, oldest first. Checkpoints whose records are
        damaged are left out, and so are directories that cannot be read.

    Raises:
        SettingError: If `directory` is no path.
        CheckpointPathError: If `directory` is a file, or cannot be read.
        CheckpointError: If the object store cannot be reached.

    Warns:
        UserWarning: For each checkpoint whose record is damaged, and each directory
            that cannot be read.

    Example:
        >>> list_checkpoints("no/such/directory")
        ()
    """
    infos, left_out = listed(checked_path(directory))
    for error in left_out:
        warnings.warn(f"Left out of the listing: {error}", stacklevel=outside())
    return infos


def checked_path(directory: str | os.PathLike[str]) -> str:
    """Return a directory's absolute path, or its URL.

    Raises:
        SettingError: If `directory` is no path.
    """
    if isinstance(directory, str) and not directory:
        directory = os.curdir  # what `os.path.dirname` returns of a name alone
    check_is_path("directory", directory, "pass the path of a directory.")
    return absolute(directory)


def listed(
    directory: str, known: Known | None = None, stores: Stores = open_store
) -> tuple[Infos, list[LeftOut]]:
    """List checkpoints as `list_checkpoints` does, and an error for each left out.

    Args:
        directory: What `checked_path` returned.
        known: As for `list_below`; a store has no use for it.
        stores: Opens a store.

    Raises:
        CheckpointError: As `list_checkpoints`.
    """
    if is_url(directory):
        from flaxckpt._object_store import listing

        return listing.listed(directory, stores)
    if is_there(directory) and not os.path.isdir(directory):
        raise CheckpointPathError(
            directory, "is a file. Pass the directory that holds the checkpoints."
        )
    infos, left_out = list_below(directory, None, known)
    for error in left_out:
        if error.path in (directory, os.path.join(directory, RECORD_FILE)) and (
            isinstance(error, CheckpointPathError)
        ):
            raise error
    return infos, left_out
