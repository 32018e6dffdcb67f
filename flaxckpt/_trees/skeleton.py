"""The structure of a stored tree as JSON, and walks over it."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

from flaxckpt._trees.ties import Position
from flaxckpt.errors import UnsupportedLeafError

Skeleton: TypeAlias = Any
"""Structure as JSON: a leaf's index, null, or an object with one key, which is one of

- {"dict": [[key, child], ...]}, {"list": [child, ...]} and {"tuple": [child, ...]};
- {"module": [[key, child], ...]}, an object or State of Flax NNX;
- {"variable": child}, an NNX Variable. Paths have the name `value` for this level;
- {"same": [position, ...]}, another place of a module or variable that comes earlier or
  that encloses this place. The positions lead to it: the position of a child of the
  root, of a child of that child, and so on. A `same` node has no leaves of its own."""


def found_at(root: Skeleton, path: Sequence[str]) -> tuple[Skeleton, Position] | None:
    """Return the node at a path, and its place; None if the path does not exist."""
    return Finder(root).at(path)


class Finder:
    """Finds the nodes of a skeleton by their paths."""

    def __init__(self, root: Skeleton) -> None:
        """Find in this skeleton, which must not change."""
        self._root = root
        self._children: dict[int, dict[str, tuple[int, Skeleton]]] = {}

    def at(self, path: Sequence[str]) -> tuple[Skeleton, Position] | None:
        """Return the node at a path, and its place; None if the path does not exist."""
        node, place = self._root, ()
        for name in path:
            below = self._below(node).get(name)
            if below is None:
                return None
            place, node = (*place, below[0]), below[1]
            if isinstance(node, dict) and "same" in node:
                place = tuple(node["same"])
                node = node_at(self._root, place)
        return node, place

    def _below(self, node: Skeleton) -> dict[str, tuple[int, Skeleton]]:
        """Return a node's children by their names, each with its position."""
        if not isinstance(node, dict):
            return {}
        if id(node) not in self._children:
            pairs = reversed(list(enumerate(children_in(node))))  # the first one counts
            below = {str(key): (at, child) for at, (key, child) in pairs}
            self._children[id(node)] = below
        return self._children[id(node)]


def key_of(entry: Any) -> str | int:
    """Return the name of one entry of a key path: a number if it is an int, else text.

    Raises:
        UnsupportedLeafError: If it is an int of more digits than Python converts.
    """
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            entry = getattr(entry, attribute)
            break
    try:
        name = str(entry)
    except ValueError:
        problem = "a key that cannot be a name, a number of too many digits; rename it"
        raise UnsupportedLeafError((("(a key)", problem),)) from None
    return entry if type(entry) is int else name


def children_in(node: Skeleton) -> list[tuple[str | int, Skeleton]]:
    """Return the children of a skeleton's node with their names; [] for a leaf."""
    match node:
        case {"dict": pairs} | {"module": pairs}:
            return [(key, child) for key, child in pairs]
        case {"list": children} | {"tuple": children}:
            return list(enumerate(children))
        case {"variable": child}:
            return [(VALUE, child)]
        case None | int() | {"same": _}:
            return []
        case _:
            raise ValueError(f"no structure: {node!r}")


def with_children(node: Skeleton, children: Sequence[Skeleton]) -> Skeleton:
    """Return a skeleton's node with its children replaced, one for one."""
    match node:
        case {"dict": pairs} | {"module": pairs}:
            (kind,) = node
            keys = [key for key, _ in pairs]
            return {kind: [list(pair) for pair in zip(keys, children, strict=True)]}
        case {"list": _} | {"tuple": _}:
            (kind,) = node
            return {kind: list(children)}
        case {"variable": _}:
            return {"variable": children[0]}
        case _:
            return node


def node_at(skeleton: Skeleton, place: Iterable[int]) -> Skeleton:
    """Return the node of a skeleton at a place, such as `same` names."""
    for position in place:
        skeleton = children_in(skeleton)[position][1]
    return skeleton


def target(skeleton: Skeleton, node: Skeleton) -> Skeleton:
    """Return a node of a skeleton, or the node that a `same` node refers to."""
    is_same = isinstance(node, dict) and "same" in node
    return node_at(skeleton, node["same"]) if is_same else node


def is_variable(node: Skeleton) -> bool:
    return isinstance(node, dict) and "variable" in node


def has_same(skeleton: Skeleton) -> bool:
    """Tell whether a skeleton has a part in several places."""
    if not isinstance(skeleton, dict):
        return False
    return "same" in skeleton or any(has_same(e) for _, e in children_in(skeleton))


VALUE = "value"


def indices_in(skeleton: Skeleton) -> Iterator[int]:
    """Yield the indices of a structure's leaves."""
    if isinstance(skeleton, int):
        yield skeleton
    for _, child in children_in(skeleton):
        yield from indices_in(child)


INT64 = 2**63
_RANK = 64  # numpy's limit
_ITEM_BYTES = 16  # of the largest element type
FROM_LIKE = ("static", "function")  # kinds of leaves that are not stored


def is_possible(shape: Sequence[int]) -> bool:
    """Tell whether an array can have a shape; empty axes count as one element."""
    size = math.prod([size or 1 for size in shape])
    return len(shape) <= _RANK and size <= INT64 // _ITEM_BYTES
