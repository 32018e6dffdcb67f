"""Python's collector of cyclic garbage, which makes many new objects slow."""

import contextlib
import gc
from collections.abc import Generator


@contextlib.contextmanager
def paused_collector() -> Generator[None]:
    """Make many objects without collecting: each collection looks at all of them."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
