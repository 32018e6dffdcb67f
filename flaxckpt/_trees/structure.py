"""A walk over a tree: its skeleton, and the path and stored name of each leaf.

The result is kept for each structure that JAX's flattening tells apart.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax

from flaxckpt._trees.names import is_recordable, spelled
from flaxckpt._trees.remembered import Remembered
from flaxckpt._trees.skeleton import VALUE, Skeleton, key_of
from flaxckpt._trees.ties import (
    MODULE,
    STATE,
    VARIABLE,
    Flat,
    Position,
    PyTree,
    Seen,
    children_of,
    flatten,
    role_of,
)
from flaxckpt.errors import UnsupportedLeafError


def skeleton_of(tree: PyTree) -> Skeleton:
    """Return the skeleton of a tree."""
    return structure_of(flatten(tree), tree).skeleton


@dataclass(frozen=True)
class _Structure:
    skeleton: Skeleton
    paths: tuple[tuple[str, ...], ...]
    in_equinox: tuple[bool, ...]
    spelled: Mapping[int, tuple[str, ...]]
    refused: Sequence[tuple[str, str]]
    has_none: bool


def structure_of(flat: Flat, tree: PyTree) -> _Structure:
    return _KNOWN.get_or_make(flat.key, lambda: _walk(tree))


_KNOWN = Remembered[_Structure](64)


def _walk(tree: PyTree) -> _Structure:
    paths: list[tuple[str, ...]] = []
    within: list[bool] = []
    refused: list[tuple[str, str]] = []
    equinox = sys.modules.get("equinox")
    seen, has_none = Seen(), False

    def visit(
        node: PyTree,
        path: tuple[str, ...],
        place: Position,
        in_equinox: bool,
        in_state: bool,
    ) -> Skeleton:
        nonlocal has_none
        if node is None:
            has_none = True
            return None
        is_array = isinstance(node, jax.Array)  # a short way: there may be many
        role = "" if is_array else role_of(node)
        if role in (VARIABLE, MODULE) and not in_state:
            before = seen.place_of(node, place)
            if before is not None:
                return {"same": list(before)}
        children = [] if is_array else children_of(node)[0]
        if is_array or (len(children) == 1 and not children[0][0]):
            paths.append(path)
            within.append(in_equinox)
            return len(paths) - 1
        inside = in_equinox or (
            equinox is not None and isinstance(node, equinox.Module)
        )
        values = in_state or role == STATE
        try:
            keys = [key_of(entries[0]) for entries, _ in children]
        except UnsupportedLeafError as error:
            refused.append(("/".join((*path, "(a key)")), error.leaves[0][1]))
            keys = list(range(len(children)))
        refused.extend(_refused_keys(path, keys))
        below = [
            visit(child, (*path, str(key)), (*place, position), inside, values)
            for position, (key, (_, child)) in enumerate(
                zip(keys, children, strict=True)
            )
        ]
        if role == VARIABLE and keys == [VALUE]:
            return {"variable": below[0]}
        if type(node) in (list, tuple):
            return {type(node).__name__: below}
        kind = "module" if role in (MODULE, STATE) else "dict"
        return {kind: [list(pair) for pair in zip(keys, below, strict=True)]}

    skeleton = visit(tree, (), (), in_equinox=False, in_state=False)
    names = {} if refused else spelled(paths)
    return _Structure(skeleton, tuple(paths), tuple(within), names, refused, has_none)


def _refused_keys(
    path: tuple[str, ...], keys: Sequence[str | int]
) -> Iterator[tuple[str, str]]:
    """Yield the keys of one node that cannot name a leaf, each with the reason."""
    seen: dict[str, str | int] = {}
    for key in keys:
        name = "/".join((*path, str(key)))
        if str(key) in seen:
            other = seen[str(key)]
            is_same = f"has the same name as its neighbor: their keys, {other!r} and "
            yield name, f"{is_same}{key!r}, are the same as text; rename one"
        seen[str(key)] = key
        if not is_recordable(str(key)):
            yield name, "has two surrogates as a pair in its name; rename the key"
