"""The match of a stored layout with a wanted tree: which leaf becomes which.

It compares the leaves by path, before any value is read, and reports all differences.
"""

from collections.abc import Iterable, Sequence
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


@dataclass(frozen=True)
class Match:
    """What becomes of the leaves of a stored tree and of a wanted one.

    Attributes:
        plan: For each wanted leaf in order, the index of its stored leaf in the layout,
            and what to restore it as. The index is None for a leaf that comes from
            `like`. A leaf that is stored once and wanted in several places has its
            index in each.
        twins: The stored leaves whose values must still be compared.
        kept: The wanted values that stay as `like` has them.
        unused: The indices of stored values that nothing asks for.
    """

    plan: list[tuple[int | None, Wanted]]
    twins: list[Twin]
    kept: list[LeafDifference]
    unused: list[int]


def match(
    path: str, layout: Layout, like: PyTree, *, cast: bool, partial: bool = False
) -> Match:
    """Compare a stored tree with the wanted one.

    Args:
        path: The checkpoint, for the error.
        layout: What is stored.
        like: A tree of arrays, `jax.ShapeDtypeStruct`s, shardings or scalars; None for
            the stored tree as it is.
        cast: Whether differences between numeric dtypes are allowed.
        partial: Whether a value stays as `like` has it if none is stored for it, or one
            of another shape or kind; and whether stored values may be left unused.

    Raises:
        CheckpointMismatchError: If the two differ; it lists every such leaf. Also if
            `partial` finds nothing stored for `like`.
        UnsupportedLeafError: If `like` has no value where one is stored, or a leaf that
            cannot be restored.
    """
    if like is None:
        wanted = [as_stored(leaf, cast=cast) for leaf in layout.leaves]
        places: list[list[int]] = [[index] for index in range(len(wanted))]
    else:
        wanted = wanted_leaves(like)
        places = _places(layout, [want.leaf.path for want in wanted], like)
    matching = _Matching(layout.leaves, cast=cast, partial=partial)
    for want, indices in zip(wanted, places, strict=True):
        matching.add(want, indices)
    found, differences = matching.found, matching.differences
    if matching.refused:
        raise UnsupportedLeafError(tuple(matching.refused), "restored")
    found.unused.extend(
        index
        for index, leaf in enumerate(layout.leaves)
        if not (index in matching.used or leaf.is_from_like)
    )
    if not partial:
        for leaf in map(layout.leaves.__getitem__, found.unused):
            differences.append(LeafDifference(leaf.name, str(leaf), "nothing"))
    elif found.kept and all(index is None for index, _ in found.plan):
        differences += found.kept
    if differences:
        advice = _prefix_advice(layout, wanted) if like is not None else ""
        raise CheckpointMismatchError(
            path,
            differences,
            advice
            or _advice(
                differences,
                would_cast=matching.would_cast,
                has_like=like is not None,
                partial=partial,
            ),
        )
    return found


