"""Trees as they are stored: plain containers, and a table that describes each leaf.

A user's tree of any node types becomes nested dicts and lists of arrays and scalars,
which Orbax stores under readable names, and a `Layout`, which knows what Orbax does
not: tuples from lists, numbers as dict keys, empty arrays, kinds of leaves. Restoring
compares the stored leaves with the wanted ones by path, before anything is read.
"""

import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from flaxckpt._names import is_in_pointer, is_plain, is_recordable, spelled
from flaxckpt._parsing import FROM_LIKE, is_possible
from flaxckpt._placing import is_placement, placed
from flaxckpt._ties import (
    MODULE,
    STATE,
    VARIABLE,
    Flat,
    Place,
    Seen,
    children_of,
    flatten,
    role_of,
)
from flaxckpt._values import is_function, is_value
from flaxckpt.errors import (
    CheckpointMismatchError,
    LeafDifference,
    UnsupportedLeafError,
)

PyTree: TypeAlias = Any
Skeleton: TypeAlias = Any
"""Structure as JSON: a leaf's index, null, or an object with one key, which is one of

- {"dict": [[key, child], ...]}, {"list": [child, ...]} and {"tuple": [child, ...]};
- {"module": [[key, child], ...]}, an object or State of Flax NNX;
- {"variable": child}, an NNX Variable. Paths have the name `value` for this level;
- {"same": [position, ...]}, another place of a module or variable that comes earlier,
  or that this place is in: the positions of a child of the root, of one in that, and so
  on. Such a place has no leaves of its own."""

_ARRAYS = ("jax", "numpy", "numpy_scalar")
_PLACED = "placed"  # of what is wanted as it is stored, at a place
_SCALARS: dict[Any, str] = {
    bool: "bool",
    int: "int",
    float: "float",
    complex: "complex",
}
_PYTHON: dict[str, Any] = {name: kind for kind, name in _SCALARS.items()}


