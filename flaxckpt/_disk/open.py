"""Open files that others may have put there, if they are plain files.

A checkpoint may come from somebody else, or lie where others can write. A FIFO or a
device in place of a file must not keep the program waiting, and a file of a terabyte
must not fill its memory. Readers follow links, since caches of downloads are made of
links; a link has to lead to a plain file.

An error of the system is about the files (`is_damage`), or about this process and
machine: no permission, too many open files, a server that does not answer. Nobody
should delete a checkpoint because of an error of the second kind.
"""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from flaxckpt.errors import CheckpointPathError

WHOLE_BYTES = 2**30  # the largest file that is read whole
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
    """There is no plain file that can be read; the message says why."""


def is_damage(error: OSError) -> bool:
    """Tell whether an error is about the files, and not about this process."""
    return error.errno is None or error.errno in _DAMAGE


def unreadable(path: str | os.PathLike[str], error: OSError) -> CheckpointPathError:
    """Make the error for a file that this process cannot read; it may be whole."""
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
    """Tell whether a path leads to nothing for any user, as a link in a circle does."""
    try:
        os.stat(path)
    except OSError as error:
        return is_damage(error)
    return False


def open_file(path: str | os.PathLike[str]) -> int:
    """Open a plain file for reading, without waiting.

    Returns:
        Its descriptor.

    Raises:
        NoFileError: If there is no plain file.
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


def read_small(path: str | os.PathLike[str], limit_bytes: int = WHOLE_BYTES) -> bytes:
    """Read a plain file whole.

    Args:
        path: The file.
        limit_bytes: The most bytes that it may have.

    Raises:
        NoFileError: If there is no plain file, or the file is larger.
        CheckpointPathError: If this process cannot read it.
    """
    descriptor = open_file(path)
    try:
        left = os.fstat(descriptor).st_size
        if left > limit_bytes:
            raise NoFileError(
                f"{os.path.basename(path)} has {left} bytes, and may have at most "
                f"{limit_bytes}"
            )
        parts: list[bytes] = []
        while left and (part := os.read(descriptor, left)):
            parts.append(part)
            left -= len(part)
        return b"".join(parts)
    except OSError as error:
        raise unreadable(path, error) from error
    finally:
        os.close(descriptor)


def is_inside(name: str) -> bool:
    """Tell whether a relative path stays inside the directory that it starts from.

    Args:
        name: Names, joined by `/`.
    """
    return "\0" not in name and not {"", ".", ".."} & set(name.split("/"))


def is_there(path: str | os.PathLike[str]) -> bool:
    """Tell whether there is anything at a path.

    Raises:
        CheckpointPathError: If this process cannot tell.
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
    """Yield all files below a directory, and check that each is a plain file.

    For files that another library opens.

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
