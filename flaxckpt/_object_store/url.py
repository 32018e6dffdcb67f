"""Parse paths that may be URLs of object stores."""

import os
import re

from flaxckpt.errors import CheckpointPathError, SettingError

_SCHEMES = ("gs://", "s3://")
_OTHER = re.compile("[A-Za-z][A-Za-z0-9+.-]*://")


def is_url(path: object) -> bool:
    """Tell whether a path is a `gs://` or `s3://` URL.

    Raises:
        CheckpointPathError: If it was such a URL, and `pathlib` has removed a slash.
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str):
        return False
    if text.startswith(tuple(each[:-1] for each in _SCHEMES)) and "://" not in text:
        raise CheckpointPathError(
            text, "has lost a slash, as URLs do in pathlib. Pass the URL as text."
        )
    return text.startswith(_SCHEMES)


def check_is_path(name: str, path: object, advice: str) -> None:
    """Check that an argument is a path, or a URL of an object store.

    Args:
        name: The argument's name.
        path: Its value.
        advice: What the caller should pass instead.

    Raises:
        SettingError: If `path` is neither, or empty.
        CheckpointPathError: If `path` is a URL of another kind, or without a bucket.
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str):
        raise SettingError(name, f"<{type(path).__name__}>", advice)
    if not text:  # of a variable that is not set, say; it would be the directory here
        raise SettingError(name, text, advice)
    if text.startswith(_SCHEMES) and not split_url(text)[1]:
        raise CheckpointPathError(text, "names no bucket. Pass gs://bucket/path.")
    if _OTHER.match(text) and not text.startswith(_SCHEMES):
        advice = "is a URL of another kind than gs:// and s3://. Mount it."
        raise CheckpointPathError(text, advice)


def absolute(path: str | os.PathLike[str]) -> str:
    """Return a path as an absolute one, and a URL without a final slash."""
    text = os.fspath(path)
    if is_url(text):
        return text.rstrip("/")
    return os.path.abspath(os.path.expanduser(text))


def split_url(url: str) -> tuple[str, str, str]:
    """Return a URL's scheme, bucket, and path in the bucket without a final slash."""
    scheme, _, rest = url.partition("://")
    bucket, _, path = rest.rstrip("/").partition("/")
    return scheme, bucket, path