@dataclass(frozen=True)
class Leaf:
    """What is stored at one place of a tree.

    Attributes:
        path: Names from the root to the leaf.
        kind: `jax`, `key` (a typed PRNG key array), `numpy`, `numpy_scalar`, `bool`,
            `int`, `float`, `complex`, `str`, `bytes`. Not stored are `function`, and
            `static`: in an Equinox module, what is no array, number or text.
        dtype: Name of the dtype, for arrays and keys.
        shape: Shape, for arrays and keys.
        impl: Name of the PRNG implementation, for keys.
        digest: Fingerprint of the value that was saved; see `_digest`.
        sums: Checksums of its files, in order; none where they are not known.
        stored: The keys under which the store has it, where they differ from `path`:
            as many, or a single one, which stands at the root; see `_names`.
    """

    path: tuple[str, ...]
    kind: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    impl: str = ""
    digest: str = ""
    sums: tuple[str, ...] = ()
    stored: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The path as text."""
        return "/".join(self.path) or "(the tree itself)"

    @property
    def stored_path(self) -> tuple[str, ...]:
        """The keys under which the store has it."""
        return self.stored or self.path

    @property
    def stored_name(self) -> str:
        """The name under which the store has it."""
        return ".".join(self.stored_path)

    @property
    def is_apart(self) -> bool:
        """Whether the store has it at the root, and not at its place in the tree."""
        return bool(self.stored) and len(self.stored) != len(self.path)

    @property
    def is_text(self) -> bool:
        """Whether it is stored as text; text that is none in UTF-8 is an array."""
        return self.kind == "str" and not self.dtype

    @property
    def in_orbax(self) -> bool:
        """Whether Orbax holds it: it takes no arrays without elements."""
        return not self.is_from_like and 0 not in self.shape

    @property
    def is_from_like(self) -> bool:
        """Whether it is no value, and comes from the tree that a load is given."""
        return self.kind in FROM_LIKE

    @functools.cached_property
    def nbytes(self) -> int:
        """Size of its values in memory."""
        if self.kind == "key":
            return math.prod(self.shape) * 16
        return math.prod(self.shape) * jnp.dtype(self.dtype or "complex128").itemsize

    def __str__(self) -> str:
        if self.kind not in (*_ARRAYS, "key"):
            return self.kind
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


_LEAF_FIELDS = frozenset(each.name for each in fields(Leaf))


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
        return _Filling(self.skeleton, values, limit).plain(self.skeleton, ())

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
                    if key in _LEAF_FIELDS - {"digest", "sums"}
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


def describe(
    tree: PyTree,
    storable: Callable[[str], bool],
    *,
    is_traced: bool = False,
    flat: Flat | None = None,
) -> tuple[Layout, list[Any]]:
    """Describe a tree and bring its leaves into forms that Orbax stores.

    Touches no device. Arrays in host memory are copied, since their owner may change
    them; JAX arrays are passed on as they are.

    Args:
        tree: Any pytree.
        storable: Tells whether a dtype of this name can be stored.
        is_traced: Whether leaves may be values of a running trace.
        flat: The tree, flattened, if that is there already.

    Returns:
        The layout, and the leaves in its order.

    Raises:
        UnsupportedLeafError: Naming every leaf that cannot be stored.
    """
    flat = flatten(tree) if flat is None else flat
    structure = _structure(flat, tree)
    leaves: list[Leaf] = []
    stored: list[Any] = []
    refused: list[tuple[str, str]] = []
    for value, path, in_equinox in zip(
        flat.leaves,
        structure.paths,
        structure.in_equinox,
        strict=True,
    ):
        if type(value) in _ARRAY_TYPES:  # the short way for what there may be many of
            leaf = _ARRAY_LEAVES.get((path, value.dtype, value.shape))
            if leaf is not None and not value.is_deleted():
                leaves.append(leaf)
                stored.append(value)
                continue
        kind = _from_like(value, in_equinox=in_equinox)
        if kind:
            leaves.append(Leaf(path, kind))
            stored.append(None)
            continue
        try:
            leaf, value = _normal(path, value, storable, is_traced=is_traced)
        except _RefusedError as refusal:
            refused.append((Leaf(path, "").name, str(refusal)))
            continue
        leaves.append(leaf)
        stored.append(value)
    refused += structure.refused
    if refused:
        raise UnsupportedLeafError(tuple(refused))
    names = structure.spelled
    if any(leaf.is_text and is_in_pointer(leaf.path) for leaf in leaves):
        names = spelled(structure.paths, slashes=False)
    for index, keys in names.items():
        leaves[index] = _stored_as(leaves[index], keys)
    return Layout(structure.skeleton, tuple(leaves)), stored


def skeleton_of(tree: PyTree) -> Skeleton:
    """Return the structure of a tree, with the indices of its leaves."""
    return _structure(flatten(tree), tree).skeleton


@dataclass(frozen=True)
class Wanted:
    """What a leaf is to be restored as.

    Attributes:
        leaf: The wanted kind, dtype and shape.
        sharding: Where to place it; None for JAX's default device, uncommitted.
        is_weak: Whether the dtype is but JAX's guess for a Python number.
        type: Of a Python number or text, its own type, such as an `enum.IntEnum`.
        is_struct: Whether `like` describes the leaf, and has no value of it.
    """

    leaf: Leaf
    sharding: jax.sharding.Sharding | None = None
    is_weak: bool = False
    type: Callable[[Any], Any] | None = None
    is_struct: bool = False

    def resolved(self, have: Leaf | None) -> "Wanted":
        """Return what a leaf is wanted as that `like` gives only a place for."""
        if self.leaf.kind != _PLACED or have is None:
            return self
        if have.kind == "jax" or (have.kind in _ARRAYS and _is_of_jax(have.dtype)):
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
    """A stored leaf that has to equal another one, for `like` has one for both.

    Attributes:
        position: Which of the wanted leaves it is.
        index: The index in the layout of the other stored leaf.
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
        like: A tree of arrays, `jax.ShapeDtypeStruct`s, shardings or scalars; None, for
            the stored tree as it is.
        cast: Whether differences between numeric dtypes are allowed.

    Returns:
        For each leaf that is wanted, in order, its index in `layout` (None for one
        that is no value, to be taken from `like`) and what it is wanted as. A leaf that
        is stored once and wanted in several places has its index at each. And the
        stored leaves whose values still have to be compared.

    Raises:
        CheckpointMismatchError: Listing every leaf in which the two differ.
        UnsupportedLeafError: If `like` has no value where one is stored.
    """
    unused = dict.fromkeys(range(len(layout.leaves)))
    found: list[tuple[int | None, Wanted]] = []
    twins: list[Twin] = []
    differences: list[LeafDifference] = []
    refused: list[tuple[str, str]] = []
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
        for each in indices[1:]:
            twin = layout.leaves[each]
            if have is not None and (twin.kind, str(twin)) != (have.kind, str(have)):
                differences.append(difference_of_twins(have, twin))
            elif have is not None and not (have.digest and have.digest == twin.digest):
                twins.append(Twin(len(found), each))
        found.append((index, want))
    if refused:
        raise UnsupportedLeafError(tuple(refused), "restored")
    for index in unused:
        leaf = layout.leaves[index]
        if not leaf.is_from_like:
            differences.append(LeafDifference(leaf.name, str(leaf), "nothing"))
    if differences:
        raise CheckpointMismatchError(
            path,
            differences,
            _advice(differences, cast=cast, has_like=like is not None),
        )
    return found, twins


def difference_of_twins(have: Leaf, twin: Leaf) -> LeafDifference:
    """Describe two stored leaves that differ where `like` has one for both."""
    return LeafDifference(
        have.name, f"{have}, and other values as {twin.name}", "one shared by both"
    )


def _places(
    layout: Layout, wanted: Sequence[tuple[str, ...]], like: PyTree
) -> list[list[int]]:
    """Find where each wanted leaf is stored: the indices in the layout, lowest first.

    Usually that is one. Where `like` has something in several places that was stored
    several times, it is one for each; it is none where nothing is stored.
    """
    skeleton = skeleton_of(like)
    if not (_has_same(layout.skeleton) or _has_same(skeleton)):
        stored = {leaf.path: index for index, leaf in enumerate(layout.leaves)}
        if stored.keys() >= set(wanted):
            return [[stored[path]] for path in wanted]
    indices: list[set[int]] = [set() for _ in wanted]
    seen: set[tuple[int, int]] = set()

    def visit(have: Skeleton, want: Skeleton) -> None:
        """Walk both trees along all paths that both have."""
        have, want = _target(layout.skeleton, have), _target(skeleton, want)
        # A pure dict has a Variable's value in the Variable's place.
        if _is_variable(have) and _VALUE not in dict(children_in(want)):
            have = have["variable"]
        if _is_variable(want) and _VALUE not in dict(children_in(have)):
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
    """Return `like` with a placement of a whole subtree given to each leaf of it."""
    flat = flatten(like)
    if not any(map(is_placement, flat.leaves)):
        return like

    def spread_one(leaf: Any, path: tuple[str, ...]) -> Any:
        found = _node_at(layout.skeleton, path) if is_placement(leaf) else None
        if found is None or isinstance(found[0], int):
            return leaf
        return _Filling(layout.skeleton, [leaf] * len(layout.leaves)).plain(*found)

    paths = _structure(flat, like).paths
    return flat.rebuilt(list(map(spread_one, flat.leaves, paths)))


def _node_at(skeleton: Skeleton, path: Sequence[str]) -> tuple[Skeleton, Place] | None:
    """Return the structure below a path, and where it is; None where there is none."""
    node, place = skeleton, ()
    for name in path:
        names = [str(key) for key, _ in children_in(node)]
        if name not in names:
            return None
        place = (*place, names.index(name))
        node = children_in(node)[place[-1]][1]
        if isinstance(node, dict) and "same" in node:
            place = tuple(node["same"])
            node = node_at(skeleton, place)
    return node, place


def wanted_leaves(like: PyTree) -> list[Wanted]:
    """Describe what a tree of arrays, `ShapeDtypeStruct`s or shardings asks for."""
    flat = flatten(like)
    structure = _structure(flat, like)
    wanted: list[Wanted] = []
    refused: list[tuple[str, str]] = []
    for value, path, in_equinox in zip(
        flat.leaves,
        structure.paths,
        structure.in_equinox,
        strict=True,
    ):
        is_struct = isinstance(value, jax.ShapeDtypeStruct) or is_placement(value)
        kind = "" if is_struct else _from_like(value, in_equinox=in_equinox)
        if kind:
            wanted.append(Wanted(Leaf(path, kind)))
            continue
        try:
            wanted.append(_wanted(path, value))
        except _RefusedError as refusal:
            refused.append((Leaf(path, "").name, str(refusal)))
    if refused:
        raise UnsupportedLeafError(tuple(refused), "restored")
    return wanted


def convert(value: Any, have: Leaf, want: Wanted, *, cast: bool) -> Any:
    """Bring a loaded value into the wanted form; their kinds are known to fit.

    Raises:
        ValueError: If a Python number does not fit the wanted dtype exactly, and
            `cast` does not allow that.
    """
    kind = want.leaf.kind
    own: Callable[[Any], Any] = want.type or _as_it_is
    if 0 in have.shape:
        value = _empty(have)
    if have.kind == "bytes":
        return np.asarray(value).tobytes()
    if have.kind == "str" and not have.is_text:
        return own(np.asarray(value).tobytes().decode(errors="surrogatepass"))
    if kind == "key":
        if want.sharding is None:
            return _uncommitted_key(value)
        is_elsewhere = value.sharding.memory_kind != want.sharding.memory_kind
        return jax.device_put(value, want.sharding) if is_elsewhere else value
    if kind not in _ARRAYS:
        if have.kind not in _ARRAYS and have.kind != "complex" and have.kind == kind:
            return own(value)
        number = np.asarray(value).item()
        return own(_PYTHON[kind](number) if cast else number)
    dtype = jnp.dtype(want.leaf.dtype)
    if have.kind not in _ARRAYS:
        exact = np.asarray(value)
        if jnp.issubdtype(dtype, jnp.integer) and not np.isfinite(exact):
            raise ValueError(f"{exact.item()!r} does not fit {dtype}")
        value = exact.astype(dtype)
        same = value == exact or (value != value and exact != exact)
        if not (cast or want.is_weak or same):
            raise ValueError(f"{exact.item()!r} does not fit {dtype} exactly")
    elif value.dtype != dtype:
        value = value.astype(dtype)
    if kind == "numpy":
        return np.asarray(value)
    if kind == "numpy_scalar":
        return np.asarray(value)[()]
    if want.sharding is not None:
        return jax.device_put(value, want.sharding)
    return value if isinstance(value, jax.Array) else jnp.asarray(value)


# ---- structure -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Structure:
    skeleton: Skeleton
    paths: tuple[tuple[str, ...], ...]
    in_equinox: tuple[bool, ...]
    spelled: Mapping[int, tuple[str, ...]]
    refused: Sequence[tuple[str, str]]


def _structure(flat: Flat, tree: PyTree) -> _Structure:
    try:
        known = _KNOWN.get(flat.key)
    except TypeError:  # static data that does not hash
        return _walk(tree)
    if known is None:
        if len(_KNOWN) >= 64:
            _KNOWN.clear()
        known = _KNOWN[flat.key] = _walk(tree)
    return known


_KNOWN: dict[Any, _Structure] = {}


def _walk(tree: PyTree) -> _Structure:
    paths: list[tuple[str, ...]] = []
    within: list[bool] = []
    refused: list[tuple[str, str]] = []
    equinox = sys.modules.get("equinox")
    seen = Seen()

    def visit(
        node: PyTree,
        path: tuple[str, ...],
        place: Place,
        in_equinox: bool,
        in_state: bool,
    ) -> Skeleton:
        if node is None:
            return None
        role = role_of(node)
        if role in (VARIABLE, MODULE) and not in_state:
            before = seen.place_of(node, place)
            if before is not None:
                return {"same": list(before)}
        children, _ = children_of(node)
        if len(children) == 1 and not children[0][0]:
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
        if role == VARIABLE and keys == [_VALUE]:
            return {"variable": below[0]}
        if type(node) in (list, tuple):
            return {type(node).__name__: below}
        kind = "module" if role in (MODULE, STATE) else "dict"
        return {kind: [list(pair) for pair in zip(keys, below, strict=True)]}

    skeleton = visit(tree, (), (), in_equinox=False, in_state=False)
    names = {} if refused else spelled(paths)
    return _Structure(skeleton, tuple(paths), tuple(within), names, refused)


def key_of(entry: Any) -> str | int:
    """Return the name of one entry of a key path; a number only if it was one.

    Raises:
        UnsupportedLeafError: If it is a number of more digits than Python converts.
    """
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            entry = getattr(entry, attribute)
            break
    try:
        name = str(entry)
    except ValueError:
        problem = "a key that cannot be a name, a number of too many digits; rename it"
        raise UnsupportedLeafError((("(a key)", problem),)) from None
    return entry if type(entry) is int else name


def children_in(node: Skeleton) -> list[tuple[str | int, Skeleton]]:
    """Return the children of a skeleton's node with their names; none of a leaf."""
    match node:
        case {"dict": pairs} | {"module": pairs}:
            return [(key, child) for key, child in pairs]
        case {"list": children} | {"tuple": children}:
            return list(enumerate(children))
        case {"variable": child}:
            return [(_VALUE, child)]
        case None | int() | {"same": _}:
            return []
        case _:
            raise ValueError(f"no structure: {node!r}")


