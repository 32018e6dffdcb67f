"""A part of a stored tree, under its own names or others: `select=` and `rename=`."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from flaxckpt._trees.layout import Layout, OverfullError
from flaxckpt._trees.leaf import Leaf
from flaxckpt._trees.skeleton import (
    Skeleton,
    children_in,
    found_at,
    is_variable,
    node_at,
    with_children,
)
from flaxckpt.errors import SettingError

Path: TypeAlias = tuple[str, ...]
Select: TypeAlias = str | Sequence[str] | Callable[[Path, Any], bool]
"""A path, or a function of a leaf's path and description that tells if it is chosen."""

Rename: TypeAlias = Mapping[str, str] | Callable[[str], str]
"""New prefixes by old ones, or a function that returns the new name of a path."""

_SHOWN = 8  # names in a message
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
    path = _split(select) if isinstance(select, str) else tuple(map(str, select))
    node = found_at(layout.skeleton, path)
    if node is None:
        raise SettingError("select", select, _nothing_at(layout, path))
    return _Repeating(layout.skeleton).resolved(node[0], (node[1],))


def _nothing_at(layout: Layout, path: Path) -> str:
    """Say that nothing is stored at a path, and what is stored above it."""
    above = path[:-1]
    while (node := found_at(layout.skeleton, above)) is None:
        above = above[:-1]
    names = [str(key) for key, _ in children_in(node[0])]
    what = f"has {_listed(names)}" if names else "is a leaf"
    where = repr("/".join(above)) if above else "the tree"
    return f"nothing is stored at {'/'.join(path)!r}; {where} {what}."


def _filtered(layout: Layout, select: Callable[[Path, Any], bool]) -> Skeleton:
    whole = _Repeating(layout.skeleton).resolved(layout.skeleton, ((),))

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
        names = [leaf.name for leaf in layout.leaves]
        raise SettingError(
            "select", select, f"it holds for no leaf; there are {_listed(names)}."
        )
    return found


def _described(leaf: Leaf) -> Any:
    """Describe a stored array to a function that selects leaves."""
    if leaf.kind not in ("jax", "numpy", "numpy_scalar"):
        return None
    return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(leaf.dtype))


def renamed(layout: Layout, rename: Rename) -> Skeleton:
    """Return a stored tree under other names, as `Layout.part` takes it.

    A container stays of its kind if all its leaves move together; else it is a dict.

    Args:
        layout: The layout of the tree.
        rename: New prefixes by old ones, with slashes between names; the longest old
            prefix counts, and `""` is the root. Or a function of a leaf's path.

    Raises:
        SettingError: If an old prefix is not stored, if a new name is no text, or if
            two leaves would have one name.
        OverfullError: If the tree is far larger than what is stored.
    """
    whole = _Repeating(layout.skeleton).resolved(layout.skeleton, ((),))
    units = list(_units(whole, ()))
    moved = [
        (new, unit) for (_, unit), new in zip(units, _moved(units, rename), strict=True)
    ]
    kinds: dict[Path, Skeleton] = {}
    _note_kinds(whole, [new for new, _ in moved], kinds)
    root: Any = {}
    for new, unit in moved:
        node = root
        for name in new[:-1]:
            node = node.setdefault(name, {})
            if not isinstance(node, dict) or _UNIT in node:
                raise _collision(rename, new)
        if not new or new[-1] in node:
            if len(moved) == 1 and not new:
                return unit
            raise _collision(rename, new)
        node[new[-1]] = {_UNIT: unit}
    return _built(root, (), kinds)


_UNIT: Any = object()  # the key of what is no container


def _built(node: Any, path: Path, kinds: Mapping[Path, Skeleton]) -> Skeleton:
    if _UNIT in node:
        return node[_UNIT]
    pairs = {name: _built(child, (*path, name), kinds) for name, child in node.items()}
    old = kinds.get(path)
    names = [] if old is None else [str(key) for key, _ in children_in(old)]
    if old is not None and names == list(pairs):
        return with_children(old, list(pairs.values()))
    if old is not None and "module" in old:
        return {"module": [list(pair) for pair in pairs.items()]}
    return {"dict": [list(pair) for pair in sorted(pairs.items())]}


