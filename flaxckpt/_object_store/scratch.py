"""Make the local directory of this process that mirrors object stores."""

import atexit
import fcntl
import functools
import os
import shutil
import socket
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from flaxckpt._disk.staging import discard
from flaxckpt._object_store.url import split_url
from flaxckpt.errors import TemplateError

_BASE = f"flaxckpt-mirror-{socket.gethostname()}-"  # other hosts' locks are not seen


def mirrored(filepath: str) -> str:
    """Return the local path that mirrors a filepath in an object store.

    Args:
        filepath: A filepath template that is a URL.

    Raises:
        TemplateError: If it names no bucket or nothing in the bucket, if the bucket has
            a field, or if a part of the path is empty, `.` or `..`.
    """
    scheme, bucket, path = split_url(filepath)
    if "{" in bucket or {"", ".", ".."} & {bucket, *path.split("/")}:
        raise TemplateError(
            filepath,
            f'must be "{scheme}://bucket/path", with a bucket\'s name, and without '
            "empty parts, '.' and '..'.",
        )
    return f"{_base(os.getpid())}/{scheme}/{bucket}/{path}"


@functools.cache
def _base(process: int) -> Path:
    """Make this process's directory of mirrors, which is deleted at exit.

    First delete the directories of killed processes: nobody has them locked.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{_BASE}*"):
        descriptor = _locked(left)
        if descriptor is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(descriptor)
    base = Path(tempfile.mkdtemp(prefix=_BASE))
    while _locked(base) is None or not base.is_dir():  # another process has deleted it
        base = Path(tempfile.mkdtemp(prefix=_BASE))
    atexit.register(discard, [base], process)
    return base


def _locked(directory: Path) -> int | None:
    """Lock a directory for as long as this process lives; None if it is locked."""
    try:
        flags = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC  # anybody may make one
        descriptor = os.open(directory, os.O_RDONLY | flags)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def url_of(path: Path) -> str:
    """Return the URL that a path mirrors."""
    scheme, *parts = path.relative_to(_base(os.getpid())).parts
    return f"{scheme}://{'/'.join(parts)}"


@contextmanager
def scratch() -> Generator[Path]:
    """Yield a temporary directory, which goes with this process at the latest."""
    with tempfile.TemporaryDirectory(dir=_base(os.getpid())) as directory:
        yield Path(directory)