def with_children(node: Skeleton, children: Sequence[Skeleton]) -> Skeleton:
    """Return a skeleton's node with other children, one for each that it has."""
    match node:
        case {"dict": pairs} | {"module": pairs}:
            (kind,) = node
            keys = [key for key, _ in pairs]
            return {kind: [list(pair) for pair in zip(keys, children, strict=True)]}
        case {"list": _} | {"tuple": _}:
            (kind,) = node
            return {kind: list(children)}
        case {"variable": _}:
            return {"variable": children[0]}
        case _:
            return node


def node_at(skeleton: Skeleton, place: Iterable[int]) -> Skeleton:
    """Return the node of a skeleton at a place, as `same` gives it."""
    for position in place:
        skeleton = children_in(skeleton)[position][1]
    return skeleton


def _target(skeleton: Skeleton, node: Skeleton) -> Skeleton:
    """Return a node of a skeleton, or the one that it is another place of."""
    is_same = isinstance(node, dict) and "same" in node
    return node_at(skeleton, node["same"]) if is_same else node


def _is_variable(node: Skeleton) -> bool:
    return isinstance(node, dict) and "variable" in node


def _has_same(skeleton: Skeleton) -> bool:
    """Tell whether anything in a skeleton is in several places."""
    if not isinstance(skeleton, dict):
        return False
    return "same" in skeleton or any(_has_same(e) for _, e in children_in(skeleton))


