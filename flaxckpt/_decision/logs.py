"""The metrics of a call, in one form: flat, each a number, a text or an array.

The decision, the filepath, the record, and the copies that a program carries all use
`normalized` metrics, and look a metric up with `find`.
"""

import decimal
import functools
import math
import numbers
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from flaxckpt._runtime.gone import GONE, is_gone
from flaxckpt.errors import MetricError, SettingError

Logs: TypeAlias = Mapping[str, Any]
_PLAIN = frozenset((float, int, bool, str, np.float32, np.float64, np.int32, np.int64))
_MOST_BITS = 1024  # an integer of more bits is beyond all floats
SURROGATES = (
    "surrogates, which are no characters, and no record keeps them as they are. Take "
    'them out, as text.encode(errors="replace").decode() does.'
)
_REAL = (jnp.floating, jnp.integer, jnp.bool_)


@dataclass(frozen=True)
class Unusable:
    """A value of `logs` that is no number, no text and no array of numbers.

    Attributes:
        problem: What it is, as in `is a list`.
    """

    problem: str


def normalized(logs: Any) -> dict[str, Any]:
    """Return metrics in one form.

    Nested mappings are flattened: `{"val": {"loss": x}}` is `val/loss`. Values of None
    are left out. Arrays with one element become scalars, and `Decimal` and `Fraction`
    become floats. A metric object with a `compute()` method becomes its result.

    Args:
        logs: A mapping of names to metrics, or None for none.

    Returns:
        Numbers, texts and arrays by their names; `Unusable` for anything else.

    Raises:
        SettingError: If `logs` is no mapping, contains itself, or has a key whose
            `str` fails.

    Example:
        >>> normalized({"val": {"loss": np.ones(1), "acc": None}, "lr": 0.5})
        {'val/loss': np.float64(1.0), 'lr': 0.5}
    """
    check_logs(logs)
    try:
        return dict(_flat("", logs or {}))
    except RecursionError as error:
        advice = "it is nested without end. Pass a flat mapping of names to metrics."
        raise SettingError("logs", f"<{type(logs).__name__}>", advice) from error


def with_values(logs: Any) -> dict[str, Any]:
    """Return metrics as `normalized` does, and check that all of them have values.

    Raises:
        SettingError: As `normalized`.
        MetricError: If a metric has no value, or surrogates in its name or text.
    """
    flat = normalized(logs)
    for name, value in flat.items():
        if problem := without_value(value):
            raise MetricError(name, problem)
        for what, text in (("name", name), ("text", value)):
            if isinstance(text, str) and has_surrogates(text):
                raise MetricError(name, f"has a {what} with {SURROGATES}")
    return flat


def without_value(value: Any) -> str:
    """Say why a metric has a shape and a dtype but no value; "" if it has one."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return "is a jax.ShapeDtypeStruct, which has no value. Pass the metric itself."
    return GONE if is_gone(value) else ""


def has_surrogates(text: str) -> bool:
    """Tell whether a text has surrogates, which are no characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def check_logs(logs: Any) -> None:
    """Check that metrics are a mapping, or None.

    Raises:
        SettingError: If they are anything else.
    """
    if logs is not None and not isinstance(logs, Mapping):
        raise SettingError("logs", logs, "pass a mapping of names to metrics, or None.")


def find(names: Iterable[str], name: str) -> str:
    """Return the name by which a metric is in flat logs.

    Args:
        names: The names in the logs.
        name: The name of the metric that the caller looks for.

    Returns:
        `name` if the logs have it. Otherwise the name that differs only in `/` for
        `_`, such as `val/loss` for `val_loss`, or `name` if there is none.
    """
    if name not in names:
        for each in names:
            if each.replace("/", "_") == name:
                return each
    return name


def value_of(logs: Any, name: str) -> Any:
    """Return a metric from logs that are not normalized; None if it is not there."""
    check_logs(logs)
    value = logs.get(name) if logs else None
    if value is None and logs:
        flat = normalized(logs)
        return flat.get(find(flat, name))
    return settled(_computed(value))


def peeked(logs: Any, name: str) -> Any:
    """Return a metric as `value_of` does, for those to whom it does not matter.

    It looks at this metric alone: `compute` of other ones is not called, and logs that
    are no mapping have no metrics.
    """
    found = logs.get(name) if isinstance(logs, Mapping) else None
    if found is None and isinstance(logs, Mapping):
        for key, value in logs.items():
            text = key.replace("/", "_") if isinstance(key, str) else ""
            if text == name:
                found = value
            elif name.startswith(f"{text}_") and isinstance(value, Mapping):
                found = peeked(value, name[len(text) + 1 :])
            if found is not None:
                break
    return settled(_computed(found))


