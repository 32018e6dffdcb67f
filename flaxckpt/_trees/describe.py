"""Description of a tree: its layout, and its leaves in forms that the store takes."""

import functools
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from flaxckpt._trees.integers import stored_int
from flaxckpt._trees.layout import Layout
from flaxckpt._trees.leaf import SCALARS, Leaf, is_of_keys
from flaxckpt._trees.names import is_in_pointer, spelled
from flaxckpt._trees.remembered import Remembered
from flaxckpt._trees.skeleton import is_possible
from flaxckpt._trees.stateful import STATEFUL, StateError, is_stateful, state_of
from flaxckpt._trees.structure import structure_of
from flaxckpt._trees.ties import Flat, PyTree, flatten
from flaxckpt.errors import UnsupportedLeafError

_VALUES = (jax.Array, np.ndarray, np.generic, bool, int, float, complex, str, bytes)
_FUNCTIONS = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.MethodWrapperType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    functools.partial,
    np.ufunc,
    type,
)


def describe(
    tree: PyTree,
    storable: Callable[[str], bool],
    *,
    is_traced: bool = False,
    flat: Flat | None = None,
) -> tuple[Layout, list[Any]]:
    """Describe a tree and bring its leaves into forms that Orbax stores.

    It touches no device. It copies arrays in host memory, since their owner may change
    them, and passes JAX arrays on as they are.

    Args:
        tree: Any pytree.
        storable: Tells whether a dtype of this name can be stored.
        is_traced: Whether leaves may be values of a running trace.
        flat: The flattened tree, if the caller has it already.

    Returns:
        The layout, and the leaves in its order: None for each that is not a value.

    Raises:
        UnsupportedLeafError: If leaves cannot be stored; it names all of them.
    """
    flat = flatten(tree) if flat is None else flat
    structure = structure_of(flat, tree)
    leaves: list[Leaf] = []
    stored: list[Any] = []
    refused: list[tuple[str, str]] = []
    has_texts = False
    for value, path, in_equinox in zip(
        flat.leaves, structure.paths, structure.in_equinox, strict=True
    ):
        if type(value) in _ARRAY_TYPES:  # a short way: there may be many arrays
            leaf = _ARRAY_LEAVES.get((path, value.dtype, value.shape))
            if leaf is not None and not value.is_deleted():
                leaves.append(leaf)
                stored.append(value)
                continue
        kind = unstored_kind(value, in_equinox=in_equinox)
        if kind:
            leaves.append(Leaf(path, kind))
            stored.append(None)
            continue
        try:
            leaf, value = normal(path, value, storable, is_traced=is_traced)
        except RefusedError as refusal:
            refused.append((Leaf(path, "").name, str(refusal)))
            continue
        leaves.append(leaf)
        stored.append(value)
        has_texts |= leaf.is_text
    refused += structure.refused
    if refused:
        raise UnsupportedLeafError(tuple(refused))
    names = structure.spelled
    if has_texts and any(leaf.is_text and is_in_pointer(leaf.path) for leaf in leaves):
        names = spelled(structure.paths, slashes=False)
    for index, keys in names.items():
        leaves[index] = _stored_as(leaves[index], keys)
    return Layout(structure.skeleton, tuple(leaves)), stored


class RefusedError(Exception):
    """A leaf cannot be stored, for the reason given."""


def unstored_kind(value: Any, *, in_equinox: bool) -> str:
    """Return the kind of a leaf that is not a value; "" for a value.

    A `function` is a function or a class, and not an object with state. A leaf of an
    Equinox module is `static` unless it is an array, a number or text, or has
    `__jax_array__`. Equinox's own serialisation stores the arrays and numbers of a
    module, too, and takes everything else from the module that it is given.
    """
    if isinstance(value, _VALUES):
        return ""
    if in_equinox and not hasattr(value, "__jax_array__"):
        return "static"
    # A function that JAX has transformed has `__wrapped__`.
    is_function = isinstance(value, _FUNCTIONS) or (
        callable(value) and hasattr(value, "__wrapped__")
    )
    return "function" if is_function else ""