_VALUE = "value"
_ABSENT: Any = object()
# What a tree without `like` may be larger than what is stored.
_COPIES = 16
_COPIED_BYTES = 2**28
_COPIED_NODES = 2**20


class OverfullError(ValueError):
    """A stored tree has more in it than it can have in a checkpoint of its size."""


class _Filling:
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


def indices_in(skeleton: Skeleton) -> Iterator[int]:
    """Yield the indices of a structure's leaves."""
    if isinstance(skeleton, int):
        yield skeleton
    for _, child in children_in(skeleton):
        yield from indices_in(child)


def _look_up(tree: PyTree, path: Iterable[str]) -> Any:
    for name in path:
        tree = tree[int(name)] if isinstance(tree, list | tuple) else tree[name]
    return tree


def _refused_keys(
    path: tuple[str, ...], keys: Sequence[str | int]
) -> Iterator[tuple[str, str]]:
    """Find what of one node's keys cannot name a leaf."""
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


# ---- leaves --------------------------------------------------------------------------


class _RefusedError(Exception):
    """A leaf cannot be stored, for the reason given."""


def _from_like(value: Any, *, in_equinox: bool) -> str:
    """Return the kind of a leaf that is no value; empty for a value."""
    if in_equinox and not is_value(value):
        return "static"
    return "function" if is_function(value) else ""


