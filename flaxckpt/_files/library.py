"""Imports a library of an extra when it is needed, and says how to install it."""

import importlib
from typing import Any

from flaxckpt._runtime.extras import how_to_install
from flaxckpt.errors import CheckpointError


def library(name: str, extra: str, path: object) -> Any:
    """Import a module of an optional library.

    Args:
        name: The module's name.
        extra: The extra of flaxckpt that installs it.
        path: The file that is to be read or written, for the error.

    Raises:
        CheckpointError: If it cannot be imported; has the line that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CheckpointError(
            f"To read or write {str(path)!r}, flaxckpt needs the library "
            f"{name.partition('.')[0]}, which cannot be imported ({error}). "
            f"{how_to_install(extra)}"
        ) from error
