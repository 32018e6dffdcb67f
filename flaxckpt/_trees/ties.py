"""Trees in which one thing is in two places: shared parts of Flax NNX models.

JAX flattens an NNX module as a tree. A Variable, a module or an `Rngs` in two places is
flattened twice and comes back as two objects, and a module that refers to its parent
never ends. The functions here flatten each shared part once, and rebuild a tree with
the same parts shared.

An `nnx.State` holds values: a Variable in two States is no tie. Plain JAX arrays have
no identity either: an array in two places of a plain tree is two leaves.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax

from flaxckpt.errors import UnsupportedLeafError

PyTree: TypeAlias = Any
Place: TypeAlias = tuple[int, ...]
"""Where a node is: the position of a child in the root, of one in that, and so on."""
_SHOWN = 8  # keys that an error lists
VARIABLE, MODULE, STATE = "variable", "module", "state"


@dataclass(frozen=True, eq=False)
class Flat:
    """A tree, flattened with each shared part once.

    Attributes:
        leaves: The leaves, in the order in which JAX flattens the tree.
        key: Equal for trees of the same structure and the same ties. It hashes where
            the tree's static data does.
        is_free: Whether nothing of NNX is in it, so that JAX's own flattening does.
    """

    leaves: list[Any]
    key: Hashable
    is_free: bool
    _tree: PyTree
    _treedef: Any
    _is_plain: bool

    def rebuilt(self, leaves: Sequence[Any]) -> PyTree:
        """Return a tree like the flattened one with other leaves, and the same ties."""
        if self._is_plain:
            return jax.tree_util.tree_unflatten(self._treedef, leaves)
        return _rebuilt(self._tree, iter(leaves))


def flatten(tree: PyTree, free: Collection[Hashable] = ()) -> Flat:
    """Flatten a tree as `jax.tree.flatten` does, but each shared part of it once.

    Costs nothing more than JAX's own where Flax NNX is not loaded, and a call of a
    small Python function for each node where it is.

    Args:
        tree: The tree.
        free: Keys of trees that had nothing of NNX in them. A tree of such a key costs
            no more than JAX's own flattening.

    Raises:
        UnsupportedLeafError: If JAX cannot sort the keys of a dict.
    """
    try:
        return _flattened(tree, free)
    except ValueError as error:
        unsorted = _unsorted(tree, set())
        if unsorted is None:
            raise
        raise UnsupportedLeafError((unsorted,)) from error


def _flattened(tree: PyTree, free: Collection[Hashable]) -> Flat:
    if "flax.nnx" not in sys.modules:
        leaves, treedef = jax.tree_util.tree_flatten(tree)
        return Flat(leaves, treedef, True, tree, treedef, _is_plain=True)
    if free and not role_of(tree):
        # A module may refer to its parent.
        with contextlib.suppress(RecursionError):
            leaves, treedef = jax.tree_util.tree_flatten(tree)
            if treedef in free:
                return Flat(leaves, treedef, True, tree, treedef, _is_plain=True)
    watch = _Watch()
    nodes, treedef = jax.tree_util.tree_flatten(tree, is_leaf=watch.stops_at)
    if not watch.stops:
        return Flat(nodes, treedef, watch.is_free, tree, treedef, _is_plain=True)
    leaves: list[Any] = []
    ends: list[Any] = []  # what JAX's treedef does not tell of a node at which it ends
    for position, node in enumerate(nodes):
        match role_of(node):
            case "":
                leaves.append(node)
            case "state":
                values, inside = jax.tree_util.tree_flatten(node)
                leaves += values
                ends.append((position, inside))
            case _:
                ends.append((position, watch.numbers[id(node)]))
    return Flat(leaves, (treedef, tuple(ends)), False, tree, treedef, _is_plain=False)


def leaves_of(tree: PyTree) -> list[Any]:
    """Return the leaves of a tree, those of a shared part once."""
    return flatten(tree).leaves


def nodes_with_paths(
    tree: PyTree, whole: tuple[type, ...]
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Return what a tree consists of, each shared part once.

    Args:
        tree: The tree.
        whole: Types of nodes that are not looked into.

    Yields:
        JAX's path of each leaf, or of each node of one of these types; and that.
    """
    watch = _Watch()

    def stops_at(node: PyTree) -> bool:
        return watch.stops_at(node) or isinstance(node, whole)

    if "flax.nnx" not in sys.modules:
        stops_at = lambda node: isinstance(node, whole)  # noqa: E731
    nodes, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=stops_at)
    seen: set[int] = set()
    for path, node in nodes:
        match role_of(node):
            case "state":
                inside, _ = jax.tree_util.tree_flatten_with_path(
                    node, is_leaf=lambda node: isinstance(node, whole)
                )
                yield from (((*path, *below), each) for below, each in inside)
            case "":
                yield path, node
            case _ if id(node) not in seen and isinstance(node, whole):
                seen.add(id(node))
                yield path, node
            case _:
                pass