def _as_it_is(value: Any) -> Any:
    return value


def _normal(
    path: tuple[str, ...],
    value: Any,
    storable: Callable[[str], bool],
    *,
    is_traced: bool = False,
) -> tuple[Leaf, Any]:
    if isinstance(value, Tracer) and not is_traced:
        raise _RefusedError("a value of a running trace, not known yet")
    if isinstance(value, jax.Array):
        if not isinstance(value, Tracer) and value.is_deleted():
            raise _RefusedError("an array that was deleted (donated to a jitted call)")
        leaf = _array_leaf(path, value)
    elif isinstance(value, np.ma.MaskedArray):
        raise _RefusedError("a masked array; save its data and mask as two arrays")
    elif isinstance(value, np.ndarray) and type(value) not in _NUMPY_ARRAYS:
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        raise _RefusedError(f"a {name}; save numpy.asarray of it")
    elif isinstance(value, np.ndarray | np.generic):
        kind = "numpy_scalar" if isinstance(value, np.generic) else "numpy"
        value = np.array(value, dtype=value.dtype.newbyteorder("="))
        leaf = Leaf(path, kind, str(value.dtype), value.shape)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise _RefusedError("an integer of more than 64 bits")
    elif isinstance(value, bytes):
        return Leaf(path, "bytes", "uint8", (len(value),)), np.frombuffer(
            value, np.uint8
        )
    elif isinstance(value, str):
        return _text(path, str(value))
    else:
        for kind, name in _SCALARS.items():
            if isinstance(value, kind):
                stored = kind(value)
                return Leaf(path, name), (
                    np.asarray(stored) if name == "complex" else stored
                )
        raise _RefusedError(f"an object of type {type(value).__qualname__}")
    if not is_possible(leaf.shape):
        raise _RefusedError(f"an array of shape {leaf.shape}, which is too large")
    if leaf.kind != "key" and not storable(leaf.dtype):
        raise _RefusedError(f"an array of dtype {leaf.dtype}")
    if leaf.kind == "jax" and not isinstance(value, Tracer):
        if len(_ARRAY_LEAVES) >= 2**16:
            _ARRAY_LEAVES.clear()
        leaf = _ARRAY_LEAVES.setdefault((path, value.dtype, value.shape), leaf)
        _ARRAY_TYPES.add(type(value))
    return leaf, value


