"""The layout of a stored tree: its skeleton and its leaves.

A user's tree of any node types becomes nested dicts and lists of arrays and scalars,
which Orbax stores under readable names. The layout records what Orbax does not: which
lists are tuples, which dict keys are numbers, the empty arrays, the kinds of leaves,
and which parts are in several places.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from flaxckpt._trees.leaf import LEAF_FIELDS, Leaf, without_keys
from flaxckpt._trees.names import is_plain
from flaxckpt._trees.skeleton import (
    Skeleton,
    children_in,
    indices_in,
    node_at,
    with_children,
)
from flaxckpt._trees.ties import Position, PyTree


@dataclass(frozen=True)
class Layout:
    """A stored tree's structure and its leaves.

    Attributes:
        skeleton: The structure, with indices into `leaves`.
        leaves: The leaves, in the order in which JAX flattens the tree.
    """

    skeleton: Skeleton
    leaves: tuple[Leaf, ...]

    def fill(self, values: Sequence[Any], limit: int | None = None) -> PyTree:
        """Return the tree as dicts, lists and tuples, with these leaves.

        Modules, States and Variables of NNX become what `nnx.to_pure_dict` makes of
        their state, and what `nnx.update` and `nnx.replace_by_pure_dict` take: dicts of
        values, each once, with integers for positions. Each of several modules that
        share a part has a copy of it.

        Args:
            values: The leaves, in order.
            limit: The most bytes that copies of shared arrays may take; None for any.

        Raises:
            OverfullError: If the copies take more bytes, or the filled tree has far
                more nodes than the skeleton.
        """
        return Filling(self.skeleton, values, limit).plain(self.skeleton, ())

    def fill_for_orbax(self, values: Sequence[Any]) -> PyTree:
        """Return the tree as Orbax stores it: spelled keys, no tuples, and never empty.

        If leaves are stored apart, they are entries of the root, which is then a dict.
        """
        held = [
            value if leaf.in_orbax else None
            for leaf, value in zip(self.leaves, values, strict=True)
        ]
        tree = _fill_plainly(self.skeleton, held, self.leaves)
        pairs = zip(self.leaves, held, strict=True)
        apart = {
            leaf.stored_name: value
            for leaf, value in pairs
            if leaf.is_apart and leaf.in_orbax
        }
        if apart:
            entries = enumerate(tree) if type(tree) is list else tree.items()
            return {str(key): value for key, value in entries} | apart
        return (
            {"empty": None}
            if tree is None or (type(tree) in (dict, list) and not tree)
            else tree
        )

    def pick(self, orbax_tree: PyTree) -> list[Any]:
        """Return the leaves of a tree that Orbax loaded; None for one not in Orbax."""
        return [
            _look_up(orbax_tree, leaf.stored_path) if leaf.in_orbax else None
            for leaf in self.leaves
        ]

    @functools.cached_property
    def as_stored(self) -> "Layout":
        """The layout with each leaf as the store has it."""
        if not any(leaf.rows for leaf in self.leaves):
            return self
        return Layout(self.skeleton, tuple(leaf.as_stored for leaf in self.leaves))

    def part(self, skeleton: Skeleton) -> tuple["Layout", list[int]]:
        """Return the layout of a part, and the index in `leaves` of each of its leaves.

        Args:
            skeleton: The part's structure, with indices into `leaves`.
        """
        leaves: list[Leaf] = []
        sources: list[int] = []

        def visit(node: Skeleton, path: tuple[str, ...]) -> Skeleton:
            if node is None:
                return None
            if isinstance(node, int):
                leaf = self.leaves[node]
                leaves.append(leaf if leaf.path == path else replace(leaf, path=path))
                sources.append(node)
                return len(leaves) - 1
            pairs = children_in(node)
            return with_children(node, [visit(e, (*path, str(k))) for k, e in pairs])

        return Layout(visit(skeleton, ()), tuple(leaves)), sources

    def to_json(self) -> dict[str, Any]:
        """Return the layout as JSON values, without digests and checksums."""
        return {
            "tree": self.skeleton,
            "leaves": [
                {
                    key: value
                    for key, value in vars(leaf).items()
                    if key in LEAF_FIELDS - {"digest", "sums"}
                    and value != ""
                    and (key != "shape" or leaf.dtype)
                    and (key not in ("stored", "rows") or value)
                }
                for leaf in self.leaves
            ],
        }

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of all leaves' values in memory; see `Leaf.nbytes`."""
        return sum([leaf.nbytes for leaf in self.leaves])

    @property
    def most_bytes(self) -> int:
        """The most bytes in memory that a tree filled with these leaves may take.

        Without a limit, a few lines in a table of leaves could ask for endless copies.
        """
        return _COPIES * self.nbytes + _COPIED_BYTES

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> "Layout":
        """Return the layout from its JSON values.

        Args:
            table: What `to_json` returned, the list `digests`, and perhaps the list
                `sums`: an entry for each leaf in Orbax, in order.

        Raises:
            ValueError: If `digests` or `sums` has more or fewer entries than that.
        """
        leaves = [
            Leaf(
                path=tuple(each["path"]),
                kind=each["kind"],
                dtype=each.get("dtype", ""),
                shape=tuple(each.get("shape", ())),
                impl=each.get("impl", ""),
                stored=tuple(each.get("stored", ())),
                rows=tuple(each.get("rows", ())),
            )
            for each in table["leaves"]
        ]
        held = [index for index, leaf in enumerate(leaves) if leaf.in_orbax]
        sums = table.get("sums") or [()] * len(held)
        for index, digest, own in zip(held, table["digests"], sums, strict=True):
            facts: Any = vars(leaves[index]) | {"digest": digest, "sums": tuple(own)}
            leaves[index] = Leaf(**facts)  # faster than `replace`
        return cls(table["tree"], tuple(leaves))


