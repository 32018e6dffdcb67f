"""A stored tree under other names: what `rename=` gives."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from flaxckpt._runtime.failures import listed
from flaxckpt._trees.layout import Layout
from flaxckpt._trees.selection import (
    Path,
    Unit,
    parts_in,
    repeated,
    split,
    units_in,
)
from flaxckpt._trees.skeleton import (
    VALUE,
    Skeleton,
    children_in,
    is_variable,
    with_children,
)
from flaxckpt.errors import SettingError

Rename: TypeAlias = Mapping[str, str] | Callable[[str], str]
"""New prefixes by old ones, or a function that returns the new name of a path."""


def renamed(layout: Layout, rename: Rename) -> Skeleton:
    """Return a stored tree under other names, as `Layout.part` takes it.

    A container stays of its kind if all that is in it moves together; else it is a
    dict. An NNX Variable moves as a whole.

    Args:
        layout: The layout of the tree.
        rename: New prefixes by old ones, with slashes between names; the longest old
            prefix counts, and `""` is the root. Or a function of a leaf's path.

    Raises:
        SettingError: If an old prefix is not stored, if a new name is no text, or if
            two leaves would have one name.
        OverfullError: If the tree is far larger than what is stored.
    """
    whole = repeated(layout.skeleton, layout.skeleton, ())
    units = list(units_in(whole, ()))
    moved = _moved(units, rename)
    if moved == [()]:
        return units[0].node
    kinds = _kinds_at(whole, moved)
    root: Any = {}
    for unit, new in zip(units, moved, strict=True):
        node = root
        for name in new[:-1]:
            node = node.setdefault(name, {})
            if _UNIT in node:
                raise _collision(rename, new)
        if not new or new[-1] in node:
            raise _collision(rename, new)
        node[new[-1]] = {_UNIT: unit.node}
    return _built(root, (), kinds, _keys_at(units, moved))


_UNIT: Any = object()  # the key of what is no container


def _built(
    node: Any,
    path: Path,
    kinds: Mapping[Path, Skeleton],
    keys: Mapping[Path, str | int],
) -> Skeleton:
    """Build the skeleton of a renamed tree from nested dicts of units."""
    if _UNIT in node:
        return node[_UNIT]
    pairs = {
        name: _built(child, (*path, name), kinds, keys) for name, child in node.items()
    }
    old = kinds.get(path)
    if old is not None and [str(key) for key, _ in children_in(old)] == list(pairs):
        return with_children(old, list(pairs.values()))
    kind = "module" if old is not None and "module" in old else "dict"
    named = [(keys.get((*path, name), name), child) for name, child in pairs.items()]
    return {kind: [list(pair) for pair in named]}


def _keys_at(units: Sequence[Unit], moved: Sequence[Path]) -> dict[Path, str | int]:
    """Return the keys that are numbers and stay so, by their new paths.

    A key stays if all keys in front of it or all behind it do.
    """
    keys: dict[Path, str | int] = {}
    for unit, new in zip(units, moved, strict=True):
        pairs = list(zip(unit.keys, new, strict=False))
        behind = list(zip(reversed(unit.keys), reversed(new), strict=False))
        for at, (key, name) in enumerate(pairs):
            if str(key) != name:
                break
            keys[new[: at + 1]] = key
        for at, (key, name) in enumerate(behind):
            if str(key) != name:
                break
            keys[new[: len(new) - at]] = key
    return keys


def _kinds_at(whole: Skeleton, moved: Sequence[Path]) -> dict[Path, Skeleton]:
    """Return the containers all of whose units move together, by where they move to."""
    paths, kinds = iter(moved), dict[Path, Skeleton]()

    def visit(node: Skeleton) -> list[tuple[Path, Path]]:
        """Return for each unit of a node its path from the node, and its new path."""
        children = parts_in(node)
        if not children:
            return [((), next(paths))]
        below = [
            ((str(key), *rest), path)
            for key, child in children
            for rest, path in visit(child)
        ]
        if (top := _top_of(below)) is not None:
            kinds.setdefault(top, node)
        return below

    visit(whole)
    return kinds


def _top_of(below: Iterable[tuple[Path, Path]]) -> Path | None:
    """Return the one path above all new paths that end as the old ones do, or None."""
    tops = {
        path[: len(path) - len(rest)]
        if len(path) >= len(rest) and path[len(path) - len(rest) :] == rest
        else None
        for rest, path in below
    }
    return next(iter(tops)) if len(tops) == 1 else None


def _moved(units: Sequence[Unit], rename: Rename) -> list[Path]:
    """Return the new path of each unit."""
    if callable(rename):
        return _moved_by_function(units, rename)
    pairs = rename.items() if isinstance(rename, Mapping) else [("", None)]
    if not all(isinstance(each, str) for pair in pairs for each in pair):
        advice = "it is a mapping of texts, or a function of a leaf's path."
        raise SettingError("rename", rename, advice)
    prefixes = {split(old): split(new) for old, new in rename.items()}
    used: set[Path] = set()
    moved: list[Path] = []
    for unit in units:
        # A Variable's value has a name, too, which `describe` shows.
        path = (*unit.path, VALUE) if is_variable(unit.node) else unit.path
        old = next(
            (path[:n] for n in range(len(path), -1, -1) if path[:n] in prefixes), None
        )
        if old is not None:
            used.add(old)
            path = prefixes[old] + path[len(old) :]
        ends = is_variable(unit.node) and path[-1:] == (VALUE,)
        moved.append(path[:-1] if ends else path)
    for old in prefixes.keys() - used:
        raise SettingError("rename", rename, _no_prefix(units, old))
    return moved


def _no_prefix(units: Sequence[Unit], old: Path) -> str:
    """Say that nothing moves by a prefix."""
    if any(unit.path[: len(old)] == old for unit in units):
        return f"all that is below {'/'.join(old)!r} moves by longer prefixes."
    names = ["/".join(unit.path) for unit in units if not unit.is_empty]
    return f"nothing is stored below {'/'.join(old)!r}; there are {listed(names)}."


def _moved_by_function(
    units: Sequence[Unit], rename: Callable[[str], str]
) -> list[Path]:
    """Move the leaves by a function, and what is empty with the leaves beside it."""
    moved = [None if unit.is_empty else _by_function(unit, rename) for unit in units]
    above: dict[Path, list[tuple[Path, Path]]] = {}
    for unit, new in zip(units, moved, strict=True):
        for depth in range(len(unit.path) + 1 if new is not None else 0):
            pair = unit.path[depth:], new or ()
            above.setdefault(unit.path[:depth], []).append(pair)
    tops = {path: _top_of(below) for path, below in above.items()}

    def followed(path: Path) -> Path:
        for depth in range(len(path), -1, -1):
            top = tops.get(path[:depth])
            if top is not None:
                return top + path[depth:]
        return path

    return [
        followed(unit.path) if new is None else new
        for unit, new in zip(units, moved, strict=True)
    ]


def _by_function(unit: Unit, rename: Callable[[str], str]) -> Path:
    name = "/".join(unit.path)
    new = rename(name)
    if not isinstance(new, str):
        raise SettingError(
            "rename", rename, f"for {name!r} it returned {new!r}, which is no text."
        )
    return unit.path if new == name else split(new)


def _collision(rename: Rename, path: Path) -> SettingError:
    name = "/".join(path)
    return SettingError("rename", rename, f"two leaves would be at {name!r}.")