@functools.lru_cache(maxsize=2**16)
def _stored_as(leaf: Leaf, keys: tuple[str, ...]) -> Leaf:
    return replace(leaf, stored=keys)


def _text(path: tuple[str, ...], value: str) -> tuple[Leaf, Any]:
    """Store text as text; as an array of bytes, where UTF-8 does not know it."""
    try:
        value.encode()
    except UnicodeEncodeError:
        found = np.frombuffer(value.encode(errors="surrogatepass"), np.uint8)
        return Leaf(path, "str", "uint8", found.shape), found
    return Leaf(path, "str"), value


def _array_leaf(path: tuple[str, ...], value: Any) -> Leaf:
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        impl = "" if isinstance(value, jax.ShapeDtypeStruct) else _impl(value)
        return Leaf(path, "key", str(value.dtype), tuple(value.shape), impl)
    return Leaf(path, "jax", str(value.dtype), tuple(value.shape))


_NUMPY_ARRAYS = (np.ndarray, np.memmap)  # other kinds know more than their elements
# Leaves of arrays that were found fit to be stored, and the arrays' types.
_ARRAY_LEAVES: dict[tuple[Any, ...], Leaf] = {}
_ARRAY_TYPES: set[type] = set()


def _impl(key: jax.Array) -> str:
    return str(jax.random.key_impl(key))


def _wanted(path: tuple[str, ...], value: Any) -> Wanted:
    try:
        if is_placement(value):
            return Wanted(Leaf(path, _PLACED), placed(value), is_struct=True)
        if isinstance(value, jax.ShapeDtypeStruct):
            return Wanted(
                _array_leaf(path, value),
                placed(value.sharding),
                is_weak=value.weak_type,
                is_struct=True,
            )
    except ValueError as error:
        raise _RefusedError(str(error)) from error
    if isinstance(value, Tracer):
        raise _RefusedError("a value of a running trace")
    if isinstance(value, jax.Array):
        return Wanted(
            _array_leaf(path, value),
            value.sharding if value.committed else None,
            is_weak=getattr(value, "weak_type", False),  # keys have none
        )
    leaf, _ = _normal(path, value, lambda dtype: True)
    is_own = leaf.kind in (*_PYTHON, "str") and type(value) not in (*_SCALARS, str)
    return Wanted(leaf, type=type(value) if is_own else None)


