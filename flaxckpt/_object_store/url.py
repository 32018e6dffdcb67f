"""URLs of object stores."""

import os

from flaxckpt.errors import CheckpointPathError

_SCHEMES = ("gs://", "s3://")


def is_url(path: object) -> bool:
    """Tell whether a path is one in an object store that can be used.

    Raises:
        CheckpointPathError: If it was one.
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str):
        return False
    if text.startswith(tuple(each[:-1] for each in _SCHEMES)) and "://" not in text:
        raise CheckpointPathError(
            text, "has lost a slash, as URLs do in pathlib. Pass the URL as text."
        )
    return text.startswith(_SCHEMES)


def split_url(url: str) -> tuple[str, str, str]:
    """Return a URL's scheme, bucket, and path in it, without a slash at its end."""
    scheme, _, rest = url.rstrip("/").partition("://")
    bucket, _, path = rest.partition("/")
    return scheme, bucket, path
