"""Parse and check the table of leaves of a checkpoint."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from flaxckpt._disk.fields import (
    MalformedError,
    fail,
    int_in,
    items_in,
    list_in,
    mapping_in,
    match_in,
    parse_json,
    shape_in,
    shown,
    text_in,
)
from flaxckpt._trees.skeleton import FROM_LIKE

_ARRAYS = ("jax", "numpy", "numpy_scalar", "key", "bytes", "state")
_OTHERS = ("bool", "int", "float", "complex", "str", *FROM_LIKE)
_DTYPE = re.compile(r"[a-z][a-z0-9_]{0,31}(<[A-Za-z0-9_]{1,31}>)?")
_DIGEST = re.compile(r"(sum|xxh3):[0-9a-f]{16}")
_SUM = re.compile(r"[0-9a-f]{16}")
_STORED = re.compile(r"(?!\.+$)[^/\\\x00-\x1f\x7f-\x9f\ud800-\udfff]+")
_NAME_BYTES = 255


def parse_table(data: bytes, newest: int) -> dict[str, Any]:
    """Parse a table of leaves.

    Args:
        data: The file.
        newest: The newest format that can be read.

    Returns:
        Its fields: `tree`, a skeleton in which each leaf has its place; `leaves`, each
        with a path, a kind and the kind's own fields; `weights`, a skeleton, "all" or
        None; the list `digests`, and perhaps `sums`.

    Raises:
        MalformedError: If it is no table of leaves, or its format is too new.
    """
    try:
        return _table(parse_json(data), newest)
    except RecursionError as error:
        raise MalformedError("its tree is nested too deeply") from error


def _table(fields: Any, newest: int) -> dict[str, Any]:
    mapping_in(fields, "the table of leaves")
    int_in(fields, "format", 1, newest + 1)
    leaves = list_in(fields, "leaves")
    for leaf in leaves:
        _check_leaf(leaf)
    paths = [leaf["path"] for leaf in leaves]
    seen = [False] * len(leaves)

    def place(index: int, path: list[str]) -> None:
        if not seen[index] and paths[index] != path:
            fail(f"leaf {shown(paths[index])} is at {shown(path)}")
        seen[index] = True

    _Skeleton(len(leaves), place).visit(fields.get("tree"), [], ())
    if not all(seen):
        fail(f"leaf {shown(paths[seen.index(False)])} has no place in the tree")
    weights = fields.get("weights", "")
    if weights not in ("all", None):
        _Skeleton(len(leaves), lambda index, path: None).visit(weights, [], ())
    for digest in list_in(fields, "digests"):
        match_in(_DIGEST, digest, "a digest")
    if "sums" in fields:
        for sums in list_in(fields, "sums"):
            for each in items_in(sums, "sums"):
                match_in(_SUM, each, "a checksum")
    return fields


class _Skeleton:
    """A walk that checks a skeleton; see `_trees.skeleton.Skeleton`."""

    def __init__(self, count: int, place: Callable[[int, list[str]], None]) -> None:
        """Begin at the root.

        Args:
            count: How many leaves there are.
            place: Called for each leaf with its index and path.
        """
        self._count, self._place = count, place
        self._shared: set[tuple[int, ...]] = set()

    def visit(self, node: Any, path: list[str], spot: tuple[int, ...]) -> None:
        """Check a node.

        Args:
            node: The node.
            path: The names from the root to it.
            spot: The positions from the root to it, as `same` gives them.
        """
        if node is None:
            return
        if type(node) is int:
            if not 0 <= node < self._count:
                fail(f"leaf {shown(node)} of {self._count} is at {shown(path)}")
            self._place(node, path)
            return
        if type(node) is not dict or len(node) != 1:
            fail(f"there is no structure at {shown(path)}")
        ((kind, children),) = node.items()
        if kind == "same":
            # It may name only what comes earlier in the walk, so no walk is endless.
            target = items_in(children, kind)
            if any(type(each) is not int for each in target) or (
                tuple(target) not in self._shared
            ):
                fail(f"{shown(path)} is the same as nothing that is before it")
            return
        if kind in ("module", "variable"):
            self._shared.add(spot)
        if kind == "variable":
            self.visit(children, [*path, "value"], (*spot, 0))
        elif kind in ("list", "tuple"):
            for index, child in enumerate(items_in(children, kind)):
                self.visit(child, [*path, str(index)], (*spot, index))
        elif kind in ("dict", "module"):
            for index, (key, child) in enumerate(self._pairs(children, kind, path)):
                self.visit(child, [*path, str(key)], (*spot, index))
        else:
            fail(f"there is a structure of kind {shown(kind)}")

    def _pairs(self, children: Any, kind: str, path: list[str]) -> list[Any]:
        keys: set[str] = set()
        pairs = [items_in(pair, "a pair", 2) for pair in items_in(children, kind)]
        for key, _ in pairs:
            if type(key) not in (str, int) or str(key) in keys:
                fail(f"a key at {shown(path)} is {shown(key)}")
            keys.add(str(key))
        return pairs


def _check_leaf(leaf: Any) -> None:
    mapping_in(leaf, "a leaf")
    path, kind = list_in(leaf, "path"), leaf.get("kind")
    if any(type(each) is not str for each in path):
        fail(f"a leaf's path is {shown(path)}")
    if "stored" in leaf:
        _check_stored(leaf, len(path))
    if "rows" in leaf and (0 in shape_in(leaf, "rows") or len(leaf["rows"]) != 2):
        fail(f"a leaf has rows {shown(leaf['rows'])}")
    if kind in _ARRAYS:
        shape = shape_in(leaf, "shape")
        match_in(_DTYPE, leaf.get("dtype"), "a dtype")
        if kind == "key":
            text_in(leaf, "impl")
        if kind in ("bytes", "state") and len(shape) != 1:
            fail(f"bytes are of shape {shape}")
        if kind == "numpy_scalar" and shape:
            fail(f"a numpy scalar is of shape {shape}")
    elif kind in ("int", "str") and leaf.get("dtype") == "uint8":
        if len(shape_in(leaf, "shape")) != 1:
            what = "text" if kind == "str" else "an integer"
            fail(f"{what} is of shape {shown(leaf['shape'])}")
    elif kind == "int" and leaf.get("dtype") == "uint64":
        if shape_in(leaf, "shape"):
            fail(f"an integer is of shape {shown(leaf['shape'])}")
    elif kind not in _OTHERS:
        fail(f"a leaf is of kind {shown(kind)}")
    elif leaf.get("dtype", "") != "" or leaf.get("shape", []) != []:
        fail(f"a leaf of kind {kind} has a dtype or a shape")


def _check_stored(leaf: Mapping[str, Any], depth: int) -> None:
    """Check the keys under which a leaf is stored, which make a path below `state`."""
    keys = list_in(leaf, "stored")
    if len(keys) not in (1, depth) or any(type(key) is not str for key in keys):
        fail(f"a leaf is stored as {shown(keys)}")
    name = ".".join(keys)
    if not all(map(_STORED.fullmatch, name.split("/"))) or len(name) > _NAME_BYTES:
        fail(f"a leaf is stored as {shown(name)}")
