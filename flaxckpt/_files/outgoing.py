"""A tree on its way into a file of another library."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from flaxckpt._trees.leaf import ARRAYS, PYTHON, Leaf
from flaxckpt._trees.structure import structure_of
from flaxckpt._trees.ties import PyTree, flatten
from flaxckpt.errors import UnsupportedLeafError

# The dtypes of the scalar arrays that Python numbers become.
_NUMBERS = {"bool": "bool", "int": "int64", "float": "float64", "complex": "complex128"}


@dataclass(frozen=True)
class Outgoing:
    """A tree to write.

    Attributes:
        tree: Dicts, lists and tuples, with the index of a leaf in place of each value.
        leaves: What the leaves are.
        read: Reads the leaves with these indices: arrays of numpy, Python numbers, and
            text.
    """

    tree: PyTree
    leaves: Sequence[Leaf]
    read: Callable[[Sequence[int]], list[Any]]


@dataclass(frozen=True)
class NamedLeaf:
    """A leaf that is written as an array with a name.

    Attributes:
        name: The name.
        index: Its index among the tree's leaves.
        dtype: Name of the array's dtype.
        shape: Its shape.
    """

    name: str
    index: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


def named_leaves(
    outgoing: Outgoing,
    separator: str,
    problem_of: Callable[[str, str], str],
) -> list[NamedLeaf]:
    """Name the leaves by the keys that lead to them; a Python number is a scalar array.

    Functions are left out: a checkpoint does not hold them either.

    Args:
        outgoing: The tree.
        separator: What separates the keys in a name.
        problem_of: Tells what is wrong with a name and the name of a dtype; "" if
            nothing is.

    Raises:
        UnsupportedLeafError: If the format cannot hold a leaf, or two leaves have the
            same name; names all such leaves.
    """
    flat = flatten(outgoing.tree)
    paths = structure_of(flat, outgoing.tree).paths
    named: dict[str, NamedLeaf] = {}
    refused: list[tuple[str, str]] = []
    for keys, index in zip(paths, flat.leaves, strict=True):
        leaf, name = outgoing.leaves[index], separator.join(keys)
        if leaf.is_from_like:
            continue
        dtype = leaf.dtype if leaf.kind in ARRAYS else _NUMBERS.get(leaf.kind, "")
        if not keys:
            problem = "has no name. Save it in a dict, as in {'weights': array}"
        elif name in named:
            other = outgoing.leaves[named[name].index].name
            problem = f"has the name {name!r}, as has {other}. Rename one of them"
        elif leaf.kind not in ARRAYS and (leaf.kind not in PYTHON or leaf.shape):
            problem = _KINDS.get(leaf.kind, f"is of kind {leaf.kind}")
        else:
            problem = problem_of(name, dtype)
        if problem:
            refused.append((leaf.name, problem))
        named.setdefault(name, NamedLeaf(name, index, dtype, leaf.shape))
    if refused:
        raise UnsupportedLeafError(tuple(refused), "exported")
    return list(named.values())


_KINDS = {
    "key": "is a PRNG key. Save jax.random.key_data of it",
    "int": "is an integer of more than 64 bits",
    "str": "is text",
    "bytes": "is bytes",
    "state": "is the state of an object",
}


def divided(
    leaves: Sequence[NamedLeaf], limit_bytes: int | None
) -> Iterator[list[NamedLeaf]]:
    """Divide leaves, in order, into groups; a large leaf is alone in its group."""
    group: list[NamedLeaf] = []
    size = 0
    for leaf in leaves:
        if group and limit_bytes is not None and size + leaf.nbytes > limit_bytes:
            yield group
            group, size = [], 0
        group.append(leaf)
        size += leaf.nbytes
    yield group


def arrays_of(
    outgoing: Outgoing, leaves: Sequence[NamedLeaf]
) -> dict[str, np.ndarray[Any, Any]]:
    """Read leaves as contiguous arrays, by their names."""
    values = outgoing.read([each.index for each in leaves])
    return {
        each.name: np.asarray(value, jnp.dtype(each.dtype), order="C")
        for each, value in zip(leaves, values, strict=True)
    }