class _Matching:
    """A match in the making."""

    def __init__(self, stored: Sequence[Leaf], *, cast: bool, partial: bool) -> None:
        self._stored, self._cast, self._partial = stored, cast, partial
        self.found = Match([], [], [], [])
        self.used: set[int] = set()
        self.differences: list[LeafDifference] = []
        self.refused: list[tuple[str, str]] = []
        self._castable = 0  # so many of the differences would be none if cast

    @property
    def would_cast(self) -> bool:
        """Whether `cast` is not given and would be enough."""
        return not self._cast and self._castable == len(self.differences)

    def add(self, want: Wanted, indices: Sequence[int]) -> None:
        """Add a wanted leaf, for which there are these stored ones, lowest first."""
        have = self._stored[indices[0]] if indices else None
        want = want.resolved(have, cast=self._cast)
        if want.leaf.is_from_like:
            if have is not None and not (have.is_from_like or self._partial):
                problem = f"a {want.leaf}, and the checkpoint has {have}"
                self.refused.append((want.leaf.name, problem))
            self.found.plan.append((None, want))
            self.used.update([] if self._partial else indices)
        elif have is not None and have.is_from_like and want.is_struct:
            self.found.plan.append((None, want))
        elif self._is_kept(have, want):
            self.found.plan.append((None, want))
        else:
            self.used.update(indices)
            self._compare_twins(have, indices[1:])
            self.found.plan.append((indices[0] if indices else None, want))

    def _is_kept(self, have: Leaf | None, want: Wanted) -> bool:
        """Tell whether a value stays as `like` has it; note how the two differ."""
        problem = _difference(have, want, cast=self._cast)
        if problem is None:
            return False
        difference = LeafDifference(
            want.leaf.name, "nothing" if have is None else str(have), problem
        )
        is_castable = _difference(have, want, cast=True) is None
        if self._partial and not (is_castable or want.is_struct):
            self.found.kept.append(difference)
            return True
        self.differences.append(difference)
        self._castable += is_castable
        return False

    def _compare_twins(self, have: Leaf | None, others: Sequence[int]) -> None:
        for other in others:
            twin = self._stored[other]
            assert have is not None
            if (twin.kind, str(twin)) != (have.kind, str(have)):
                self.differences.append(difference_of_twins(have, twin))
            elif not (have.digest and have.digest == twin.digest):
                self.found.twins.append(Twin(len(self.found.plan), other))


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
_PARTIAL = "flaxckpt.load(path, like, partial=True)."
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


def _prefix_advice(layout: Layout, wanted: Sequence[Wanted]) -> str:
    """Say if all leaves are there, and one of the two trees is below some names."""

    def paths(leaves: Iterable[Leaf]) -> set[tuple[str, ...]]:
        return {
            leaf.path[: -1 if leaf.path[-1:] == (VALUE,) else None]
            for leaf in leaves
            if not leaf.is_from_like
        }

    stored, asked = paths(layout.leaves), paths(want.leaf for want in wanted)
    if above := _prefix_between(asked, stored):
        name = "/".join(above)
        if len(asked) < len(stored):
            return (
                f"The leaves of `like` are stored below {name!r}: pass select={name!r}."
            )
        keys = "".join(f"{{{key!r}: " for key in above) + "like" + "}" * len(above)
        return (
            f"The leaves of `like` are stored below {name!r}: pass select={name!r}, or "
            f"like={keys}."
        )
    if above := _prefix_between(stored, asked):
        name = "/".join(above)
        return (
            f"What is stored is in `like` below {name!r}: pass that part of `like`, or "
            f"rename={{'': {name!r}}}."
        )
    return ""


def _prefix_between(
    short: set[tuple[str, ...]], long: set[tuple[str, ...]]
) -> tuple[str, ...]:
    """Return the fewest names that make each short path a long one; () if none do."""
    if not short:
        return ()
    first = next(iter(short))
    prefixes = {
        path[: len(path) - len(first)]
        for path in long
        if len(path) > len(first) and path[len(path) - len(first) :] == first
    }
    for prefix in sorted(prefixes, key=lambda prefix: (len(prefix), prefix)):
        if all((*prefix, *path) in long for path in short):
            return () if any("/" in name for name in prefix) else prefix
    return ()


def _advice(
    differences: Sequence[LeafDifference],
    *,
    would_cast: bool,
    has_like: bool,
    partial: bool,
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
        return (
            "Pass a `like` of the stored shapes and dtypes; nothing is reshaped. To "
            f"keep what `like` has where they differ: {_PARTIAL}"
        )
    if partial:
        return (
            "Nothing that is stored is wanted, or `like` has no value that can stay "
            "where nothing is stored. flaxckpt.describe(path) shows what is stored; "
            "rename= says which names became which."
        )
    return (
        "Pass a `like` with exactly the stored leaves, or none to get them as plain "
        f"containers. To load what both have: {_PARTIAL}"
    )