def _as_stored(leaf: Leaf, *, cast: bool) -> Wanted:
    """Describe a leaf as wanted without `like`; cast to what JAX has, if it may be."""
    if cast and leaf.kind == "jax":
        leaf = replace(leaf, dtype=str(jax.dtypes.canonicalize_dtype(leaf.dtype)))
    return Wanted(leaf)


_NEEDS_X64 = "(a JAX array has no 64 bits without jax_enable_x64)"


def _difference(have: Leaf | None, want: Wanted, *, cast: bool) -> str | None:
    """Say what was wanted, if the stored leaf cannot give it."""
    leaf = want.leaf
    if have is None:
        return str(leaf)
    if leaf.kind == "jax" and not _is_of_jax(leaf.dtype):
        return f"{leaf} {_NEEDS_X64}"
    arrays = have.kind in _ARRAYS, leaf.kind in _ARRAYS
    if all(arrays):
        fits = have.shape == leaf.shape and (have.dtype == leaf.dtype or cast)
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
            return f"{leaf} in shards of {want.sharding}, which do not divide it"
    return None


def _is_of_jax(dtype: str) -> bool:
    """Tell whether JAX has arrays of a dtype, as it is set to now."""
    return dtype == str(jax.dtypes.canonicalize_dtype(dtype))


def _converts(have: Leaf, want: Leaf) -> bool:
    """Tell whether one number can become the other: all can, but complex to real."""
    kinds = (*_PYTHON, *_ARRAYS)
    if have.kind not in kinds or want.kind not in kinds:
        return False
    return not _is_complex(have) or _is_complex(want)


def _is_complex(leaf: Leaf) -> bool:
    return leaf.kind == "complex" or (
        leaf.kind in _ARRAYS
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
    differences: Sequence[LeafDifference], *, cast: bool, has_like: bool
) -> str:
    if any(each.wanted.endswith(_NEEDS_X64) for each in differences):
        cast_how = "a `like` of 32 bits and cast=True" if has_like else "cast=True"
        return (
            "Load it in `with jax.enable_x64(True):`, or pass a `like` of numpy arrays "
            f"to get them on the host as stored, or {cast_how} to convert them to 32 "
            "bits."
        )
    if all("nothing" not in (each.stored, each.wanted) for each in differences):
        pairs = [(each.stored, each.wanted) for each in differences]
        if not cast and all(
            have.partition("[")[2] == want.partition("[")[2] != ""
            and "key" not in have + want
            for have, want in pairs
        ):
            return "Pass a `like` of the stored dtypes, or cast=True to convert."
        return "Pass a `like` of the stored shapes and dtypes; nothing is reshaped."
    return (
        "Pass a `like` with exactly the stored leaves, or none to get them as plain "
        "containers; flaxckpt.load_weights loads the weights alone."
    )


def _empty(leaf: Leaf) -> Any:
    if leaf.kind == "key":
        return jax.random.split(jax.random.key(0, impl=leaf.impl), leaf.shape)
    return np.zeros(leaf.shape, jnp.dtype(leaf.dtype))


def without_keys(leaf: Any) -> Any:
    """Return a leaf, of typed PRNG keys the data."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    return leaf


@functools.lru_cache(maxsize=16)
def key_numbers(impl: str) -> tuple[int, ...]:
    """Return the shape of the numbers that one PRNG key of an implementation has."""
    key = functools.partial(jax.random.key, 0, impl=impl)
    return jax.eval_shape(lambda: jax.random.key_data(key())).shape


@functools.lru_cache(maxsize=16)
def key_dtype(impl: str) -> Any:
    """Return the dtype of typed PRNG keys of an implementation."""
    return jax.eval_shape(lambda: jax.random.key(0, impl=impl)).dtype


def _uncommitted_key(key: jax.Array) -> jax.Array:
    data = np.asarray(jax.random.key_data(key))
    return jax.random.wrap_key_data(jnp.asarray(data), impl=_impl(key))
