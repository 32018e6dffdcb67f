"""Loaded values put into the NNX objects that a caller already has."""

import sys

import jax

from flaxckpt._trees.skeleton import key_of
from flaxckpt._trees.ties import MODULE, VARIABLE, PyTree, children_of, role_of

_OF_NNX = "_pytree__"  # what NNX itself keeps in a module


def put_into(given: PyTree, found: PyTree) -> PyTree:
    """Put restored values into the NNX objects of a tree, in place.

    Args:
        given: The tree with the objects.
        found: A tree of the same structure. It may have more where `given` has None.

    Returns:
        `found`, with the objects of `given` in place of its own.
    """
    return _put(given, found, set()) if "flax.nnx" in sys.modules else found


def _put(given: PyTree, found: PyTree, seen: set[int]) -> PyTree:
    """Put as `put_into` does, but into no object twice."""
    role = role_of(given)
    if role in (MODULE, VARIABLE):
        if id(given) not in seen:
            seen.add(id(given))
            if role == VARIABLE:
                given.set_raw_value(found.get_raw_value())
            else:
                _put_fields(given, found, seen)
        return given
    if given is None or role:
        return found
    pairs, treedef = children_of(given)
    if jax.tree_util.treedef_is_leaf(treedef):
        return found
    others = [child for _, child in children_of(found)[0]]
    children = [
        _put(child, other, seen)
        for (_, child), other in zip(pairs, others, strict=True)
    ]
    return treedef.unflatten(children)


def _put_fields(given: PyTree, found: PyTree, seen: set[int]) -> None:
    """Put what one module has into another one of its kind."""
    others = {str(key_of(keys[0])): child for keys, child in children_of(found)[0]}
    for keys, child in children_of(given)[0]:
        name = str(key_of(keys[0]))
        if not name.startswith(_OF_NNX):
            value = _put(child, others[name], seen)
            if value is not child:
                # Not by the module's own way: an `nnx.List` has its items as fields.
                object.__setattr__(given, name, value)
