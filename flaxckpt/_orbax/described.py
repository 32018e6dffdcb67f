"""What Orbax's files tell of a checkpoint without its values: shardings and forms.

Orbax's exceptions do not leave this module.
"""

import base64
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from flaxckpt._direct.zarr import STATE
from flaxckpt._disk.alias import aliased
from flaxckpt._disk.open import NoFileError, read_small
from flaxckpt._disk.record import located
from flaxckpt._disk.vetting import check_plain, check_readable
from flaxckpt._object_store.source import Place
from flaxckpt._orbax.engine import calls_of_orbax, ocp, orbax_context
from flaxckpt._orbax.foreign import DEFAULT_ITEMS
from flaxckpt._orbax.recognize import is_item, items_of
from flaxckpt._runtime.failures import in_one_line
from flaxckpt._trees.skeleton import key_of
from flaxckpt.errors import CheckpointCorruptError

_SHARDINGS = f"{STATE}/_sharding"


def shardings_in(place: Place) -> Mapping[str, str]:
    """Read how the arrays of a checkpoint were sharded: a text by each stored name.

    Orbax needs this file only to restore without shardings, so a checkpoint is whole
    without it: then there are none.
    """
    try:
        if place.source is not None:
            content = place.source.read(_SHARDINGS) or b""
        else:
            content = read_small(located(place.path) / _SHARDINGS)
        described = json.loads(content)
        return {
            base64.b64decode(name).decode(): _text(json.loads(sharding))
            for name, sharding in described.items()
        }
    except (NoFileError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _text(sharding: Mapping[str, Any]) -> str:
    """Return Orbax's description of a sharding as a short text."""
    match sharding:
        case {"sharding_type": "NamedSharding", "shape": sizes, "axis_names": names}:
            axes = zip(names, sizes, strict=True)
            spec = ", ".join(map(_axis, sharding["partition_spec"]))
            return f"P({spec}) on {', '.join(f'{n}={size}' for n, size in axes)}"
        case {"device_str": device}:
            return str(device)
        case _:
            return str(sharding["sharding_type"])


def _axis(axis: Any) -> str:
    return str(tuple(axis) if isinstance(axis, list) else axis and repr(axis))


def foreign_leaves(path: Path) -> Iterator[tuple[str, Any, str]]:
    """Yield the leaves of plain Orbax's checkpoint: name, description, and sharding.

    A description has `shape` and `dtype` if the leaf is an array, and is a value of the
    leaf's type if not. Items are the first part of the names, if there are several.

    Raises:
        CheckpointCorruptError: If Orbax cannot read it.
    """
    check_plain(path)
    try:
        with calls_of_orbax(orbax_context()), aliased(path) as plain:
            if is_item(path):
                items = ocp.checkpointables_metadata(plain.parent).metadata
                tree = items[path.name]
            elif len(items_of(path)) < 2:
                tree = ocp.metadata(plain).metadata
            else:
                items = ocp.checkpointables_metadata(plain).metadata
                main = [name for name in DEFAULT_ITEMS if name in items]
                tree = items[main[0]] if main else dict(items)
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        check_readable(path)
        raise CheckpointCorruptError(str(path), in_one_line(error)) from error
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        placed = getattr(leaf, "sharding_metadata", None)
        sharding = "" if placed is None else placed.to_serialized_string()
        name = "/".join(str(key_of(key)) for key in keys)
        yield name, leaf, _text(json.loads(sharding)) if sharding else ""
