"""Objects that have a state, such as data iterators: each is a leaf of a tree.

The store has the object's state, as JSON text. A load puts it back into the object that
`like` has at the same place.
"""

import base64
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

KIND = "state"  # of such leaves
_SMALLEST = 1024  # bytes: states of one object, as it goes on, are stored alike
_WAYS = (("get_state", "set_state"), ("state_dict", "load_state_dict"))
_GENERATORS = (np.random.Generator, np.random.BitGenerator)
_VALUES = (jax.Array, np.ndarray, np.generic, bool, int, float, complex, str, bytes)
_Setter = Callable[[Any], Any]


class StateError(ValueError):
    """A state has values that JSON text cannot stand for."""


def is_stateful(value: Any) -> bool:
    """Tell whether an object has a state that it gives out and takes back.

    It has `get_state` and `set_state`, as Grain's iterators have, or `state_dict` and
    `load_state_dict`, or is a random generator of numpy.
    """
    if isinstance(value, _VALUES) or isinstance(value, type):
        return False
    return isinstance(value, _GENERATORS) or any(
        callable(getattr(value, get, None)) and callable(getattr(value, put, None))
        for get, put in _WAYS
    )


def state_of(value: Any) -> np.ndarray[Any, Any]:
    """Return an object's state as u8[n], where n is a power of two.

    Raises:
        StateError: If the state holds other values than text, bytes, numbers, None,
            numpy arrays, and dicts, lists and tuples of them.
    """
    get, _ = _accessors(value)
    try:
        text = json.dumps(_plain(get()), separators=(",", ":")).encode()
    except RecursionError:
        raise StateError("a state that holds itself") from None
    size = max(_SMALLEST, 1 << (len(text) - 1).bit_length())
    return np.frombuffer(text.ljust(size), np.uint8)  # JSON allows spaces at the end


def decoded_state(stored: np.ndarray[Any, Any]) -> Any:
    """Return the state that `state_of` has encoded.

    Raises:
        ValueError: If it is none.
    """
    try:
        return _rich(json.loads(stored.tobytes()))
    except (TypeError, LookupError, RecursionError) as error:
        raise ValueError(f"it is no state: {error}") from error


def put_state(value: Any, state: Any) -> None:
    """Put a state into an object."""
    _, put = _accessors(value)
    put(state)


def _accessors(value: Any) -> tuple[Callable[[], Any], _Setter]:
    """Return the functions that get and set an object's state."""
    if isinstance(value, np.random.Generator):
        value = value.bit_generator
    if isinstance(value, np.random.BitGenerator):
        return lambda: value.state, lambda state: setattr(value, "state", state)
    for get, put in _WAYS:
        if hasattr(value, get) and hasattr(value, put):
            return getattr(value, get), getattr(value, put)
    raise AssertionError(f"{type(value).__name__} has no state")


def _plain(value: Any) -> Any:
    """Return a value as JSON has it; what JSON lacks becomes a dict of one entry."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return [_plain(each) for each in value]
    if kind is tuple:
        return {"tuple": [_plain(each) for each in value]}
    if isinstance(value, dict):
        return {"dict": [[_plain(key), _plain(each)] for key, each in value.items()]}
    if kind is bytes:
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        array = np.asarray(value)
        content = base64.b64encode(array.tobytes()).decode()
        name = "array" if isinstance(value, np.ndarray) else "scalar"
        return {name: [array.dtype.str, list(array.shape), content]}
    raise StateError(f"a state with a {kind.__module__}.{kind.__qualname__} in it")


def _rich(value: Any) -> Any:
    """Return the value for which JSON values stand; see `_plain`."""
    if isinstance(value, list):
        return [_rich(each) for each in value]
    if not isinstance(value, dict):
        return value
    ((name, content),) = value.items()
    if name == "tuple":
        return tuple(_rich(each) for each in content)
    if name == "dict":
        return {_rich(key): _rich(each) for key, each in content}
    if name == "bytes":
        return base64.b64decode(content)
    dtype, shape, text = content
    array = np.frombuffer(base64.b64decode(text), np.dtype(dtype)).reshape(shape)
    return array.copy() if name == "array" else array[()]
