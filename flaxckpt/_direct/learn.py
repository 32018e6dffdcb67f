"""Learns from a checkpoint that Orbax has written how Orbax stores such a tree.

`learn` compares what Orbax wrote with what `write_values` would have written: of each
chunk the size and both ends. If they differ, because of another version of Orbax or an
unknown option, it learns nothing, and Orbax goes on writing.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flaxckpt._direct.chunks import chunks_of
from flaxckpt._direct.form import Form
from flaxckpt._direct.sources import HEAD, Database, Files, Store
from flaxckpt._direct.zarr import (
    DESCRIPTION,
    STATE,
    STRINGS,
    Bytes,
    OtherwiseError,
    ZarrArray,
    below,
    dtype_of,
    parsed,
    raw_bytes,
    trailer_of,
)
from flaxckpt._trees.layout import Layout
from flaxckpt._trees.leaf import ARRAYS, Leaf


def learn(directory: Path, layout: Layout, values: Sequence[Any]) -> Form | None:
    """Learn how Orbax has just written a checkpoint.

    Args:
        directory: The checkpoint.
        layout: Its layout.
        values: The leaves that Orbax stores.

    Returns:
        What Orbax wrote; None if it wrote in a way that is not known here.
    """
    leaves = [leaf for leaf in layout.leaves if leaf.in_orbax]
    is_database = (directory / STATE / "manifest.ocdbt").exists()
    contents: dict[str, bytes] = {}
    names: set[str] = set()
    store = Database(directory / STATE) if is_database else Files(directory / STATE)
    arrays: list[ZarrArray | str] = []
    try:
        for leaf, value in zip(leaves, values, strict=True):
            name = leaf.stored_name
            if leaf.is_text:
                arrays.append(name)
                continue
            stored = _stored_array(name, leaf, value, store)
            for key, _, chunk in chunks_of(stored, value):
                _compare(store.ends(key), raw_bytes(chunk))
            arrays.append(stored if is_database else stored.with_keys("."))
            names.add(name)
        for path in sorted(directory.rglob("*")):
            name = path.relative_to(directory).as_posix()
            if path.is_file() and not _holds_values(name, is_database, names):
                contents[name] = path.read_bytes()
        learnt = Form(is_database, contents, arrays)
        if any(leaf.is_text for leaf in leaves):
            text = learnt.current(STRINGS, contents[STRINGS], values)
            if json.loads(text) != json.loads(contents[STRINGS]):
                return None
    except (OtherwiseError, KeyError, ValueError, TypeError, AttributeError):
        return None
    return learnt


def _stored_array(name: str, leaf: Leaf, value: Any, store: Store) -> ZarrArray:
    """Read how Orbax has stored an array; raise if the way is not known here."""
    # Orbax may have been given another dtype than the leaf's own.
    dtype = leaf.dtype if leaf.kind in ARRAYS else dtype_of(value)
    if not name:  # the leaf is the whole tree; its files are among Orbax's own
        raise OtherwiseError
    stored = parsed(name, store.read(below(name, DESCRIPTION)), dtype)
    if stored.separator != "/":
        raise OtherwiseError
    return stored


def _compare(ends: tuple[int, bytes, bytes], chunk: Bytes) -> None:
    trailer = trailer_of(chunk.nbytes)
    if ends != (
        chunk.nbytes + len(trailer),
        (chunk[:HEAD].tobytes() + trailer)[:HEAD],
        trailer,
    ):
        raise OtherwiseError


def _holds_values(path: str, is_database: bool, names: set[str]) -> bool:
    first, _, rest = path.partition("/")
    if first != STATE:
        return False
    if is_database:
        return rest.endswith("manifest.ocdbt") or rest.startswith(("d/", "ocdbt."))
    return any(rest[:at] in names for at, letter in enumerate(rest) if letter == "/")
