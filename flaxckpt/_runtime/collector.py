"""Python's collector of cyclic garbage, which makes many new objects slow."""

import contextlib
import gc
import os
from collections.abc import Generator

_paused: list[None] = []


@contextlib.contextmanager
def paused_collector() -> Generator[None]:
    """Make many objects without collecting: each collection looks at all of them."""
    was_on = gc.isenabled()
    try:
        _paused.extend([None] * was_on)
        gc.disable()
        yield
    finally:
        if was_on:
            gc.enable()
            del _paused[-1:]


def _go_on() -> None:
    """Collect in a forked process, whose other threads are gone."""
    if _paused:
        _paused.clear()
        gc.enable()


os.register_at_fork(after_in_child=_go_on)
