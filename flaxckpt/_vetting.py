"""What is looked at before another library opens a checkpoint's files.

Orbax and TensorStore open files by themselves: they would wait for a FIFO, read a small
file whole, whatever its size, and do not always say that a permission is missing.
"""

import os
from pathlib import Path

from flaxckpt._open import (
    SMALL_BYTES,
    NoFileError,
    is_damage,
    open_file,
    plain_files,
    unreadable,
)
from flaxckpt._record import located
from flaxckpt.errors import CheckpointCorruptError

_SMALL = (".json", ".ocdbt", ".checkpoint", "_METADATA", "_sharding")
_PACKING = 2**16  # no compression makes so many bytes of one


def check_plain(path: Path, needed: int = 0) -> None:
    """Check that a checkpoint has nothing but plain files, and not too few bytes.

    Args:
        path: The checkpoint.
        needed: How many bytes its arrays take in memory.

    Raises:
        CheckpointCorruptError: If there is something else, a small file that is large,
            or an array that cannot be in files of this size.
        CheckpointPathError: If this process cannot read one of the directories.
    """
    total = 0
    try:
        for entry in plain_files(located(path)):
            size = entry.stat().st_size
            if size > SMALL_BYTES and entry.name.endswith(_SMALL):
                raise NoFileError(f"{entry.name} has {size} bytes")
            total += size
    except NoFileError as error:
        raise CheckpointCorruptError(str(path), str(error)) from error
    except OSError as error:
        if is_damage(error):
            raise CheckpointCorruptError(str(path), str(error)) from error
        raise unreadable(path, error) from error
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
        pass  # which is damage
