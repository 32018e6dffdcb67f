"""Check a checkpoint's files before Orbax or TensorStore opens them.

Both libraries open files by themselves. They would wait for a FIFO, they read metadata
files whole, whatever their size, and they do not always report a missing permission.
"""

import os
from pathlib import Path

from flaxckpt._disk.open import (
    WHOLE_BYTES,
    NoFileError,
    is_damage,
    open_file,
    plain_files,
    unreadable,
)
from flaxckpt._disk.record import located
from flaxckpt.errors import CheckpointCorruptError

_SMALL = (".json", ".ocdbt", ".checkpoint", "_METADATA", "_sharding")
_EVERY = 256 * 2**20  # bytes that any file may have
_PACKING = 2**16  # no compression packs so many bytes into one


def check_plain(path: Path, needed: int = 0, held: int | None = None) -> None:
    """Check that a checkpoint has only plain files of plausible sizes.

    TensorStore ends the process if it gets no memory for a file that it reads.

    Args:
        path: The checkpoint.
        needed: Bytes in memory of the arrays that are to be read.
        held: Bytes of all arrays of the checkpoint; None if unknown.

    Raises:
        CheckpointCorruptError: If something is no plain file, a file is too large for
            what it holds, or the files together are too small for the arrays.
        CheckpointPathError: If this process cannot read one of the directories.
    """
    largest = _EVERY + 2 * held if held is not None else None
    total = 0
    try:
        for entry in plain_files(located(path)):
            size = entry.stat().st_size
            if (size > WHOLE_BYTES and entry.name.endswith(_SMALL)) or (
                largest is not None and size > largest
            ):
                raise NoFileError(f"{entry.name} has {size} bytes")
            total += size
    except (NoFileError, OSError) as error:
        if isinstance(error, OSError) and not is_damage(error):
            raise unreadable(path, error) from error
        raise CheckpointCorruptError(str(path), str(error)) from error
    if needed > total * _PACKING:
        raise CheckpointCorruptError(
            str(path), f"arrays of {needed} bytes cannot be in files of {total}"
        )


def check_readable(path: Path) -> None:
    """Check that this process may read all files of a checkpoint.

    Raises:
        CheckpointPathError: If it may not.
    """
    try:
        for entry in plain_files(located(path)):
            os.close(open_file(entry.path))
    except NoFileError:
        pass  # damage, and no missing permission
