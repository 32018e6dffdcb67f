"""The layout of a stored tree: its skeleton and its leaves.

A layout knows what Orbax does not: tuples from lists, numbers as dict keys, empty
arrays, kinds of leaves, and what is in two places.
"""

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
from flaxckpt._trees.ties import Place, PyTree


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
        their state, which `nnx.update` and `nnx.replace_by_pure_dict` take: dicts of
        values, each once, with integers for positions. What is shared by several of
        them is in each.

        Args:
            values: The leaves, in order.
            limit: The most bytes that the copies of shared arrays may take.

        Raises:
            OverfullError: If they would take more.
        """
        return Filling(self.skeleton, values, limit).plain(self.skeleton, ())

    def fill_for_orbax(self, values: Sequence[Any]) -> PyTree:
        """Return the tree as Orbax stores it: keys as spelled, no tuples, never empty.

        The leaves that are stored apart are entries of the root, which is a dict then.
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
        """Return the leaves of what Orbax loaded; None for those it does not hold."""
        return [
            _look_up(orbax_tree, leaf.stored_path) if leaf.in_orbax else None
            for leaf in self.leaves
        ]

    def part(self, skeleton: Skeleton) -> tuple["Layout", list[int]]:
        """Return the layout of a part, and the index in `leaves` of each leaf of it.

        Args:
            skeleton: The part's structure, with indices into `leaves`.
        """
        leaves: list[Leaf] = []
        sources: list[int] = []

        def visit(node: Skeleton, path: tuple[str, ...]) -> Skeleton:
            if node is None:
                return None
            if isinstance(node, int):
                leaves.append(replace(self.leaves[node], path=path))
                sources.append(node)
                return len(leaves) - 1
            pairs = children_in(node)
            return with_children(node, [visit(e, (*path, str(k))) for k, e in pairs])

        return Layout(visit(skeleton, ()), tuple(leaves)), sources

    def to_json(self) -> dict[str, Any]:
        """Return the layout as JSON values, less digests and checksums."""
        return {
            "tree": self.skeleton,
            "leaves": [
                {
                    key: value
                    for key, value in vars(leaf).items()
                    if key in LEAF_FIELDS - {"digest", "sums"}
                    and value != ""
                    and (key != "shape" or leaf.dtype)
                    and (key != "stored" or value)
                }
                for leaf in self.leaves
            ],
        }

    @property
    def nbytes(self) -> int:
        """Size of all leaves' values in memory."""
        return sum([leaf.nbytes for leaf in self.leaves])

    @property
    def most_bytes(self) -> int:
        """What a tree may take in memory that is filled with these leaves.

        A few lines in a table of leaves could ask for any number of copies.
        """
        return _COPIES * self.nbytes + _COPIED_BYTES

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> "Layout":
        """Return the layout of which `to_json` returned the fields.

        With `digests` and `sums` beside them: those of the leaves that Orbax holds, in
        order.

        Raises:
            ValueError: If there are more or fewer of them.
        """
        digests, sums = table.get("digests", ()), table.get("sums", ())
        leaves = [
            Leaf(
                path=tuple(each["path"]),
                kind=each["kind"],
                dtype=each.get("dtype", ""),
                shape=tuple(each.get("shape", ())),
                impl=each.get("impl", ""),
                digest=each.get("digest", ""),
                stored=tuple(each.get("stored", ())),
            )
            for each in table["leaves"]
        ]
        if "digests" in table:  # in format 1, each leaf has its own
            held = [index for index, leaf in enumerate(leaves) if leaf.in_orbax]
            sums = sums or [()] * len(held)
            for index, digest, own in zip(held, digests, sums, strict=True):
                leaves[index] = replace(leaves[index], digest=digest, sums=tuple(own))
        return cls(table["tree"], tuple(leaves))


_ABSENT: Any = object()
# What a tree without `like` may be larger than what is stored.
_COPIES = 16
_COPIED_BYTES = 2**28
_COPIED_NODES = 2**20


class OverfullError(ValueError):
    """A stored tree has more in it than it can have in a checkpoint of its size."""


class Filling:
    """A skeleton on the way to dicts, lists and tuples of values."""

    def __init__(
        self, skeleton: Skeleton, values: Sequence[Any], limit: int | None = None
    ) -> None:
        self._root, self._values = skeleton, values
        self._used: set[int] = set()
        self._nodes_left = _COPIES * _size(skeleton) + _COPIED_NODES
        self._bytes_left = limit

    def plain(
        self, node: Skeleton, place: Place, seen: set[Place] | None = None
    ) -> PyTree:
        """Fill a node in.

        Args:
            node: The node.
            place: Where it is.
            seen: What is filled in already of the module that it is in.
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
            # JAX sorts the keys of a dict, and cannot sort numbers among text.
            are_mixed = len(set(map(type, below))) > 1
            return {str(k): e for k, e in below.items()} if are_mixed else below
        return list(below.values()) if kind == "list" else tuple(below.values())

    def _pure(self, node: Skeleton, place: Place, seen: set[Place]) -> Any:
        """Fill in a part of a module, as NNX flattens it: nothing empty or twice."""
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
        return value.copy()  # each place has its own, to change or to donate

    def _count(self) -> None:
        """Count a node."""
        self._nodes_left -= 1
        if self._nodes_left < 0:
            raise OverfullError("its tree has its parts in too many places")


def _size(skeleton: Skeleton) -> int:
    """Return the number of a skeleton's nodes."""
    return 1 + sum(_size(child) for _, child in children_in(skeleton))


def _fill_plainly(
    skeleton: Skeleton, values: Sequence[Any], leaves: Sequence[Leaf], depth: int = 0
) -> PyTree:
    """Return the tree as Orbax stores it, less the leaves that are stored apart.

    None stands for them in lists, and for other places of what is shared; dicts have no
    entry.
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
    """Return the key by which Orbax has an entry; None if it has none.

    Where the entry has leaves, they know the key. Otherwise only its name is stored, if
    the name is an ordinary one.
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