def has_ties(tree: PyTree) -> bool:
    """Tell whether a part of a tree is in two places, or in itself.

    Raises:
        UnsupportedLeafError: As `flatten`.
    """
    flatten(tree)
    if "flax.nnx" not in sys.modules:
        return False
    watch = _Watch()
    nodes, _ = jax.tree_util.tree_flatten(tree, is_leaf=watch.stops_at)
    return any(role_of(node) in (VARIABLE, MODULE) for node in nodes)


def children_of(node: PyTree) -> tuple[list[tuple[Any, Any]], Any]:
    """Return the children of a node with JAX's keys, and how they are put together.

    Returns:
        Pairs of a path of one entry and a child, and the node's own treedef; for a
        leaf, its path is empty.
    """
    is_below = iter((False,))  # the first node that JAX asks about is `node` itself
    return jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda _: next(is_below, True)
    )


def _unsorted(node: PyTree, above: set[int], name: str = "") -> tuple[str, str] | None:
    """Find a dict whose keys JAX cannot sort: return where it is, and what is wrong."""
    if id(node) in above:  # a module may refer to its parent
        return None
    try:
        children, treedef = children_of(node)
    except ValueError:
        if not isinstance(node, dict):
            return None
        keys = ", ".join(map(repr, list(node)[:_SHOWN]))
        problem = f"a dict with keys that cannot be sorted ({keys}); name all by text"
        return name or "the tree itself", problem
    if jax.tree_util.treedef_is_leaf(treedef):
        return None
    for path, child in children:
        key = jax.tree_util.keystr(path, simple=True, separator="/")
        below = f"{name}/{key}" if name else key
        if found := _unsorted(child, above | {id(node)}, below):
            return found
    return None


def role_of(node: PyTree) -> str:
    """Tell whether a node is an NNX `variable`, `module` or `state`; "" for neither.

    A `module` is any NNX object: an `Rngs`, an optimizer or an `nnx.List`, too.
    """
    return _role(type(node)) if "flax.nnx" in sys.modules else ""


@functools.lru_cache(maxsize=4096)
def _role(kind: type) -> str:
    nnx: Any = sys.modules["flax.nnx"]
    if issubclass(kind, nnx.Variable):
        return VARIABLE
    if issubclass(kind, nnx.Pytree) and getattr(kind, "_pytree__is_pytree", True):
        return MODULE
    return STATE if issubclass(kind, nnx.State) else ""


class Seen:
    """The shared things that a walk has come to, and where they were."""

    def __init__(self) -> None:
        """None so far."""
        self._places: dict[int, tuple[Place, Any]] = {}

    def place_of(self, node: PyTree, place: Place) -> Place | None:
        """Return where a variable or module was seen before; else note it, and None."""
        found = self._places.setdefault(id(node), (place, node))[0]
        return None if found == place else found


class _Watch:
    """What JAX asks about each node while it flattens: whether to look into it."""

    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}
        self.stops = 0
        self.is_free = True
        self._nodes: list[Any] = []  # alive, so that their ids stay theirs
        self.stops_at = self._made()

    def _made(self) -> Callable[[PyTree], bool]:
        numbers, nodes, plain = self.numbers, self._nodes, set[type]()

        def stops_at(node: PyTree) -> bool:
            if type(node) in plain:  # as nearly all nodes are
                return False
            role = _role(type(node))
            if not role:
                plain.add(type(node))
                return False
            self.is_free = False
            if role != STATE and numbers.setdefault(id(node), len(nodes)) == len(nodes):
                nodes.append(node)
                return False
            self.stops += 1
            return True

        return stops_at


def _rebuilt(tree: PyTree, leaves: Iterator[Any]) -> PyTree:
    built: dict[int, Any] = {}

    def build(node: PyTree) -> PyTree:
        role = role_of(node)
        if role == STATE:
            values, inside = jax.tree_util.tree_flatten(node)
            own = [next(leaves) for _ in values]
            return jax.tree_util.tree_unflatten(inside, own)
        if role and id(node) in built:
            return built[id(node)]
        children, treedef = children_of(node)
        if jax.tree_util.treedef_is_leaf(treedef) and children:
            return next(leaves)
        if role != MODULE:
            made = _made_of(treedef, (build(child) for _, child in children))
            if role:
                built[id(node)] = made
            return made
        # It is there before its children are, for one of them may refer to it.
        made = built[id(node)] = object.__new__(type(node))
        filled = _made_of(treedef, (build(child) for _, child in children))
        for name, value in vars(filled).items():
            object.__setattr__(made, name, value)
        return made

    return build(tree)


def _made_of(treedef: Any, children: Iterable[Any]) -> PyTree:
    return jax.tree_util.tree_unflatten(treedef, list(children))
