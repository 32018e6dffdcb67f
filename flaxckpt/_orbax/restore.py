"""Orbax reads a tree, from a checkpoint of flaxckpt's or of plain Orbax's.

Orbax's exceptions do not leave this folder.
"""

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxckpt._disk.alias import plainly
from flaxckpt._disk.open import NoFileError, is_there, read_small
from flaxckpt._disk.record import LEAVES_FILE, RECORD_FILE, is_checkpoint, located
from flaxckpt._disk.vetting import check_plain, check_readable
from flaxckpt._orbax.engine import HANDLERS, ocp, orbax_context
from flaxckpt._orbax.files import ZARR_MARK, check_names, complete, data_files
from flaxckpt._runtime.failures import in_one_line, listed
from flaxckpt._runtime.frames import outside
from flaxckpt._runtime.quiet import quiet
from flaxckpt._trees.layout import Layout
from flaxckpt._trees.leaf import Leaf, key_dtype
from flaxckpt._trees.stored_weights import is_weights_name
from flaxckpt._trees.ties import PyTree
from flaxckpt._trees.wanted import Wanted
from flaxckpt.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointPathError,
)

# Files that Orbax puts into a checkpoint, into each tree in it, and into each array.
_WHOLE = ("_CHECKPOINT_METADATA", "orbax.checkpoint")
_TREE = ("_METADATA", "manifest.ocdbt")
_ARRAY = (".zarray", "zarr.json")
OURS = {LEAVES_FILE, RECORD_FILE, ZARR_MARK}
_DEFAULT_ITEMS = ("state", "pytree", "default")


def read_by_orbax(path: Path, layout: Layout, wanted: Mapping[int, Wanted]) -> Any:
    """Have Orbax read the leaves in `wanted`; return a list of all leaves, in order."""
    asked = [
        _abstract(leaf, wanted[index]) if index in wanted else ocp.PLACEHOLDER
        for index, leaf in enumerate(layout.leaves)
    ]
    try:
        complete(path)
        check_names(path, [layout.leaves[index] for index in wanted])
        needed = sum(layout.leaves[index].nbytes for index in wanted)
        check_plain(path, needed, layout.nbytes)
        with quiet(), orbax_context(), plainly(located(path)) as plain:
            tree = ocp.load(plain, layout.fill_for_orbax(asked))
            return layout.pick(tree)
    except (MemoryError, jax.errors.JaxRuntimeError, CheckpointError):
        raise
    except Exception as error:
        check_readable(path)
        leaves = [layout.leaves[index] for index in wanted]
        names, files = (
            [leaf.name for leaf in leaves],
            data_files(located(path), leaves),
        )
        problem = f"cannot be read: {listed(names)} (in one of the files "
        problem += f"{listed(files) or 'that hold it, which are missing'})"
        raise CheckpointCorruptError(
            str(path), f"{problem}: {in_one_line(error)}"
        ) from error


def _abstract(leaf: Leaf, want: Wanted) -> Any:
    """Describe to Orbax how to restore a leaf.

    Orbax restores it in the stored dtype, since Orbax would cast silently. It goes to
    the host if it stays there, or if the caller will convert it, or will place it
    without committing it.
    """
    match leaf.kind:
        case "bool" | "int" | "float" | "str" if not leaf.dtype:
            return {"bool": False, "int": 0, "float": 0.0, "str": ""}[leaf.kind]
        case "key":
            sharding = want.sharding or jax.sharding.SingleDeviceSharding(
                jax.local_devices()[0]
            )
            return jax.ShapeDtypeStruct(
                leaf.shape, key_dtype(leaf.impl), sharding=sharding
            )
        case _:
            pass
    dtype = "complex128" if leaf.kind == "complex" else leaf.dtype
    if want.sharding is not None and dtype == want.leaf.dtype:
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=want.sharding)
    return np.broadcast_to(np.zeros((), jnp.dtype(dtype)), leaf.shape)


