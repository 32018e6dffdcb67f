"""Objects that have a state, such as data iterators: each is a leaf of a tree.

The store has the object's state, as JSON text. A load puts it back into the object that
`like` has at the same place.
"""

import base64
import contextlib
import copy
import json
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np

STATEFUL = "state"  # of such leaves
_SMALLEST = 1024  # bytes: states of one object, as it goes on, are stored alike
_WAYS = (("get_state", "set_state"), ("state_dict", "load_state_dict"))
_GENERATORS = (np.random.Generator, np.random.BitGenerator)
_VALUES = (jax.Array, np.ndarray, np.generic, bool, int, float, complex, str, bytes)
_MAY_HOLD = (
    "A state may hold text, bytes, integers, floats, None, numpy arrays, and dicts, "
    "lists and tuples of these"
)
_Getter: TypeAlias = Callable[[], Any]
_Setter: TypeAlias = Callable[[Any], Any]


class StateError(ValueError):
    """A state has values that JSON text cannot stand for."""


def is_stateful(value: Any) -> bool:
    """Tell whether an object has a state that it gives out and takes back.

    It has `get_state` and `set_state`, as Grain's iterators have, or `state_dict` and
    `load_state_dict`, or is a random generator of numpy.
    """
    if isinstance(value, _VALUES) or isinstance(value, type) or _is_of_nnx(value):
        return False
    return isinstance(value, _GENERATORS) or _way_of(value) is not None


def _way_of(value: Any) -> tuple[_Getter, _Setter] | None:
    """Return the methods that get and set an object's state; None if it has none."""
    for names in _WAYS:
        try:
            get, put = (getattr(value, name) for name in names)
        except Exception:  # whatever an object's own `__getattr__` raises
            continue
        if callable(get) and callable(put):
            return get, put
    return None


def _is_of_nnx(value: Any) -> bool:
    """Tell whether Flax NNX knows the object's state."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(value, nnx.Module | nnx.Variable)


def state_of(value: Any) -> np.ndarray[Any, Any]:
    """Return an object's state as u8[n], where n is a power of two.

    Raises:
        StateError: If the object does not give its state, or the state holds other
            values than text, bytes, integers, floats, None, numpy arrays, and dicts,
            lists and tuples of them.
    """
    get, _ = _accessors(value)
    try:
        state = get()
    except Exception as error:
        problem = f"which does not give its state ({type(error).__name__}: {error})"
        raise StateError(problem) from error
    try:
        text = json.dumps(_plain(state), separators=(",", ":")).encode()
    except RecursionError:
        raise StateError("with a state that is nested too deeply") from None
    except StateError:
        raise
    except ValueError as error:  # an integer of more digits than Python writes
        raise StateError(f"with a state that no JSON can hold ({error})") from error
    size = max(_SMALLEST, 1 << (len(text) - 1).bit_length())
    return np.frombuffer(text.ljust(size), np.uint8)  # JSON allows spaces at the end


def decoded_state(stored: np.ndarray[Any, Any]) -> Any:
    """Return the state that `state_of` has encoded.

    Raises:
        ValueError: If it is none.
    """
    try:
        return _rich(json.loads(stored.tobytes()))
    except Exception as error:  # numpy alone raises five kinds of them
        raise ValueError(f"it is no state: {error}") from error


def kept_state(value: Any) -> Any:
    """Return a copy of an object's state, to put it back."""
    get, _ = _accessors(value)
    return copy.deepcopy(get())


def put_state(value: Any, state: Any) -> None:
    """Put a state into an object."""
    _, put = _accessors(value)
    put(state)


def _accessors(value: Any) -> tuple[_Getter, _Setter]:
    """Return the functions that get and set an object's state."""
    if isinstance(value, np.random.Generator):
        value = value.bit_generator
    if isinstance(value, np.random.BitGenerator):
        return lambda: value.state, lambda state: setattr(value, "state", state)
    way = _way_of(value)
    assert way is not None
    return way


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
    dtype = getattr(value, "dtype", None)
    if isinstance(value, np.ndarray | np.generic) and (spelled := _spelled(dtype)):
        array = np.asarray(value)
        content = base64.b64encode(array.tobytes()).decode()
        name = "array" if isinstance(value, np.ndarray) else "scalar"
        return {name: [spelled, list(array.shape), content]}
    what = f"{kind.__module__}.{kind.__qualname__}"
    of = f" of dtype {dtype}" if isinstance(value, np.ndarray | np.generic) else ""
    raise StateError(f"with a {what}{of} in its state. {_MAY_HOLD}")


def _spelled(dtype: Any) -> str:
    """Return a text from which numpy makes the dtype again; "" if there is none."""
    for text in (dtype.str, dtype.name):  # numpy calls JAX's bfloat16 a void
        with contextlib.suppress(TypeError, SyntaxError):
            if not dtype.hasobject and np.dtype(text) == dtype:
                return str(text)
    return ""


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
    if name not in ("array", "scalar"):
        raise ValueError(f"nothing is called {name}")
    dtype, shape, text = content
    array = np.frombuffer(base64.b64decode(text), np.dtype(dtype)).reshape(shape)
    return array.copy() if name == "array" else array[()]
