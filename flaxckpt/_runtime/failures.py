"""Put an error in one line that a user can read.

TensorStore adds whole specifications to its errors, and Orbax adds advice about its own
settings. The full error stays the cause of the error that is raised.
"""

import contextlib
import errno
import os
import re
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import jax

from flaxckpt.errors import CheckpointError, CheckpointWriteError

_HEAD, _TAIL = 220, 80  # characters that are kept of a long line
_SHOWN = 5  # names of a long list
_ADDED = re.compile(r"""\s*\[[a-z_ \[\]0-9]+=('(\\.|[^'\\])*'|"(\\.|[^"\\])*")\]""")
_SPACE = {errno.ENOSPC: "No space left on device", errno.EDQUOT: "Disk quota exceeded"}


def in_one_line(error: BaseException) -> str:
    """Return an error's type and message, shortened to one line."""
    text = _ADDED.sub("", str(error)).strip()
    line = " ".join(text.splitlines()[0].split()) if text else ""
    if len(line) > _HEAD + _TAIL:
        line = f"{line[:_HEAD]} ... {line[-_TAIL:]}"
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def listed(names: Sequence[str]) -> str:
    """Return the first few names as text, with the number of the others."""
    shown = ", ".join(names[:_SHOWN])
    more = len(names) - _SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


@contextlib.contextmanager
def space_told(
    path: object, nbytes: int, directory: Path, where: str = ""
) -> Generator[None]:
    """Tell how much space a save needs, if it fails because the disk is full.

    Args:
        path: The checkpoint, as users see it in messages.
        nbytes: How many bytes its values need.
        directory: Where it is written.
        where: Text to append to the message.

    Raises:
        CheckpointWriteError: If the disk is full or the quota is used up.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        problem = _lack_of_space(error, nbytes, directory)
        if problem is None:
            raise
        raise CheckpointWriteError(str(path), problem + where) from error


def _lack_of_space(error: BaseException, nbytes: int, directory: Path) -> str | None:
    code = next(filter(None, map(_code_of, chain_of(error))), None)
    if code is None:
        return None
    problem = f"{_SPACE[code]}: it needs about {_size(nbytes)}"
    if code == errno.EDQUOT:
        return f"{problem}, and the quota of this user on {str(directory)!r} is used up"
    try:
        there = os.statvfs(directory)
    except OSError:
        return problem
    free = there.f_bavail * there.f_frsize
    if free > 2 * nbytes and there.f_files and not there.f_favail:
        return f"{problem}, and no more files can be made on {str(directory)!r}"
    return f"{problem}, and {_size(free)} are free on {str(directory)!r}"


def chain_of(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it came from, each once."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or each.__context__


def _code_of(error: BaseException) -> int | None:
    """Return the errno of an error about space; TensorStore gives it only as text."""
    if isinstance(error, OSError) and error.errno in _SPACE:
        return error.errno
    text = str(error)
    return next((code for code, said in _SPACE.items() if said in text), None)


def is_about_space(error: BaseException) -> bool:
    """Tell whether an error says that the disk is full or the quota used up."""
    return any(map(_code_of, chain_of(error)))


def is_of_the_machine(error: BaseException) -> bool:
    """Tell whether an error is of the system, of JAX or of memory, not of a bug."""
    kinds = OSError, MemoryError, jax.errors.JaxRuntimeError
    return isinstance(error, kinds) or is_about_space(error)


def _size(nbytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes} bytes"
