"""What is remembered of trees, by their structures."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Remembered(Generic[T]):
    """Remembers a value for each of some keys, but for no key that cannot be compared.

    JAX compares the static data of two trees when it compares their structures. An
    array among these data raises an error, and so do data that have no hash.
    """

    def __init__(self, most: int) -> None:
        """Remember nothing yet, and later no more than `most` values."""
        self._values: dict[Any, T] = {}
        self._most = most

    def get(self, key: Any) -> T | None:
        """Return the value for a key; None if there is none."""
        try:
            return self._values.get(key)
        except (TypeError, ValueError):
            return None

    def get_or_make(self, key: Any, make: Callable[[], T]) -> T:
        """Return the value for a key; make it if there is none, and keep it."""
        known = self.get(key)
        return self.keep(key, make()) if known is None else known

    def keep(self, key: Any, value: T) -> T:
        """Remember a value. If there are too many, forget all others first."""
        try:
            if len(self._values) >= self._most and key not in self._values:
                self._values.clear()
            self._values[key] = value
        except (TypeError, ValueError):
            pass  # such a key is not remembered
        return value
