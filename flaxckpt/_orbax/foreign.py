"""Has Orbax read a tree, or several items, from a checkpoint of plain Orbax.

Orbax's exceptions do not leave this module.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flaxckpt._disk.alias import aliased
from flaxckpt._disk.open import is_there
from flaxckpt._disk.record import is_checkpoint
from flaxckpt._disk.vetting import check_plain, check_readable
from flaxckpt._orbax.engine import calls_of_orbax, ocp, orbax_context
from flaxckpt._orbax.recognize import is_item, items_of
from flaxckpt._runtime.failures import in_one_line
from flaxckpt._runtime.frames import outside
from flaxckpt._trees.stored_weights import is_weights_name
from flaxckpt._trees.ties import PyTree
from flaxckpt.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
)

DEFAULT_ITEMS = ("state", "pytree", "default")
# Orbax's v1 functions read what these classes write.
_HANDLERS = frozenset(
    "PyTreeHandler PyTreeCheckpointHandler StandardCheckpointHandler JsonHandler "
    "JsonCheckpointHandler ProtoHandler ProtoCheckpointHandler MetricsHandler "
    "StatefulCheckpointableHandler".split()
)


def read_foreign(path: Path, like: PyTree, *, weights_only: bool) -> PyTree:
    """Read what plain Orbax wrote: a tree, or a dict of its items by their names.

    Of several items, it reads those that `like` has as keys. If `like` has none, it
    reads all that Orbax's v1 functions can read, and a warning names the others.
    """
    check_plain(path)
    if is_item(path):
        handler = items_of(path.parent).get(path.name, "")
        return _read_item(path.parent, path.name, handler)
    items = items_of(path)
    for name in DEFAULT_ITEMS:
        if name in items:
            return _read_item(path, name, items[name])
    if len(items) < 2:
        return _read_item(path, None, next(iter(items.values()), ""))
    chosen = list(items)
    if weights_only:
        chosen = [
            name
            for name, handler in items.items()
            if is_weights_name(name) and "json" not in handler.lower()
        ]
    if not chosen:
        raise CheckpointError(
            f"Checkpoint {str(path)!r} has no weights among its items: "
            f"{', '.join(items)}. Load one by its path, as in "
            f"load({str(path / next(iter(items)))!r})."
        )
    if isinstance(like, Mapping):
        asked: Mapping[Any, Any] = like
        named = [name for name in items if name in asked]
        if named:
            return {name: _read_item(path, name, items[name]) for name in named}
    return _read_items(path, {name: items[name] for name in chosen})


def _read_items(path: Path, items: Mapping[str, str]) -> dict[str, PyTree]:
    """Read all items that Orbax's v1 functions can read; warn of the others."""
    trees: dict[str, PyTree] = {}
    left_out: list[str] = []
    for name, handler in items.items():
        try:
            trees[name] = _read_item(path, name, handler)
        except _NoHandlerError:
            left_out.append(name)
    if not trees:
        raise _NoHandlerError(path, {name: items[name] for name in left_out})
    if left_out:
        shown = ", ".join(f"{name} ({items[name]})" for name in left_out)
        warnings.warn(
            f"Checkpoint {str(path)!r} has items that Orbax's v1 functions cannot "
            f"read: {shown}. They are left out. Read them with Orbax's "
            "CheckpointManager and the handler that wrote them. To load other items "
            "without this warning, load one by its path, as in "
            f"load({str(path / next(iter(trees)))!r}), or pass a `like` of them.",
            stacklevel=outside(),
        )
    return trees


class _NoHandlerError(CheckpointError):
    """Orbax's v1 functions cannot read some items, which are not damaged."""

    def __init__(self, path: Path, items: Mapping[str, str]) -> None:
        shown = ", ".join(f"{name} ({handler})" for name, handler in items.items())
        super().__init__(
            f"Checkpoint {str(path)!r} has nothing else to load than items that "
            f"Orbax's v1 functions cannot read: {shown}. Read them with Orbax's "
            "CheckpointManager and the handler that wrote them."
        )


def _has_handler(path: Path, name: str | None, handler: str, error: Exception) -> bool:
    """Tell whether Orbax's v1 functions should have read an item that they did not.

    Args:
        path: The checkpoint.
        name: The item; None for the only one.
        handler: The name of the class that wrote it; empty if it is not known.
        error: What Orbax raised.
    """
    if not handler or handler.rpartition(".")[2] in _HANDLERS:
        return True
    names = [name] if name is not None else list(items_of(path))
    has_tree = all(is_there(path / item / "_METADATA") for item in names)
    return has_tree and type(error).__name__ != "NoEntryError"


def naming_items(path: Path, error: CheckpointMismatchError) -> CheckpointMismatchError:
    """Add the items' names to an error, if plain Orbax's checkpoint has several."""
    items = {} if is_checkpoint(path) else items_of(path)
    if len(items) < 2 or items.keys() & set(DEFAULT_ITEMS):
        return error
    advice = (
        f"It has the items {', '.join(items)}: pass a `like` with these keys, or load "
        f"one by its path, as in load({str(path / next(iter(items)))!r})."
    )
    return CheckpointMismatchError(error.path, error.differences, advice)


def _read_item(path: Path, name: str | None, handler: str) -> PyTree:
    """Read an item, or the only tree: as it was placed, or to host if that fails.

    Args:
        path: The checkpoint.
        name: The item; None for the only tree.
        handler: The name of the class that wrote it; empty if it is not known.

    Raises:
        CheckpointCorruptError: If Orbax cannot read it; names the item.
        CheckpointError: If there is no tree, and no item was named.
        _NoHandlerError: If Orbax's v1 functions cannot read what that class writes.
    """

    def read(plain: Any, form: Any = None) -> PyTree:
        if name is None:
            return ocp.load(plain, form)
        return ocp.load_checkpointables(plain, {name: form})[name]

    def described(plain: Any) -> Any:
        if name is None:
            return ocp.metadata(plain).metadata
        return ocp.checkpointables_metadata(plain).metadata[name]

    try:
        with calls_of_orbax(orbax_context()), aliased(path) as plain:
            try:
                return read(plain, jax.tree.map(_placed_form, described(plain)))
            except (ValueError, TypeError, KeyError):
                return read(plain, jax.tree.map(_host_form, described(plain)))
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        check_readable(path)
        if name is None and isinstance(error, ocp.errors.InvalidLayoutError):
            raise _no_tree(path) from error
        if not _has_handler(path, name, handler, error):
            item = name or next(iter(items_of(path)))
            raise _NoHandlerError(path, {item: handler}) from error
        item = "" if name is None else f"its item {name!r} cannot be read: "
        raise CheckpointCorruptError(str(path), item + in_one_line(error)) from error


def _no_tree(path: Path) -> CheckpointError:
    items = items_of(path)
    advice = "Read it with Orbax."
    if items:
        first = str(path / next(iter(items)))
        advice = (
            f"It has the items {', '.join(items)}: load one by its path, as in "
            f"load({first!r})."
        )
    return CheckpointError(
        f"Checkpoint {str(path)!r} of plain Orbax holds no tree of arrays. {advice}"
    )


def _placed_form(described: Any) -> Any:
    """Describe to Orbax the sharding that an array had; without it, Orbax warns."""
    placed = getattr(described, "sharding_metadata", None)
    if placed is None:
        return described
    shape, dtype = described.shape, described.dtype
    return jax.ShapeDtypeStruct(shape, dtype, sharding=placed.to_jax_sharding())


def _host_form(described: Any) -> Any:
    if not hasattr(described, "shape"):
        return described
    return np.broadcast_to(np.zeros((), described.dtype), described.shape)
