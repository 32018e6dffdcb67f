"""Trees in which one object is in two places: shared parts of Flax NNX models.

JAX flattens an NNX module as a tree. A Variable, a module or an `Rngs` in two places is
flattened twice and comes back as two objects, and a module that refers to its parent
never ends. The functions here flatten each shared part once, and rebuild a tree with
the same parts shared.

An `nnx.State` holds values, so a Variable in two States is not shared. Plain JAX arrays
have no identity either: an array in two places of a plain tree is two leaves.
"""

import functools
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax

from flaxckpt._runtime.failures import listed
from flaxckpt.errors import UnsupportedLeafError

PyTree: TypeAlias = Any
Position: TypeAlias = tuple[int, ...]
"""Where a node is: the position of a child of the root, of its child, and so on."""
VARIABLE, MODULE, STATE = "variable", "module", "state"


@dataclass(frozen=True, eq=False)
class Flat:
    """A tree, flattened with each shared part once.

    Attributes:
        leaves: The leaves, in the order in which JAX flattens the tree.
        key: Equal for trees of the same structure and the same ties. It is hashable if
            the tree's static data is hashable.
    """

    leaves: list[Any]
    key: Hashable
    _tree: PyTree
    _treedef: Any
    _is_plain: bool

    def rebuilt(self, leaves: Sequence[Any]) -> PyTree:
        """Return a tree like the flattened one, with other leaves and the same ties."""
        if self._is_plain:
            return jax.tree_util.tree_unflatten(self._treedef, leaves)
        return _rebuilt(self._tree, iter(leaves))


def flatten(tree: PyTree) -> Flat:
    """Flatten a tree as `jax.tree.flatten` does, but each shared part of it once.

    It costs no more than JAX's own flattening if Flax NNX is not loaded, and one call
    of a small Python function for each node otherwise.

    Args:
        tree: The tree.

    Raises:
        UnsupportedLeafError: If JAX cannot sort the keys of a dict.
    """
    try:
        return _flattened(tree)
    except ValueError as error:
        unsorted = _unsorted(tree, set())
        if unsorted is None:
            raise
        raise UnsupportedLeafError((unsorted,)) from error


def _flattened(tree: PyTree) -> Flat:
    if "flax.nnx" not in sys.modules:
        leaves, treedef = jax.tree_util.tree_flatten(tree)
        return Flat(leaves, treedef, tree, treedef, _is_plain=True)
    watch = _Watch()
    nodes, treedef = jax.tree_util.tree_flatten(tree, is_leaf=watch.stops_at)
    if not watch.stops:
        return Flat(nodes, treedef, tree, treedef, _is_plain=True)
    leaves: list[Any] = []
    ends: list[Any] = []  # what the treedef leaves out of a node at which JAX stopped
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
    return Flat(leaves, (treedef, tuple(ends)), tree, treedef, _is_plain=False)


def leaves_of(tree: PyTree) -> list[Any]:
    """Return the leaves of a tree; the leaves of a shared part come once."""
    return flatten(tree).leaves


def nodes_with_paths(
    tree: PyTree, whole: tuple[type, ...]
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the leaves of a tree and some whole nodes, each shared part once.

    Args:
        tree: The tree.
        whole: Types of nodes that are yielded whole.

    Yields:
        JAX's path of each leaf or whole node, and the leaf or node.
    """
    watch = _Watch() if "flax.nnx" in sys.modules else None

    def stops_at(node: PyTree) -> bool:
        return (watch is not None and watch.stops_at(node)) or isinstance(node, whole)

    nodes, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=stops_at)
    seen: set[int] = set()
    for path, node in nodes:
        role = role_of(node)
        if role == STATE:
            inside, _ = jax.tree_util.tree_flatten_with_path(
                node, is_leaf=lambda node: isinstance(node, whole)
            )
            yield from (((*path, *below), each) for below, each in inside)
        elif not role:
            yield path, node
        elif id(node) not in seen and isinstance(node, whole):
            seen.add(id(node))
            yield path, node


def has_ties(tree: PyTree) -> bool:
    """Tell whether a part of a tree is in two places, or contains itself.

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
        A list of pairs, and the node's own treedef. Each pair is a path of one entry
        and a child; a leaf has one pair, of an empty path and itself.
    """
    is_below = iter((False,))  # the first node that JAX asks about is `node` itself
    return jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda _: next(is_below, True)
    )


def _unsorted(node: PyTree, above: set[int], name: str = "") -> tuple[str, str] | None:
    """Return the name and the problem of a dict whose keys JAX cannot sort, or None."""
    if id(node) in above:  # a module may refer to its parent
        return None
    try:
        children, treedef = children_of(node)
    except ValueError:
        if not isinstance(node, dict):
            return None
        keys = listed(list(map(repr, node)))
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
    """Tell whether a node is an NNX `variable`, `module` or `state`; "" if it is none.

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
    """The variables and modules that a walk has met, and the place of each."""

    def __init__(self) -> None:
        """Begin with none."""
        self._places: dict[int, tuple[Position, Any]] = {}

    def place_of(self, node: PyTree, place: Position) -> Position | None:
        """Return where a walk met a node before; note a new node, and return None."""
        found = self._places.setdefault(id(node), (place, node))[0]
        return None if found == place else found


class _Watch:
    """Tells JAX where to stop as it flattens: at a State, and at a repeated node."""

    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}
        self.stops = 0
        self._nodes: list[Any] = []  # kept alive, so that no other node gets their ids
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
        # The module is made before its children, since one of them may refer to it.
        made = built[id(node)] = object.__new__(type(node))
        filled = _made_of(treedef, (build(child) for _, child in children))
        for name, value in vars(filled).items():
            object.__setattr__(made, name, value)
        return made

    return build(tree)


def _made_of(treedef: Any, children: Iterable[Any]) -> PyTree:
    return jax.tree_util.tree_unflatten(treedef, list(children))
