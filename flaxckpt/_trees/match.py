"""The match of a stored layout with a wanted tree: which leaf becomes which.

It compares the leaves by path, before any value is read, and reports all differences.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from flaxckpt._trees.describe import RefusedError, array_leaf, from_like, normal
from flaxckpt._trees.layout import Filling, Layout
from flaxckpt._trees.leaf import ARRAYS, PLACED, PYTHON, SCALARS, Leaf
from flaxckpt._trees.placing import is_placement, placed
from flaxckpt._trees.skeleton import (
    VALUE,
    Skeleton,
    children_in,
    found_at,
    has_same,
    is_variable,
    target,
)
from flaxckpt._trees.structure import skeleton_of, structure_of
from flaxckpt._trees.ties import PyTree, flatten
from flaxckpt.errors import (
    CheckpointMismatchError,
    LeafDifference,
    UnsupportedLeafError,
)


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

    def resolved(self, have: Leaf | None) -> "Wanted":
        """Copy kind, dtype and shape of the stored leaf if `like` has only a place."""
        if self.leaf.kind != PLACED or have is None:
            return self
        if have.kind == "jax" or (have.kind in ARRAYS and _is_of_jax(have.dtype)):
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


@dataclass(frozen=True)
class Twin:
    """A stored leaf that must equal another one: `like` has a single leaf for both.

    Attributes:
        position: The index of the single leaf among the wanted leaves.
        index: The index of this stored leaf in the layout.
    """

    position: int
    index: int


def match(
    path: str, layout: Layout, like: PyTree, *, cast: bool
) -> tuple[list[tuple[int | None, Wanted]], list[Twin]]:
    """Compare a stored tree with the wanted one.

    Args:
        path: The checkpoint, for the error.
        layout: What is stored.
        like: A tree of arrays, `jax.ShapeDtypeStruct`s, shardings or scalars; None for
            the stored tree as it is.
        cast: Whether differences between numeric dtypes are allowed.

    Returns:
        Two lists. The first has, for each wanted leaf in order, the index of its stored
        leaf in `layout` and what to restore it as. The index is None for a leaf that is
        not a value and comes from `like`. A leaf that is stored once and wanted in
        several places has its index in each. The second list has the stored leaves
        whose values must still be compared.

    Raises:
        CheckpointMismatchError: If the two differ; it lists every such leaf.
        UnsupportedLeafError: If `like` has no value where one is stored, or a leaf that
            cannot be restored.
    """
    unused = dict.fromkeys(range(len(layout.leaves)))
    found: list[tuple[int | None, Wanted]] = []
    twins: list[Twin] = []
    differences: list[LeafDifference] = []
    refused: list[tuple[str, str]] = []
    would_cast = not cast  # and it would be enough
    if like is None:
        wanted = [_as_stored(leaf, cast=cast) for leaf in layout.leaves]
        places: list[list[int]] = [[index] for index in range(len(wanted))]
    else:
        wanted = wanted_leaves(like)
        places = _places(layout, [want.leaf.path for want in wanted], like)
    for want, indices in zip(wanted, places, strict=True):
        index = indices[0] if indices else None
        have = None if index is None else layout.leaves[index]
        for each in indices:
            unused.pop(each, None)
        want = want.resolved(have)
        if want.leaf.is_from_like:
            if have is not None and not have.is_from_like:
                problem = f"a {want.leaf}, and the checkpoint has {have}"
                refused.append((want.leaf.name, problem))
            found.append((None, want))
            continue
        if have is not None and have.is_from_like and want.is_struct:
            found.append((None, want))
            continue
        problem = _difference(have, want, cast=cast)
        if problem is not None:
            stored_as = "nothing" if have is None else str(have)
            differences.append(LeafDifference(want.leaf.name, stored_as, problem))
            would_cast = would_cast and _difference(have, want, cast=True) is None
        for each in indices[1:]:
            twin = layout.leaves[each]
            if have is not None and (twin.kind, str(twin)) != (have.kind, str(have)):
                differences.append(difference_of_twins(have, twin))
                would_cast = False
            elif have is not None and not (have.digest and have.digest == twin.digest):
                twins.append(Twin(len(found), each))
        found.append((index, want))
    if refused:
        raise UnsupportedLeafError(tuple(refused), "restored")
    for index in unused:
        leaf = layout.leaves[index]
        if not leaf.is_from_like:
            differences.append(LeafDifference(leaf.name, str(leaf), "nothing"))
            would_cast = False
    if differences:
        raise CheckpointMismatchError(
            path,
            differences,
            _advice(differences, would_cast=would_cast, has_like=like is not None),
        )
    return found, twins


def difference_of_twins(have: Leaf, twin: Leaf) -> LeafDifference:
    """Describe two stored leaves that differ although `like` has one leaf for both."""
    return LeafDifference(
        have.name, f"{have}, and other values as {twin.name}", "one shared by both"
    )


def _places(
    layout: Layout, wanted: Sequence[tuple[str, ...]], like: PyTree
) -> list[list[int]]:
    """Return the indices in the layout of each wanted leaf, lowest first.

    A wanted leaf usually has one index. It has several if `like` shares what was stored
    several times, and none if nothing is stored for it.
    """
    skeleton = skeleton_of(like)
    if not (has_same(layout.skeleton) or has_same(skeleton)):
        stored = {leaf.path: index for index, leaf in enumerate(layout.leaves)}
        if stored.keys() >= set(wanted):
            return [[stored[path]] for path in wanted]
    indices: list[set[int]] = [set() for _ in wanted]
    seen: set[tuple[int, int]] = set()

    def visit(have: Skeleton, want: Skeleton) -> None:
        """Walk both trees along the paths that both have."""
        have, want = target(layout.skeleton, have), target(skeleton, want)
        # A pure dict has a Variable's value at the place of the Variable.
        if is_variable(have) and VALUE not in dict(children_in(want)):
            have = have["variable"]
        if is_variable(want) and VALUE not in dict(children_in(have)):
            want = want["variable"]
        if isinstance(have, int) and isinstance(want, int):
            indices[want].add(have)
        if isinstance(have, dict) and isinstance(want, dict):
            pair = id(have), id(want)
            if pair not in seen:
                seen.add(pair)
                there = {str(key): child for key, child in children_in(have)}
                for key, child in children_in(want):
                    if str(key) in there:
                        visit(there[str(key)], child)

    visit(layout.skeleton, skeleton)
    return [sorted(each) for each in indices]


def spread(like: PyTree, layout: Layout) -> PyTree:
    """Return `like`, with a sharding for a whole subtree repeated for its leaves."""
    flat = flatten(like)
    if not any(map(is_placement, flat.leaves)):
        return like

    def spread_one(leaf: Any, path: tuple[str, ...]) -> Any:
        found = found_at(layout.skeleton, path) if is_placement(leaf) else None
        if found is None or isinstance(found[0], int):
            return leaf
        return Filling(layout.skeleton, [leaf] * len(layout.leaves)).plain(*found)

    paths = structure_of(flat, like).paths
    return flat.rebuilt(list(map(spread_one, flat.leaves, paths)))


def wanted_leaves(like: PyTree) -> list[Wanted]:
    """Describe what a tree of arrays, `ShapeDtypeStruct`s or shardings asks for."""
    flat = flatten(like)
    structure = structure_of(flat, like)
    wanted: list[Wanted] = []
    refused: list[tuple[str, str]] = []
    for value, path, in_equinox in zip(
        flat.leaves,
        structure.paths,
        structure.in_equinox,
        strict=True,
    ):
        is_struct = isinstance(value, jax.ShapeDtypeStruct) or is_placement(value)
        kind = "" if is_struct else from_like(value, in_equinox=in_equinox)
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
    leaf, _ = normal(path, value, lambda dtype: True)
    is_own = leaf.kind in (*PYTHON, "str") and type(value) not in (*SCALARS, str)
    return Wanted(leaf, type=type(value) if is_own else None)


def _as_stored(leaf: Leaf, *, cast: bool) -> Wanted:
    """Describe a leaf as wanted without `like`: as stored, or cast to what JAX has."""
    if cast and leaf.kind == "jax":
        leaf = replace(leaf, dtype=str(jax.dtypes.canonicalize_dtype(leaf.dtype)))
    return Wanted(leaf)


_NOT_DIVIDED = ", which do not divide it"
_NEEDS_X64 = "(a JAX array has no 64 bits without jax_enable_x64)"


def _difference(have: Leaf | None, want: Wanted, *, cast: bool) -> str | None:
    """Describe what was wanted if the stored leaf cannot become it; None if it can."""
    leaf = want.leaf
    if have is None:
        return str(leaf)
    if leaf.kind == "jax" and not _is_of_jax(leaf.dtype):
        return f"{leaf} {_NEEDS_X64}"
    arrays = have.kind in ARRAYS, leaf.kind in ARRAYS
    if all(arrays):
        fits = have.shape == leaf.shape and (
            have.dtype == leaf.dtype or (cast and _converts(have, leaf))
        )
    elif any(arrays):
        array, scalar = (have, leaf) if arrays[0] else (leaf, have)
        fits = array.shape == () and (
            _is_of_kind(array.dtype, scalar.kind) or (cast and _converts(have, leaf))
        )
    elif have.kind == leaf.kind == "key":
        fits = have.shape == leaf.shape and have.dtype == leaf.dtype
    else:
        fits = have.kind == leaf.kind or (cast and _converts(have, leaf))
    if not fits:
        return str(leaf)
    if want.sharding is not None:
        try:
            want.sharding.shard_shape(have.shape)
        except (ValueError, IndexError):
            return f"{leaf} in shards of {want.sharding}{_NOT_DIVIDED}"
    return None


def _is_of_jax(dtype: str) -> bool:
    """Tell whether JAX has arrays of a dtype in its present settings."""
    return dtype == str(jax.dtypes.canonicalize_dtype(dtype))


def _converts(have: Leaf, want: Leaf) -> bool:
    """Tell whether one number can become the other: complex cannot become real."""
    kinds = (*PYTHON, *ARRAYS)
    if have.kind not in kinds or want.kind not in kinds:
        return False
    return not _is_complex(have) or _is_complex(want)


def _is_complex(leaf: Leaf) -> bool:
    return leaf.kind == "complex" or (
        leaf.kind in ARRAYS
        and bool(jnp.issubdtype(jnp.dtype(leaf.dtype), jnp.complexfloating))
    )


def _is_of_kind(dtype: str, kind: str) -> bool:
    families = {
        "bool": jnp.bool_,
        "int": jnp.integer,
        "float": jnp.floating,
        "complex": jnp.complexfloating,
    }
    return kind in families and jnp.issubdtype(jnp.dtype(dtype), families[kind])


def _advice(
    differences: Sequence[LeafDifference], *, would_cast: bool, has_like: bool
) -> str:
    if any(each.wanted.endswith(_NEEDS_X64) for each in differences):
        cast_how = "a `like` of 32 bits and cast=True" if has_like else "cast=True"
        return (
            "Load it in `with jax.enable_x64(True):`, or pass a `like` of numpy arrays "
            f"to get them on the host as stored, or {cast_how} to convert them to 32 "
            "bits."
        )
    if all("nothing" not in (each.stored, each.wanted) for each in differences):
        if all(each.wanted.endswith(_NOT_DIVIDED) for each in differences):
            return "Pass shardings of meshes that divide the shapes, or numpy arrays."
        if would_cast:
            return "Pass a `like` of the stored dtypes, or cast=True to convert."
        return "Pass a `like` of the stored shapes and dtypes; nothing is reshaped."
    return (
        "Pass a `like` with exactly the stored leaves, or none to get them as plain "
        "containers; flaxckpt.load_weights loads the weights alone."
    )
