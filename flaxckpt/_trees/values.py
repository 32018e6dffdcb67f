"""Which leaves of a tree are values, and which are parts of the program."""

import functools
import types
from typing import Any

import jax
import numpy as np

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


def is_value(leaf: Any) -> bool:
    """Tell whether a leaf is an array, a number or text, or has `__jax_array__`.

    Equinox's own serialisation stores the arrays and numbers of a module, too, and
    takes everything else from the module that it is given.
    """
    return isinstance(leaf, _VALUES) or hasattr(leaf, "__jax_array__")


def is_function(leaf: Any) -> bool:
    """Tell whether a leaf is a function or a class, and not an object with state."""
    if isinstance(leaf, _VALUES):
        return False
    # A function that JAX has transformed has `__wrapped__`.
    return isinstance(leaf, _FUNCTIONS) or (
        callable(leaf) and hasattr(leaf, "__wrapped__")
    )
