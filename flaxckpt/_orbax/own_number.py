"""Orbax's saves by this package count for themselves.

Orbax numbers the saves of a process, and a save that is under way looks its number up
again, in several threads: where another one begins meanwhile, it waits for signals
under a number that nobody sends them for, and fails or hangs. So a save of this package
has a number of its own, and leaves the process's as it is for the user's own saves.
"""

import contextlib
import contextvars
from collections.abc import Generator
from typing import Any

_IS_OWN = contextvars.ContextVar("flaxckpt_saves_by_orbax", default=False)
_OWN = -1  # Orbax counts from 0


@contextlib.contextmanager
def own_number() -> Generator[None]:
    """Have Orbax give what this context saves a number that is nobody else's."""
    _set_up()
    token = _IS_OWN.set(True)
    try:
        yield
    finally:
        _IS_OWN.reset(token)


def _set_up() -> None:
    """Teach Orbax's generator of numbers, once, whose save it is asked by."""
    # pyright: reportMissingTypeStubs=false
    from orbax.checkpoint._src.futures import synchronization

    generator: Any = synchronization.OperationIdGenerator
    if getattr(generator, "knows_flaxckpt", False):
        return
    following, current = generator.next_operation_id, generator.get_current_operation_id
    generator.next_operation_id = lambda: _OWN if _IS_OWN.get() else following()
    generator.get_current_operation_id = lambda: (
        str(_OWN) if _IS_OWN.get() else current()
    )
    generator.knows_flaxckpt = True
