"""The versions of the packages that write a checkpoint."""

import functools
import importlib.metadata


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of the packages that write a checkpoint."""
    return {name: _version(name) for name in ("flaxckpt", "jax", "orbax-checkpoint")}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # as in a bare source tree
        return "unknown"