def normal(
    path: tuple[str, ...],
    value: Any,
    storable: Callable[[str], bool],
    *,
    is_traced: bool = False,
) -> tuple[Leaf, Any]:
    """Describe a leaf and bring it into a stored form, or raise `RefusedError`."""
    if isinstance(value, Tracer) and not is_traced:
        raise RefusedError("a value of a running trace, not known yet")
    if isinstance(value, jax.Array):
        if not isinstance(value, Tracer) and value.is_deleted():
            raise RefusedError("an array that was deleted (donated to a jitted call)")
        leaf = array_leaf(path, value)
    elif isinstance(value, np.ma.MaskedArray):
        raise RefusedError("a masked array; save its data and mask as two arrays")
    elif isinstance(value, np.ndarray) and type(value) not in _NUMPY_ARRAYS:
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        raise RefusedError(f"a {name}; save numpy.asarray of it")
    elif isinstance(value, np.ndarray | np.generic):
        kind = "numpy_scalar" if isinstance(value, np.generic) else "numpy"
        value = np.array(value, dtype=value.dtype.newbyteorder("="))
        leaf = Leaf(path, kind, str(value.dtype), value.shape)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        value = stored_int(int(value))
        return Leaf(path, "int", str(value.dtype), value.shape), value
    elif isinstance(value, bytes):
        leaf = Leaf(path, "bytes", "uint8", (len(value),))
        return leaf, np.frombuffer(value, np.uint8)
    elif is_stateful(value):
        return _state(path, value, is_traced=is_traced)
    elif isinstance(value, str):
        return _text(path, str(value))
    else:
        for kind, name in SCALARS.items():
            if isinstance(value, kind):
                number = kind(value)
                stored = np.asarray(number) if name == "complex" else number
                return Leaf(path, name), stored
        raise RefusedError(f"an object of type {type(value).__qualname__}")
    if not is_possible(leaf.shape):
        raise RefusedError(f"an array of shape {leaf.shape}, which is too large")
    if leaf.kind != "key" and not storable(leaf.dtype):
        raise RefusedError(f"an array of dtype {leaf.dtype}")
    if leaf.kind == "jax" and not isinstance(value, Tracer):
        leaf = _ARRAY_LEAVES.keep((path, value.dtype, value.shape), leaf)
        _ARRAY_TYPES.add(type(value))
    return leaf, value


@functools.lru_cache(maxsize=2**16)
def _stored_as(leaf: Leaf, keys: tuple[str, ...]) -> Leaf:
    return replace(leaf, stored=keys)


def _state(path: tuple[str, ...], value: Any, *, is_traced: bool) -> tuple[Leaf, Any]:
    """Store the state of an object, as it is now."""
    if is_traced:
        raise RefusedError(
            f"the state of a {type(value).__qualname__}, which a program that runs "
            "cannot read; save it outside of jit"
        )
    try:
        state = state_of(value)
    except StateError as error:
        raise RefusedError(f"a {type(value).__qualname__} {error}") from error
    return Leaf(path, STATEFUL, "uint8", state.shape), state


def _text(path: tuple[str, ...], value: str) -> tuple[Leaf, Any]:
    """Store text as text, or as an array of bytes if UTF-8 cannot encode it."""
    try:
        value.encode()
    except UnicodeEncodeError:
        found = np.frombuffer(value.encode(errors="surrogatepass"), np.uint8)
        return Leaf(path, "str", "uint8", found.shape), found
    return Leaf(path, "str"), value


def array_leaf(path: tuple[str, ...], value: Any) -> Leaf:
    kind, name = _kind_of(value.dtype)
    is_known = kind == "key" and isinstance(value, jax.Array)
    impl = impl_of(value) if is_known else ""
    return Leaf(path, kind, name, tuple(value.shape), impl)


@functools.lru_cache(maxsize=64)
def _kind_of(dtype: Any) -> tuple[str, str]:
    """Return the kind of JAX arrays of a dtype, and its name."""
    return "key" if is_of_keys(dtype) else "jax", str(dtype)


_NUMPY_ARRAYS = (np.ndarray, np.memmap)  # other kinds hold more than their elements
# Descriptions of JAX arrays that can be stored, and the types of these arrays.
_ARRAY_LEAVES = Remembered[Leaf](2**16)
_ARRAY_TYPES: set[type] = set()


def impl_of(key: jax.Array) -> str:
    return str(jax.random.key_impl(key))