_ABSENT: Any = object()
# By these factors and amounts a tree without `like` may be larger than the stored one.
_COPIES = 16
_COPIED_BYTES = 2**28
_COPIED_NODES = 2**20


class OverfullError(ValueError):
    """A stored tree holds more than fits a checkpoint of its size."""


class Filling:
    """Fills values into a skeleton: the result is dicts, lists and tuples of them."""

    def __init__(
        self, skeleton: Skeleton, values: Sequence[Any], limit: int | None = None
    ) -> None:
        self._root, self._values = skeleton, values
        self._used: set[int] = set()
        self._nodes_left = _COPIES * _size(skeleton) + _COPIED_NODES
        self._bytes_left = limit

    def plain(
        self, node: Skeleton, place: Position, seen: set[Position] | None = None
    ) -> PyTree:
        """Fill a node in.

        Args:
            node: The node.
            place: Where the node is.
            seen: Places in the same module that are filled in; None outside of modules.
        """
        self._count()
        match node:
            case None:
                return None
            case int():
                return self._value(node)
            case {"same": target}:
                place = tuple(target)
                if seen is not None and place in seen:
                    return None
                return self.plain(node_at(self._root, place), place, seen)
            case {"module": _} | {"variable": _}:
                pure = self._pure(node, place, set() if seen is None else seen)
                return {} if pure is _ABSENT else pure
            case _:
                pass
        below = {
            key: self.plain(child, (*place, position), seen)
            for position, (key, child) in enumerate(children_in(node))
        }
        (kind,) = node
        if kind == "dict":
            # JAX sorts the keys of a dict, and cannot sort numbers and text together.
            are_mixed = len(set(map(type, below))) > 1
            return {str(k): e for k, e in below.items()} if are_mixed else below
        return list(below.values()) if kind == "list" else tuple(below.values())

    def _pure(self, node: Skeleton, place: Position, seen: set[Position]) -> Any:
        """Fill in a part of a module as NNX flattens it: nothing empty or twice."""
        self._count()
        match node:
            case None:
                return _ABSENT
            case int():
                return self._value(node)
            case {"same": target}:
                place = tuple(target)
                return self._pure(node_at(self._root, place), place, seen)
            case _ if place in seen:
                return _ABSENT
            case {"variable": child}:
                seen.add(place)
                return self.plain(child, (*place, 0), seen)
            case _:
                seen.add(place)
        below = {
            key: self._pure(child, (*place, position), seen)
            for position, (key, child) in enumerate(children_in(node))
        }
        below = {key: value for key, value in below.items() if value is not _ABSENT}
        return below or _ABSENT

    def _value(self, index: int) -> Any:
        value = self._values[index]
        if index not in self._used:
            self._used.add(index)
            return value
        if not isinstance(value, jax.Array | np.ndarray):
            return value
        if self._bytes_left is not None:
            self._bytes_left -= without_keys(value).nbytes
            if self._bytes_left < 0:
                raise OverfullError("its tree has its arrays in too many places")
        return value.copy()  # the caller may change or donate either

    def _count(self) -> None:
        """Count a node."""
        self._nodes_left -= 1
        if self._nodes_left < 0:
            raise OverfullError("its tree has its parts in too many places")


def _size(skeleton: Skeleton) -> int:
    """Count the nodes of a skeleton."""
    return 1 + sum(_size(child) for _, child in children_in(skeleton))


def _fill_plainly(
    skeleton: Skeleton, values: Sequence[Any], leaves: Sequence[Leaf], depth: int = 0
) -> PyTree:
    """Return the tree as Orbax stores it, without the leaves that are stored apart.

    A list has None for such a leaf, and for a further place of a shared part. A dict
    has no entry for them.
    """
    match skeleton:
        case None | {"same": _}:
            return None
        case int():
            return None if leaves[skeleton].is_apart else values[skeleton]
        case {"list": children} | {"tuple": children}:
            return [_fill_plainly(each, values, leaves, depth + 1) for each in children]
        case _:
            pairs = [
                (_stored_key(str(key), child, leaves, depth), child)
                for key, child in children_in(skeleton)
                if not (isinstance(child, dict) and "same" in child)
            ]
            return {
                key: _fill_plainly(child, values, leaves, depth + 1)
                for key, child in pairs
                if key is not None
            }


def _stored_key(
    key: str, child: Skeleton, leaves: Sequence[Leaf], depth: int
) -> str | None:
    """Return the key under which Orbax stores an entry; None if it does not store it.

    The leaves below the entry know the key. An entry without leaves is stored only if
    its key `is_plain`.
    """
    indices = list(indices_in(child))
    for index in indices:
        if not leaves[index].is_apart:
            return leaves[index].stored_path[depth]
    return key if not indices and is_plain(key) else None


def _look_up(tree: PyTree, path: Iterable[str]) -> Any:
    for name in path:
        tree = tree[int(name)] if isinstance(tree, list | tuple) else tree[name]
    return tree
