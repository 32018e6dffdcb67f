"""Find arrays without values: deleted, or donated to a jitted call.

Their shapes and dtypes stay known. JAX raises its own error for any other access, and
crashes if it is asked whether they are ready.
"""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import jax
from jax.core import Tracer

from flaxckpt.errors import SettingError

GONE = (
    "was deleted or donated, so its values are gone. A jitted function donates its "
    "donate_argnums. Pass the function's result, or a copy made before the call."
)


class Shown(str):
    """A text that an error or a `repr` shows as it is."""

    __slots__ = ()
    __repr__ = str.__str__


_SHOWN = Shown("<deleted>")


def is_gone(value: Any) -> bool:
    """Tell whether a value is an array that was deleted or donated."""
    if not isinstance(value, jax.Array) or isinstance(value, Tracer):
        return False
    return value.is_deleted()


def check_there(argument: str, leaves: Iterable[tuple[str, Any]]) -> None:
    """Check that none of the arrays of an argument was deleted or donated.

    Args:
        argument: The argument's name.
        leaves: Its leaves with their names; "" for the argument itself.

    Raises:
        SettingError: If an array was deleted or donated.
    """
    for name, value in leaves:
        if is_gone(value):
            raise SettingError(argument, _SHOWN, f"{name or 'it'} {GONE}")


def shown(record: Any) -> str:
    """Return the `repr` of a dataclass that is a pytree; its arrays may be gone."""
    there = jax.tree.map(lambda leaf: _SHOWN if is_gone(leaf) else leaf, record)
    each = [f"{f.name}={getattr(there, f.name)!r}" for f in fields(record) if f.repr]
    return f"{type(record).__name__}({', '.join(each)})"
