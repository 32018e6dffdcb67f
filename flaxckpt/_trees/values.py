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
    """Tell whether a leaf is an array, a number or text, or says that it is an array.

    Equinox's own serialisation stores the arrays and numbers of a module, and takes all
    else from the module that it is given.
    """
    return isinstance(leaf, _VALUES) or hasattr(leaf, "__jax_array__")


def is_function(leaf: Any) -> bool:
    """Tell whether a leaf is a function or a class, and no object with state."""
    if isinstance(leaf, _VALUES):
        return False
    # Functions that JAX has transformed say which function they wrap.
    return isinstance(leaf, _FUNCTIONS) or (
        callable(leaf) and hasattr(leaf, "__wrapped__")
    )
