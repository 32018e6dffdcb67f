"""Has Orbax read a tree, or several items, from a checkpoint of plain Orbax.

Orbax's exceptions do not leave this module.
"""

import contextlib
import warnings
from collections.abc import Callable, Collection, Generator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flaxckpt._disk.alias import aliased
from flaxckpt._disk.open import is_there
from flaxckpt._disk.record import is_checkpoint
from flaxckpt._disk.vetting import check_plain, check_readable
from flaxckpt._orbax.engine import (
    calls_of_orbax,
    ocp,
    orbax_context,
    orbax_narrows,
)
from flaxckpt._orbax.recognize import is_item, items_of
from flaxckpt._runtime.failures import in_one_line
from flaxckpt._runtime.frames import outside
from flaxckpt._trees.convert import put_own_shards
from flaxckpt._trees.stored_weights import is_weights_name
from flaxckpt._trees.ties import PyTree
from flaxckpt._trees.wanted import is_wide
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

# Of these, the leaves can be loaded one by one.
_HANDLERS_OF_ARRAYS = frozenset(
    "PyTreeHandler PyTreeCheckpointHandler StandardCheckpointHandler".split()
)


def read_foreign(path: Path, like: PyTree, *, weights_only: bool) -> PyTree:
    """Read what plain Orbax wrote: a tree, or a dict of its items by their names.

    Of several items, it reads those that `like` has as keys. If `like` has none, it
    reads all that Orbax's v1 functions can read, and a warning names the others.
    """
    check_plain(path)
    if (only := _only_tree(path)) is not None:
        return _read_item(*only)
    items = items_of(path)
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


def _only_tree(path: Path) -> tuple[Path, str | None, str] | None:
    """Return where the tree is that stands for a checkpoint; None if several do.

    Returns:
        The checkpoint, the item's name, or None for the only one, and the name of the
        class that wrote it; empty if it is not known.
    """
    if is_item(path):
        return path.parent, path.name, items_of(path.parent).get(path.name, "")
    items = items_of(path)
    for name in DEFAULT_ITEMS:
        if name in items:
            return path, name, items[name]
    return (path, None, next(iter(items.values()), "")) if len(items) < 2 else None


def tree_of_forms(path: Path) -> PyTree:
    """Return the tree that stands for a checkpoint with what Orbax tells of each leaf.

    None if Orbax cannot load its leaves one by one, or if there are several items.
    """
    check_plain(path)
    only = _only_tree(path)
    if only is None or only[2].rpartition(".")[2] not in ("", *_HANDLERS_OF_ARRAYS):
        return None
    with _of_orbax(*only) as plain:
        return _described(plain, only[1])


def read_leaves(path: Path, forms: PyTree, chosen: Collection[int]) -> dict[int, Any]:
    """Read some leaves of the tree that stands for a checkpoint, and no other.

    Args:
        path: The checkpoint.
        forms: The tree that `tree_of_forms` has returned.
        chosen: The places of the leaves in JAX's order.
    """
    only = _only_tree(path)
    assert only is not None
    leaves, structure = jax.tree.flatten(forms)

    def wanted(form: Callable[[Any], Any]) -> PyTree:
        return structure.unflatten(
            form(leaf) if index in chosen else ocp.PLACEHOLDER
            for index, leaf in enumerate(leaves)
        )

    with _of_orbax(*only) as plain:
        found = jax.tree.leaves(_read(plain, only[1], wanted))
    return {index: found[index] for index in chosen}


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
    """Read an item, or the only tree; for the arguments and errors, see `_of_orbax`."""
    with _of_orbax(path, name, handler) as plain:
        forms = _described(plain, name)
        return _read(plain, name, lambda form: jax.tree.map(form, forms))


def _described(plain: Any, name: str | None) -> PyTree:
    if name is None:
        return ocp.metadata(plain).metadata
    return ocp.checkpointables_metadata(plain).metadata[name]


def _read(
    plain: Any, name: str | None, wanted: Callable[[Callable[[Any], Any]], PyTree]
) -> PyTree:
    """Read an item, as it was placed, or to the host if that fails.

    Arrays that Orbax would narrow are read to the host, and placed by this thread.

    Args:
        plain: The checkpoint.
        name: The item; None for the only tree.
        wanted: Returns the wanted tree, from what makes the form of a leaf.
    """

    def read(form: PyTree) -> PyTree:
        if name is None:
            return ocp.load(plain, form)
        return ocp.load_checkpointables(plain, {name: form})[name]

    try:
        forms = wanted(_placed_form)  # fails if its devices are not here
        if not orbax_narrows():
            return read(forms)
        return jax.tree.map(_put, forms, read(jax.tree.map(_form_to_read, forms)))
    except (ValueError, TypeError, KeyError):
        return read(wanted(host_form))


@contextlib.contextmanager
def _of_orbax(path: Path, name: str | None, handler: str) -> Generator[Any]:
    """Call Orbax about an item, in a block that gets the path to pass to it.

    Args:
        path: The checkpoint.
        name: The item; None for the only tree.
        handler: The name of the class that wrote it; empty if it is not known.

    Raises:
        CheckpointCorruptError: If Orbax cannot read it; names the item.
        CheckpointError: If there is no tree, and no item was named.
        _NoHandlerError: If Orbax's v1 functions cannot read what that class writes.
    """
    try:
        with calls_of_orbax(orbax_context()), aliased(path) as plain:
            yield plain
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


def _form_to_read(form: Any) -> Any:
    """Return a form, or one on the host if Orbax would narrow the array on devices."""
    return host_form(form) if _is_wide_array(form) else form


def _put(form: Any, value: Any) -> Any:
    """Put an array that was read to the host on its devices, in this thread."""
    return put_own_shards(value, form.sharding) if _is_wide_array(form) else value


def _is_wide_array(form: Any) -> bool:
    """Tell whether a form is of a JAX array of 64 bits."""
    return isinstance(form, jax.ShapeDtypeStruct) and is_wide(form.dtype)


def host_form(described: Any) -> Any:
    """Describe an array to Orbax by one of numpy, which has the memory of one value."""
    if not hasattr(described, "shape"):
        return described
    return np.broadcast_to(np.zeros((), described.dtype), described.shape)