def _units(node: Skeleton, path: Path) -> Iterator[tuple[Path, Skeleton]]:
    """Yield the leaves and Variables of a tree, with their paths."""
    if isinstance(node, int) or is_variable(node):
        yield path, node
        return
    for key, child in children_in(node):
        yield from _units(child, (*path, str(key)))


def _note_kinds(
    whole: Skeleton, new: Sequence[Path], kinds: dict[Path, Skeleton]
) -> None:
    """Note of which kind each container is, by where all its leaves have moved to."""
    paths = iter(new)

    def visit(node: Skeleton, depth: int) -> list[tuple[Path, Path]]:
        """Return for each leaf of a node its path from the node, and its new path."""
        if isinstance(node, int) or is_variable(node):
            return [((), next(paths))]
        below = [
            ((str(key), *rest), path)
            for key, child in children_in(node)
            for rest, path in visit(child, depth + 1)
        ]
        tops = {
            path[: len(path) - len(rest)]
            if path[len(path) - len(rest) :] == rest
            else None
            for rest, path in below
        }
        if len(tops) == 1 and None not in tops:
            kinds.setdefault(next(iter(tops)), node)  # type: ignore[arg-type]
        return below

    visit(whole, 0)


def _moved(units: Sequence[tuple[Path, Skeleton]], rename: Rename) -> list[Path]:
    """Return the new path of each of the leaves."""
    if callable(rename):
        return [_by_function(path, rename) for path, _ in units]
    pairs = rename.items() if isinstance(rename, Mapping) else [("", None)]
    if not all(isinstance(each, str) for pair in pairs for each in pair):
        advice = "it is a mapping of texts, or a function of a leaf's path."
        raise SettingError("rename", rename, advice)
    prefixes = {_split(old): _split(new) for old, new in rename.items()}
    used: set[Path] = set()
    moved: list[Path] = []
    for path, _ in units:
        old = next(
            (path[:n] for n in range(len(path), -1, -1) if path[:n] in prefixes), None
        )
        if old is not None:
            used.add(old)
            path = prefixes[old] + path[len(old) :]
        moved.append(path)
    for old in prefixes.keys() - used:
        names = ["/".join(path) for path, _ in units]
        raise SettingError(
            "rename",
            rename,
            f"nothing is stored below {'/'.join(old)!r}; there are {_listed(names)}.",
        )
    return moved


def _by_function(path: Path, rename: Callable[[str], str]) -> Path:
    name = "/".join(path)
    new = rename(name)
    if not isinstance(new, str):
        raise SettingError(
            "rename", rename, f"for {name!r} it returned {new!r}, which is no text."
        )
    return path if new == name else _split(new)


def _collision(rename: Rename, path: Path) -> SettingError:
    name = "/".join(path)
    return SettingError("rename", rename, f"two leaves would be at {name!r}.")


def _split(path: str) -> Path:
    return tuple(path.split("/")) if path else ()


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


class _Repeating:
    """Repeats shared parts of a skeleton in all their places."""

    def __init__(self, root: Skeleton) -> None:
        self._root, self._nodes = root, itertools.count()

    def resolved(self, node: Skeleton, inside: tuple[tuple[int, ...], ...]) -> Skeleton:
        """Return a node without `same` nodes.

        Args:
            node: The node.
            inside: The places of the node and of the shared parts that it is in. What
                encloses itself is None within itself.
        """
        if next(self._nodes) > _NODES:
            raise OverfullError("its tree has its parts in too many places")
        if isinstance(node, dict) and "same" in node:
            place = tuple(node["same"])
            if any(place == at[: len(place)] for at in inside):
                return None
            return self.resolved(node_at(self._root, place), (*inside, place))
        children = [
            self.resolved(child, (*inside[:-1], (*inside[-1], position)))
            for position, (_, child) in enumerate(children_in(node))
        ]
        return with_children(node, children)
