"""What is looked at before another library opens a checkpoint's files.

Orbax and TensorStore open files by themselves: they would wait for a FIFO, read a small
file whole, whatever its size, and do not always say that a permission is missing.
"""

import os
from pathlib import Path

from flaxckpt._disk.open import (
    SMALL_BYTES,
    NoFileError,
    is_damage,
    open_file,
    plain_files,
    unreadable,
)
from flaxckpt._disk.record import located
from flaxckpt.errors import CheckpointCorruptError

_SMALL = (".json", ".ocdbt", ".checkpoint", "_METADATA", "_sharding")
_EVERY = 256 * 2**20  # a file may have, whatever there is in it
_PACKING = 2**16  # no compression makes so many bytes of one


def check_plain(path: Path, needed: int = 0, held: int | None = None) -> None:
    """Check that a checkpoint has nothing but plain files, of sizes that can be.

    TensorStore ends the process where it gets no memory for a file that it reads.

    Args:
        path: The checkpoint.
        needed: How many bytes the arrays take in memory that are to be read.
        held: How many all of its arrays take; None if that is not known.

    Raises:
        CheckpointCorruptError: If there is something else, a file that is too large for
            what it holds, or an array that cannot be in files of this size.
        CheckpointPathError: If this process cannot read one of the directories.
    """
    largest = _EVERY + 2 * held if held is not None else None
    total = 0
    try:
        for entry in plain_files(located(path)):
            size = entry.stat().st_size
            if (size > SMALL_BYTES and entry.name.endswith(_SMALL)) or (
                largest is not None and size > largest
            ):
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
