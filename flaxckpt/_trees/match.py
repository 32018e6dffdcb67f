"""The match of a stored layout with a wanted tree: which leaf becomes which.

It compares the leaves by path, before any value is read, and reports all differences.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp

from flaxckpt._trees.layout import Layout
from flaxckpt._trees.leaf import ARRAYS, PYTHON, Leaf
from flaxckpt._trees.skeleton import (
    VALUE,
    Skeleton,
    children_in,
    has_same,
    is_variable,
    target,
)
from flaxckpt._trees.structure import skeleton_of
from flaxckpt._trees.ties import PyTree
from flaxckpt._trees.wanted import Wanted, as_stored, is_of_jax, wanted_leaves
from flaxckpt.errors import (
    CheckpointMismatchError,
    LeafDifference,
    UnsupportedLeafError,
)


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
    plan: list[tuple[int | None, Wanted]] = []
    twins: list[Twin] = []
    differences: list[LeafDifference] = []
    refused: list[tuple[str, str]] = []
    would_cast = not cast  # and it would be enough
    if like is None:
        wanted = [as_stored(leaf, cast=cast) for leaf in layout.leaves]
        places: list[list[int]] = [[index] for index in range(len(wanted))]
    else:
        wanted = wanted_leaves(like)
        places = _places(layout, [want.leaf.path for want in wanted], like)
    for want, indices in zip(wanted, places, strict=True):
        index = indices[0] if indices else None
        have = None if index is None else layout.leaves[index]
        for stored in indices:
            unused.pop(stored, None)
        want = want.resolved(have, cast=cast)
        if want.leaf.is_from_like:
            if have is not None and not have.is_from_like:
                problem = f"a {want.leaf}, and the checkpoint has {have}"
                refused.append((want.leaf.name, problem))
            plan.append((None, want))
            continue
        if have is not None and have.is_from_like and want.is_struct:
            plan.append((None, want))
            continue
        problem = _difference(have, want, cast=cast)
        if problem is not None:
            stored_as = "nothing" if have is None else str(have)
            differences.append(LeafDifference(want.leaf.name, stored_as, problem))
            would_cast = would_cast and _difference(have, want, cast=True) is None
        for other in indices[1:]:
            twin = layout.leaves[other]
            if have is not None and (twin.kind, str(twin)) != (have.kind, str(have)):
                differences.append(difference_of_twins(have, twin))
                would_cast = False
            elif have is not None and not (have.digest and have.digest == twin.digest):
                twins.append(Twin(len(plan), other))
        plan.append((index, want))
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
    return plan, twins


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
                children = {str(key): child for key, child in children_in(have)}
                for key, child in children_in(want):
                    if str(key) in children:
                        visit(children[str(key)], child)

    visit(layout.skeleton, skeleton)
    return [sorted(places) for places in indices]


_NOT_DIVIDED = ", which do not divide it"
_NEEDS_X64 = "(a JAX array has no 64 bits without jax_enable_x64)"


def _difference(have: Leaf | None, want: Wanted, *, cast: bool) -> str | None:
    """Describe what was wanted if the stored leaf cannot become it; None if it can."""
    leaf = want.leaf
    if have is None:
        return str(leaf)
    if leaf.kind == "jax" and not is_of_jax(leaf.dtype):
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


def _converts(have: Leaf, want: Leaf) -> bool:
    """Tell whether one number can become the other: complex cannot become real."""
    kinds = (*PYTHON, *ARRAYS)
    if have.kind not in kinds or want.kind not in kinds:
        return False
    return not _is_complex(have) or _is_complex(want)


def _is_complex(leaf: Leaf) -> bool:
    return leaf.kind == "complex" or (
        leaf.kind in ARRAYS and _is_of_kind(leaf.dtype, "complex")
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
