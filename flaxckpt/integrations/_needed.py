"""Import a library of an extra, or say how to install it."""

import importlib
from typing import Any

from flaxckpt._runtime.extras import how_to_install


def needed(module: str, extra: str) -> Any:
    """Import a library.

    Args:
        module: Its name.
        extra: The extra of flaxckpt that installs it.

    Raises:
        ModuleNotFoundError: If it is not installed; names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ModuleNotFoundError(
            f"flaxckpt.integrations.{extra} needs {module}, which is not installed. "
            f"{how_to_install(extra)}",
            name=module,
        ) from error
