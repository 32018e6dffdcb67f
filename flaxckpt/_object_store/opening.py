"""Open object stores only where one is named: TensorStore takes a while to import."""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from flaxckpt._object_store.objects import Objects

# Opens the store at a URL, or returns the one that it has opened before. Each opening
# looks for credentials, and Amazon's library may print lines about that.
Stores: TypeAlias = "Callable[[str], Objects]"


def open_store(url: str) -> "Objects":
    """Open the store at a URL; see `Objects`."""
    from flaxckpt._object_store.objects import Objects

    return Objects(url)