def settled(value: Any) -> Any:
    """Return one metric in the form of `normalized`, without waiting for a device."""
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return _as_float(value)
    if value is None or type(value) in _PLAIN:
        return value
    if isinstance(value, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        return _array(value)
    if isinstance(value, int | float | str | Unusable):
        return value
    if isinstance(value, numbers.Real | decimal.Decimal):
        return _as_float(value)
    if isinstance(value, Mapping):
        shown = ", ".join(map(repr, value)) or "nothing"
        return Unusable(f"is a mapping (of {shown})")
    return _converted(value)


def rounded(value: Any, dtype: Any) -> Any:
    """Round a number of the host to the numpy scalar of `dtype` that is compared.

    XLA takes numbers below the smallest normal one for zero on some devices, so this
    function returns zero for them.
    """
    dtype = np.dtype(dtype)
    try:
        with np.errstate(all="ignore"):
            value = dtype.type(value)
    except OverflowError:  # an integer beyond all floats
        return dtype.type(math.inf if value > 0 else -math.inf)
    return dtype.type(0) if abs(value) < tiny_of(dtype) else value


@functools.cache
def tiny_of(dtype: Any) -> Any:
    """Return the smallest normal number of a dtype."""
    return jnp.finfo(dtype).tiny


def left_out(logs: Mapping[str, Any]) -> dict[str, str]:
    """Return the names of normalized logs that a record cannot keep, and why."""
    return {name: what for name, value in logs.items() if (what := _excess(value))}


def plain_scalars(logs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the normalized logs that a record can keep: numbers, booleans and text.

    It waits for values that a device is still computing.
    """
    kept: dict[str, Any] = {}
    for key, value in (logs or {}).items():
        if _excess(value):
            continue
        if hasattr(value, "item"):  # numpy's or JAX's
            value = value.item()
            value = value if isinstance(value, int | float | bool) else float(value)
        kept[key] = value
    return kept


def _flat(prefix: str, logs: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in logs.items():
        name = f"{prefix}{_text_of(key)}"
        value = _computed(value)
        if isinstance(value, Mapping):
            yield from _flat(f"{name}/", value)
        elif value is not None:
            yield name, settled(value)


def _text_of(key: Any) -> str:
    try:
        return str(key)
    except Exception as error:
        advice = f"a key of type {type(key).__name__} has no text. Pass text as keys."
        raise SettingError("logs", "<mapping>", advice) from error


def _computed(value: Any) -> Any:
    """Return the result of a metric object; return other values as they are."""
    if type(value) in _PLAIN or isinstance(value, jax.Array | type):
        return value
    try:
        compute = getattr(value, "compute", None)
        is_slow = hasattr(value, "__dask_graph__")  # it may run for hours
        return value if is_slow or not callable(compute) else compute()
    except Exception as error:
        return Unusable(
            f"is of type {type(value).__name__}, whose compute() raised "
            f"{type(error).__name__}: {error}"
        )


def _array(value: Any) -> Any:
    """Return an array without its mask, or a scalar if it has one element."""
    if not _is_real(value.dtype):
        if isinstance(value, str):  # numpy's
            return str(value)
        return Unusable(f"is of dtype {value.dtype}")
    if isinstance(value, np.ma.MaskedArray):
        if np.ma.is_masked(value):  # a masked element has no value
            return Unusable("is masked")
        value = value.data
    if math.prod(value.shape) != 1:
        return value
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((), value.dtype)
    if isinstance(value, jax.Array):  # a deleted one is refused on use
        return value if not value.shape or is_gone(value) else value.reshape(())
    return value.reshape(())[()]


def _is_real(dtype: Any) -> bool:
    if getattr(dtype, "kind", "") == "m":  # numpy takes a timedelta for an integer
        return False
    return any(jnp.issubdtype(dtype, kind) for kind in _REAL)


def _as_float(value: Any) -> Any:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except Exception as error:
        return Unusable(f"is {value!r}, and no float: {error}")


def _converted(value: Any) -> Any:
    """Convert an array-like object, or a list of numbers, to an array."""
    kind = f"is of type {type(value).__name__}"
    is_list = isinstance(value, list | tuple)
    if is_list and any(map(np.ma.is_masked, value)):
        return Unusable("is masked")
    try:
        is_array = hasattr(value, "__jax_array__") or hasattr(value, "__array__")
        if not (is_list or is_array):
            return Unusable(kind)
        if hasattr(value, "__jax_array__"):
            return _array(jnp.asarray(value))
        array = np.asanyarray(value)
    except Exception as error:
        return Unusable(f"{kind}, and no number: {error}")
    return _array(array) if _is_real(array.dtype) else Unusable(kind)


def _excess(value: Any) -> str:
    """Say why a record cannot keep a value; "" if it can."""
    if isinstance(value, Unusable):
        return value.problem
    shape = getattr(value, "shape", ())
    return f"has shape {tuple(shape)}" if shape else ""
