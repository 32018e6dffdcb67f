"""Files that others may have put there: opened only if they are plain files.

A checkpoint may come from somebody else, or lie where others can write. A FIFO or a
device in place of a file must not keep the program waiting, nor a file of a terabyte
fill its memory. Links are followed for reading, since caches of downloads are made of
them; what they lead to has to be a plain file, too.

An error of the system says whether it speaks of what is there (`is_damage`), or of this
process and machine: no permission, too many open files, a server that does not answer.
Nobody should delete a checkpoint because of the latter.
"""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from flaxckpt.errors import CheckpointPathError

SMALL_BYTES = 2**30  # what a file may have that is read whole
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_DAMAGE = frozenset(
    {
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENXIO,  # a socket
        errno.ENODEV,
        errno.EINVAL,
        errno.ENAMETOOLONG,
    }
)


class NoFileError(Exception):
    """There is no file that can be read; the message says what there is, or not."""


def is_damage(error: OSError) -> bool:
    """Tell whether an error is about the files, and not about this process."""
    return error.errno is None or error.errno in _DAMAGE


def unreadable(path: str | os.PathLike[str], error: OSError) -> CheckpointPathError:
    """Make the error for what this process cannot read, though it may be whole."""
    if error.errno in (errno.EACCES, errno.EPERM):
        advice = "Make it readable for this user, or have its owner do so."
    elif is_damage(error):
        advice = "Move it away, or remove it."
    else:
        advice = "Try again. This error does not mean that the checkpoint is damaged."
    return CheckpointPathError(
        os.fspath(path), f"cannot be read: {error.strerror}. {advice}"
    )


def leads_nowhere(path: str | os.PathLike[str]) -> bool:
    """Tell whether a path leads to nothing, as a link in a circle does, for anybody."""
    try:
        os.stat(path)
    except OSError as error:
        return is_damage(error)
    return False


def open_file(path: str | os.PathLike[str]) -> int:
    """Open a plain file for reading, and never wait for anybody.

    Returns:
        Its descriptor.

    Raises:
        NoFileError: If there is none.
        CheckpointPathError: If this process cannot read it.
    """
    try:
        descriptor = os.open(path, _FLAGS)
    except OSError as error:
        if is_damage(error):
            raise NoFileError(f"{os.path.basename(path)}: {error.strerror}") from error
        raise unreadable(path, error) from error
    except ValueError as error:  # a NUL in its name
        raise NoFileError(str(error)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NoFileError(f"{os.path.basename(path)} is no plain file")
    return descriptor


def read_small(path: str | os.PathLike[str], limit_bytes: int = SMALL_BYTES) -> bytes:
    """Read a plain file whole.

    Args:
        path: The file.
        limit_bytes: How much it may have.

    Raises:
        NoFileError: If there is none, or if it is larger than that.
        CheckpointPathError: If this process cannot read it.
    """
    descriptor = open_file(path)
    try:
        size = os.fstat(descriptor).st_size
        if size > limit_bytes:
            raise NoFileError(
                f"{os.path.basename(path)} has {size} bytes, and may have at most "
                f"{limit_bytes}"
            )
        parts: list[bytes] = []
        left = size
        while left and (part := os.read(descriptor, left)):
            parts.append(part)
            left -= len(part)
        return b"".join(parts)
    except OSError as error:
        raise unreadable(path, error) from error
    finally:
        os.close(descriptor)


def is_inside(name: str) -> bool:
    """Tell whether a name leads to something in the directory in which it is looked up.

    Args:
        name: Names, joined by `/`.
    """
    return "\0" not in name and not {"", ".", ".."} & set(name.split("/"))


def is_there(path: str | os.PathLike[str]) -> bool:
    """Tell whether there is anything at a path.

    Raises:
        CheckpointPathError: If this process cannot know.
    """
    try:
        os.stat(path)
    except OSError as error:
        if is_damage(error):
            return False
        raise unreadable(path, error) from error
    except ValueError:
        return False
    return True


def plain_files(directory: Path) -> Iterator[os.DirEntry[str]]:
    """Yield the files of a directory and of those in it, each checked.

    For what another library opens.

    Raises:
        NoFileError: If one is no plain file, or a directory in it is a link.
        CheckpointPathError: If this process cannot read a directory.
    """
    left: list[str] = [str(directory)]
    while left:
        here = left.pop()
        try:
            with os.scandir(here) as found:
                entries = list(found)
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    left.append(entry.path)
                elif entry.is_file():
                    yield entry
                else:
                    name = os.path.relpath(entry.path, directory)
                    raise NoFileError(f"{name} is no plain file")
        except OSError as error:
            if is_damage(error):
                raise NoFileError(f"{here}: {error.strerror}") from error
            raise unreadable(here, error) from error


def real(path: Path) -> Path:
    """Return a path without links; the path itself if no file system takes it."""
    try:
        return Path(os.path.realpath(path))
    except ValueError:  # it has a character that names cannot have
        return path
