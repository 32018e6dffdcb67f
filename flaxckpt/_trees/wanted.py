"""What a tree asks for: for each of its leaves the kind, dtype, shape and place."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.core import Tracer

from flaxckpt._trees.describe import RefusedError, array_leaf, normal, unstored_kind
from flaxckpt._trees.layout import Filling, Layout
from flaxckpt._trees.leaf import ARRAYS, PLACED, PYTHON, SCALARS, STORED, Leaf
from flaxckpt._trees.placing import AsStored, is_placement, placed
from flaxckpt._trees.skeleton import (
    Finder,
    Skeleton,
    children_in,
    key_of,
    node_at,
)
from flaxckpt._trees.stateful import STATEFUL, is_stateful
from flaxckpt._trees.structure import structure_of
from flaxckpt._trees.ties import (
    Position,
    PyTree,
    children_of,
    flatten,
    leaves_of,
    role_of,
)
from flaxckpt.errors import UnsupportedLeafError


@dataclass(frozen=True)
class Wanted:
    """What a leaf is to be restored as.

    Attributes:
        leaf: The wanted kind, dtype and shape.
        sharding: Where to place it; None for JAX's default device, uncommitted.
        is_weak: Whether the dtype is only JAX's guess for a Python number.
        type: The own type of a Python number or text, such as an `enum.IntEnum`.
        is_struct: Whether `like` only describes the leaf and has no value for it.
    """

    leaf: Leaf
    sharding: jax.sharding.Sharding | None = None
    is_weak: bool = False
    type: Callable[[Any], Any] | None = None
    is_struct: bool = False

    def resolved(self, have: Leaf | None, *, cast: bool) -> "Wanted":
        """Copy kind, dtype and shape of the stored leaf if `like` has only a place."""
        if self.leaf.kind == STORED and have is not None:
            return as_stored(have, cast=cast)
        if self.leaf.kind != PLACED or have is None:
            return self
        if have.kind == "jax" or (have.kind in ARRAYS and is_of_jax(have.dtype)):
            return Wanted(replace(have, kind="jax"), self.sharding)
        return Wanted(have, self.sharding if have.kind == "key" else None)

    @property
    def is_in_one_piece(self) -> bool:
        """Whether it goes to the host, or to one device of this process."""
        return self.sharding is None or (
            self.sharding.is_fully_addressable and len(self.sharding.device_set) == 1
        )


def on_host(leaf: Leaf) -> Wanted:
    """Describe a stored leaf as wanted on the host."""
    return Wanted(replace(leaf, kind="numpy") if leaf.kind == "jax" else leaf)


def completed(like: PyTree, layout: Layout) -> PyTree:
    """Return `like` with a leaf for each that is stored.

    A sharding for a whole subtree is repeated for its leaves. Where `like` has a None,
    what is stored there is wanted as it is.
    """
    flat = flatten(like)
    if like is not None and structure_of(flat, like).has_none:
        like = _without_none(like, layout)
        flat = flatten(like)
    if not any(map(is_placement, flat.leaves)):
        return like

    finder = Finder(layout.skeleton)

    def spread_one(leaf: Any, path: tuple[str, ...]) -> Any:
        is_whole = is_placement(leaf) and not isinstance(leaf, AsStored)
        subtree = finder.at(path) if is_whole else None
        if subtree is None or isinstance(subtree[0], int):
            return leaf
        return Filling(layout.skeleton, [leaf] * len(layout.leaves)).plain(*subtree)

    paths = structure_of(flat, like).paths
    return flat.rebuilt(list(map(spread_one, flat.leaves, paths)))


def _without_none(like: PyTree, layout: Layout) -> PyTree:
    """Replace each None by a tree of `AsStored`, as many as are stored there."""
    every = [AsStored()] * len(layout.leaves)
    filling = Filling(layout.skeleton, every)

    def visit(node: PyTree, have: Skeleton, place: Position) -> PyTree:
        if isinstance(have, dict) and "same" in have:
            place = tuple(have["same"])
            have = node_at(layout.skeleton, place)
        if node is None:
            stored = None if have is None else filling.plain(have, place)
            has_leaf = isinstance(have, int) or bool(leaves_of(stored))
            return stored if has_leaf else None
        # A None in an NNX object is no part of a tree.
        if have is None or isinstance(have, int) or role_of(node):
            return node
        pairs, treedef = children_of(node)
        if jax.tree_util.treedef_is_leaf(treedef):
            return node
        below = {
            str(key): (child, (*place, at))
            for at, (key, child) in enumerate(children_in(have))
        }
        children = [
            visit(child, *below.get(str(key_of(entries[0])), (None, ())))
            for entries, child in pairs
        ]
        return treedef.unflatten(children)

    return visit(like, layout.skeleton, ())


def wanted_leaves(like: PyTree) -> list[Wanted]:
    """Describe what a tree of arrays, `ShapeDtypeStruct`s or shardings asks for."""
    flat = flatten(like)
    structure = structure_of(flat, like)
    wanted: list[Wanted] = []
    refused: list[tuple[str, str]] = []
    for value, path, in_equinox in zip(
        flat.leaves, structure.paths, structure.in_equinox, strict=True
    ):
        is_struct = isinstance(value, jax.ShapeDtypeStruct) or is_placement(value)
        kind = "" if is_struct else unstored_kind(value, in_equinox=in_equinox)
        if kind:
            wanted.append(Wanted(Leaf(path, kind)))
            continue
        try:
            wanted.append(_wanted(path, value))
        except RefusedError as refusal:
            refused.append((Leaf(path, "").name, str(refusal)))
    if refused:
        raise UnsupportedLeafError(tuple(refused), "restored")
    return wanted


def _wanted(path: tuple[str, ...], value: Any) -> Wanted:
    try:
        if isinstance(value, AsStored):
            return Wanted(Leaf(path, STORED), is_struct=True)
        if is_placement(value):
            return Wanted(Leaf(path, PLACED), placed(value), is_struct=True)
        if isinstance(value, jax.ShapeDtypeStruct):
            return Wanted(
                array_leaf(path, value),
                placed(value.sharding),
                is_weak=value.weak_type,
                is_struct=True,
            )
    except ValueError as error:
        raise RefusedError(str(error)) from error
    if isinstance(value, Tracer):
        raise RefusedError("a value of a running trace")
    if isinstance(value, jax.Array):
        return Wanted(
            array_leaf(path, value),
            value.sharding if value.committed else None,
            is_weak=getattr(value, "weak_type", False),  # keys have none
        )
    if is_stateful(value):
        return Wanted(Leaf(path, STATEFUL))
    leaf, _ = normal(path, value, lambda dtype: True)
    is_own = leaf.kind in (*PYTHON, "str") and type(value) not in (*SCALARS, str)
    return Wanted(leaf, type=type(value) if is_own else None)


def as_stored(leaf: Leaf, *, cast: bool) -> Wanted:
    """Describe a leaf as wanted without `like`: as stored, or cast to what JAX has."""
    if cast and leaf.kind == "jax":
        leaf = replace(leaf, dtype=str(jax.dtypes.canonicalize_dtype(leaf.dtype)))
    return Wanted(leaf)


def is_of_jax(dtype: str) -> bool:
    """Tell whether JAX has arrays of a dtype in its present settings."""
    return bool(jax.dtypes.canonicalize_dtype(dtype) == dtype)


def is_wide(dtype: Any) -> bool:
    """Tell whether JAX has arrays of a dtype only if 64 bits are enabled."""
    with jax.enable_x64(False):
        return jax.dtypes.canonicalize_dtype(dtype) != dtype