def read_foreign(path: Path, like: PyTree, *, weights_only: bool) -> PyTree:
    """Read what plain Orbax wrote: a tree, or a dict of its items by their names.

    Of several items, it reads those that `like` has as keys. If `like` has none, it
    reads all that Orbax's v1 functions can read, and a warning names the others.
    """
    check_plain(path)
    if _is_item(path):
        handler = items_of(path.parent).get(path.name, "")
        return _read_item(path.parent, path.name, handler)
    items = items_of(path)
    for name in _DEFAULT_ITEMS:
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
    found: dict[str, PyTree] = {}
    left_out: list[str] = []
    for name in chosen:
        try:
            found[name] = _read_item(path, name, items[name])
        except _NoHandlerError:
            left_out.append(name)
    if not found:
        raise _NoHandlerError(path, {name: items[name] for name in left_out})
    if left_out:
        shown = ", ".join(f"{name} ({items[name]})" for name in left_out)
        warnings.warn(
            f"Checkpoint {str(path)!r} has items that Orbax's v1 functions cannot "
            f"read: {shown}. They are left out. Read them with Orbax's "
            "CheckpointManager and the handler that wrote them. To load other items "
            "without this warning, load one by its path, as in "
            f"load({str(path / next(iter(found)))!r}), or pass a `like` of them.",
            stacklevel=outside(),
        )
    return found


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
    if not handler or handler.rpartition(".")[2] in HANDLERS:
        return True
    names = [name] if name is not None else list(items_of(path))
    has_tree = all(is_there(path / each / "_METADATA") for each in names)
    return has_tree and type(error).__name__ != "NoEntryError"


def naming_items(path: Path, error: CheckpointMismatchError) -> CheckpointMismatchError:
    """Add the items' names to an error, if plain Orbax's checkpoint has several."""
    items = {} if is_checkpoint(path) else items_of(path)
    if len(items) < 2 or items.keys() & set(_DEFAULT_ITEMS):
        return error
    advice = (
        f"It has the items {', '.join(items)}: pass a `like` with these keys, or load "
        f"one by its path, as in load({str(path / next(iter(items)))!r})."
    )
    return CheckpointMismatchError(error.path, error.differences, advice)


def items_of(path: Path) -> dict[str, str]:
    """Name the items of a checkpoint of plain Orbax; none if it is one tree.

    Returns:
        For each item's name, the name of the Orbax class that wrote the item; empty if
        that is not known.
    """
    try:
        described = json.loads(read_small(path / "_CHECKPOINT_METADATA"))
        handlers = described["item_handlers"]
    except (NoFileError, OSError, ValueError, KeyError, TypeError, RecursionError):
        names = [each.parent.name for each in path.glob("*/_METADATA")]
        handlers = dict.fromkeys(names, "")
    if not isinstance(handlers, dict):
        return {}
    named: dict[Any, Any] = handlers
    return {
        name: str(handler)
        for name, handler in named.items()
        if name != "metrics" and (path / name).is_dir()
    }


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
        with quiet(), orbax_context(), plainly(path) as plain:
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


def foreign_checkpoints(directory: Path) -> list[str]:
    """Name the checkpoints in a directory that plain Orbax wrote."""
    return [
        each.name
        for each in entries(directory)
        if not each.name.startswith(".")
        and not is_ours(each)
        and any(os.path.isfile(each / name) for name in (*_WHOLE, "_METADATA"))
    ]


def is_ours(path: Path) -> bool:
    """Tell whether flaxckpt wrote a checkpoint; False if this process cannot know."""
    try:
        return is_checkpoint(path)
    except CheckpointPathError:
        return False


def is_orbax(path: Path) -> bool:
    """Tell by Orbax's files whether a directory is a checkpoint of Orbax's.

    Orbax itself takes any directory that is not empty for a checkpoint.
    """
    if _has_any(path, (*_WHOLE, *_TREE)):
        return True
    try:
        with os.scandir(path) as found:
            below = [entry.path for entry in found if entry.is_dir()]
    except OSError:  # this process may not look into it
        return False
    # Items, or arrays of Orbax's first versions. A checkpoint in a directory does not
    # make the directory one.
    return any(
        _has_any(each, (*_TREE, *_ARRAY)) and not _has_any(each, _WHOLE)
        for each in below
    )


def is_readable(path: Path) -> bool:
    """Tell whether there is a checkpoint with Orbax's files, or an item of one."""
    return is_orbax(path) or _is_item(path)


def _is_item(path: Path) -> bool:
    return (
        os.path.isdir(path)  # False, too, for a name that is too long
        and not _has_any(path, _WHOLE)
        and not is_ours(path.parent)
        and is_orbax(path.parent)
        and path.name in items_of(path.parent)
    )


def _has_any(directory: str | os.PathLike[str], names: Iterable[str]) -> bool:
    return any(os.path.lexists(os.path.join(directory, name)) for name in names)


def entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:  # it does not exist, or this process may not read it
        return []
