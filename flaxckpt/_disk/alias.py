"""Paths of a directory that Orbax and TensorStore read as the file system does.

Orbax looks for its files with a glob, in which `[`, `*` and `?` are patterns, and takes
`gs:/` for the scheme of a URL. TensorStore takes a backslash for a separator, so it
writes into other directories, and it refuses some names. For a path with such
characters both libraries get another path of the same directory.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Generator
from pathlib import Path

DESCRIPTORS = "/proc/self/fd"  # Linux has a path there for every open directory
_PLAIN = re.compile(r"([\w .,=@+-]*(?<!\.__lock)/)*[\w .,=@+-]*(?<!\.__lock)", re.ASCII)


def needs_no_alias(path: Path) -> bool:
    """Tell whether Orbax and TensorStore take a path as the file system does."""
    return _PLAIN.fullmatch(str(path)) is not None


@contextlib.contextmanager
def aliased(path: Path) -> Generator[Path]:
    """Yield a plain path of a directory that exists or is to be made.

    Args:
        path: The directory; absolute.

    Yields:
        `path` itself if it is plain. Otherwise an alias of the directory or, if it does
        not exist yet, its name below an alias of its parent, which is plain only if the
        name is. An alias is valid in this process until the end of the context.

    Raises:
        OSError: If the directory cannot be opened.
    """
    if needs_no_alias(path):
        yield path
    elif path.is_dir():
        with _alias(path) as directory:
            yield directory
    else:
        with _alias(path.parent) as directory:
            yield directory / path.name


@contextlib.contextmanager
def _alias(directory: Path) -> Generator[Path]:
    if not os.path.isdir(DESCRIPTORS):
        with tempfile.TemporaryDirectory() as above:
            link = Path(above, "link")
            link.symlink_to(directory, target_is_directory=True)
            yield link
        return
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        yield Path(DESCRIPTORS, str(descriptor))
    finally:
        os.close(descriptor)
