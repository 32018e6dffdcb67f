"""A part of a stored tree: what `select=` chooses."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from flaxckpt._runtime.failures import listed
from flaxckpt._trees.layout import Layout, OverfullError
from flaxckpt._trees.leaf import ARRAYS, Leaf
from flaxckpt._trees.skeleton import (
    Skeleton,
    children_in,
    found_at,
    indices_in,
    is_variable,
    node_at,
    with_children,
)
from flaxckpt._trees.ties import Position
from flaxckpt.errors import SettingError

Path: TypeAlias = tuple[str, ...]
Select: TypeAlias = str | Sequence[str] | Callable[[Path, Any], bool]
"""A path, or a function of a leaf's path and description that tells if it is chosen."""

_NODES = 2**20  # of a tree whose shared parts are repeated


def selected(layout: Layout, select: Select) -> Skeleton:
    """Return the part of a stored tree that is chosen, as `Layout.part` takes it.

    Args:
        layout: The layout of the tree.
        select: A path, as a text with slashes or a sequence of names: the part is the
            subtree there. Or a function, called with each leaf's path, a tuple of
            names, and a `jax.ShapeDtypeStruct` for an array and None for anything else;
            the part is the tree with the leaves for which it is true.

    Raises:
        SettingError: If nothing is stored there, or no leaf is chosen.
        OverfullError: If the tree is far larger than what is stored.
    """
    if callable(select):
        return _filtered(layout, select)
    if not isinstance(select, str | list | tuple):
        advice = "it is a path, or a function of a leaf's path and description."
        raise SettingError("select", select, advice)
    path = split(select) if isinstance(select, str) else tuple(map(str, select))
    node = found_at(layout.skeleton, path)
    if node is None:
        raise SettingError("select", select, _nothing_at(layout, path))
    return repeated(layout.skeleton, *node)


def _nothing_at(layout: Layout, path: Path) -> str:
    """Say that nothing is stored at a path, and what is stored above it."""
    above = path[:-1]
    while (node := found_at(layout.skeleton, above)) is None:
        above = above[:-1]
    names = [str(key) for key, _ in children_in(node[0])]
    what = f"has {listed(names)}" if names else "is a leaf"
    where = repr("/".join(above)) if above else "the tree"
    return f"nothing is stored at {'/'.join(path)!r}; {where} {what}."


def _filtered(layout: Layout, select: Callable[[Path, Any], bool]) -> Skeleton:
    whole = repeated(layout.skeleton, layout.skeleton, ())

    def visit(node: Skeleton, path: Path) -> Skeleton:
        if isinstance(node, int):
            return node if select(path, _described(layout.leaves[node])) else None
        pairs = [
            (
                key,
                child,
                visit(child, (*path, *(() if is_variable(node) else [str(key)]))),
            )
            for key, child in children_in(node)
        ]
        kept = [(key, new) for key, old, new in pairs if new is not None or old is None]
        if not any(new is not None for _, new in kept):
            return None
        if len(kept) == len(pairs):
            return with_children(node, [new for _, new in kept])
        kind = "module" if "module" in node else "dict"
        return {kind: [list(pair) for pair in kept]}

    found = visit(whole, ())
    if found is None:
        names = [
            "/".join(unit.path) for unit in units_in(whole, ()) if not unit.is_empty
        ]
        raise SettingError(
            "select", select, f"it holds for no leaf; there are {listed(names)}."
        )
    return found


def _described(leaf: Leaf) -> Any:
    """Describe a stored array to a function that selects leaves."""
    if leaf.kind not in ARRAYS:
        return None
    return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(leaf.dtype))


class Unit(NamedTuple):
    """What moves as a whole: a leaf, a Variable, a None or an empty container."""

    keys: tuple[str | int, ...]
    node: Skeleton

    @property
    def path(self) -> Path:
        return tuple(map(str, self.keys))

    @property
    def is_empty(self) -> bool:
        return not (isinstance(self.node, int) or is_variable(self.node))


def parts_in(node: Skeleton) -> list[tuple[str | int, Skeleton]]:
    """Return a node's children: none of a Variable, nor empty ones of a module."""
    if is_variable(node):
        return []
    children = children_in(node)
    if isinstance(node, dict) and "module" in node:
        return [each for each in children if any(True for _ in indices_in(each[1]))]
    return children


def units_in(node: Skeleton, keys: tuple[str | int, ...]) -> Iterator[Unit]:
    """Yield the units of a tree, in order."""
    children = parts_in(node)
    if not children:
        yield Unit(keys, node)
    for key, child in children:
        yield from units_in(child, (*keys, key))


def split(path: str) -> Path:
    return tuple(path.split("/")) if path else ()


def repeated(root: Skeleton, node: Skeleton, place: Position) -> Skeleton:
    """Return a node of a skeleton with each shared part in all its places.

    Args:
        root: The skeleton.
        node: The node.
        place: Where in the skeleton it is.

    Raises:
        OverfullError: If that has far more nodes than what is stored.
    """
    number = itertools.count()

    def visit(node: Skeleton, inside: tuple[Position, ...]) -> Skeleton:
        """Visit a node, within the places of it and of the shared parts above it."""
        if next(number) > _NODES:
            raise OverfullError("its tree has its parts in too many places")
        if isinstance(node, dict) and "same" in node:
            shared = tuple(node["same"])
            if any(shared == at[: len(shared)] for at in inside):
                return None  # what encloses itself
            return visit(node_at(root, shared), (*inside, shared))
        children = [
            visit(child, (*inside[:-1], (*inside[-1], position)))
            for position, (_, child) in enumerate(children_in(node))
        ]
        return with_children(node, children)

    return visit(node, (place,))
