"""Other paths of a directory, for what reads a path otherwise than the file system.

Orbax looks for its files with a glob, which reads `[`, `*` and `?`, and takes `gs:/`
for the scheme of a URL. TensorStore takes a backslash for a separator, and so writes
into other directories; some names it refuses. Both get a path of the same directory
without such characters.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Generator
from pathlib import Path

DESCRIPTORS = "/proc/self/fd"  # Linux has a path there for every open directory
_PLAIN = re.compile(r"([\w .,=@+-]*(?<!\.__lock)/)*[\w .,=@+-]*(?<!\.__lock)", re.ASCII)


def is_plain(path: Path) -> bool:
    """Tell whether Orbax and TensorStore take a path as the file system does."""
    return _PLAIN.fullmatch(str(path)) is not None


@contextlib.contextmanager
def plainly(path: Path) -> Generator[Path]:
    """Have a plain path for a directory, or for what is to be made in one.

    Args:
        path: The directory; absolute.

    Yields:
        The path as it is, if it is plain. Otherwise another path of the directory, or,
        where there is none yet and its name is plain, one by the directory above. It
        holds until the end of the context, in this process.

    Raises:
        OSError: If the directory cannot be opened.
    """
    if is_plain(path):
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
