"""Arithmetic on scalars that gives the same bits in Python, NumPy and XLA."""

import contextlib
import numbers
import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from flaxckpt._decision.logs import Unusable, tiny_of, without_value
from flaxckpt._runtime.gone import check_there
from flaxckpt.errors import MetricError, SettingError

Scalar: TypeAlias = jax.typing.ArrayLike
"""A Python number, or a numpy or JAX array of shape ()."""
Where: TypeAlias = Callable[[Any, Any, Any], Any]
LARGEST = 2**30  # of all counts: the sum of two still fits an int32
LARGEST_STEP = 2**31 - 1  # of global steps, which are never added up


def improves(
    value: Any, best: Any, has_best: Any, mode: str, min_delta: float, where: Where
) -> Any:
    """Tell whether `value` is better than `best` by more than `min_delta`.

    Any number is better than no best, and a NaN is never better.
    """
    delta = flushed(value.dtype.type(min_delta), pick)
    if mode == "min":
        better = value < flushed(best - delta, where)
    else:
        better = value > flushed(best + delta, where)
    return where(has_best, better, value == value)


def monitored(monitor: str, value: Any) -> Any:
    """Check that a monitored value is a real scalar, without waiting for it.

    Args:
        monitor: Its name.
        value: The metric, as `logs.settled` returns it.

    Returns:
        A Python number, a numpy scalar or a JAX array of shape ().

    Raises:
        MetricError: If it is anything else, or was deleted.
    """
    if isinstance(value, numbers.Real):
        return value
    if isinstance(value, str | Unusable):
        problem = "is text" if isinstance(value, str) else value.problem
        advice = "and a monitored value must be a real number."
        raise MetricError(monitor, f"{problem}, {advice}")
    if problem := without_value(value):
        raise MetricError(monitor, problem)
    if value.shape != ():
        advice = "Reduce it first, say with .mean()."
        if _is_of_pmap(value):
            advice = (
                "It has one value for each device, as pmap returns it: apply "
                "jax.lax.pmean inside the pmapped function, and pass the value x[0] "
                f"of one device: logs={{{monitor!r}: x[0]}}."
            )
        raise MetricError(
            monitor,
            f"has shape {value.shape}, and a monitored value must be a scalar. "
            f"{advice}",
        )
    return value


def _is_of_pmap(value: Any) -> bool:
    """Tell whether an array may be what `pmap` returns for a scalar."""
    if len(value.shape) != 1 or isinstance(value, Tracer):
        return False
    sharding = getattr(value, "sharding", None)
    parts = len(sharding.device_set) if sharding is not None else 1
    return parts == value.shape[0] or jax.local_device_count() == value.shape[0] > 1


def is_real(value: Any) -> bool:
    """Tell whether a value is a real number, and not a bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def index(name: str, value: Any) -> Any:
    """Check epoch, batch or step, and return it; of a JAX array, all but the value."""
    if type(value) is int and 0 <= value < LARGEST:
        return value
    most = LARGEST_STEP if name == "step" else LARGEST - 1
    if isinstance(value, jax.Array):
        check_there(name, [("", value)])
        if value.shape == () and jnp.issubdtype(value.dtype, jnp.integer):
            return value
    else:
        with contextlib.suppress(TypeError):
            value = operator.index(value)
            if 0 <= value <= most:
                return value
    raise _not_an_index(name, value)


def _not_an_index(name: str, value: Any) -> SettingError:
    what = "a zero-based integer below 2**30"
    if name == "step":
        what = "an integer of at least 0 and below 2**31"
    return SettingError(name, value, f"pass {what}, as a scalar.")


def whole(name: str, value: Any) -> int:
    """Return epoch, batch or step as an int; wait for a device that computes it.

    Raises:
        SettingError: If it is no integer, or out of its range.
    """
    check_there(name, [("", value)])
    value = np.asarray(value)[()] if hasattr(value, "shape") else value
    if isinstance(value, bool | np.bool_):
        raise _not_an_index(name, value)
    return operator.index(index(name, value))


def as_number(value: Any, *, otherwise: int) -> int:
    """Return an argument's value as an int, or `otherwise` if it is no integer."""
    try:
        return operator.index(value)
    except TypeError:
        return otherwise


def array(leaf: Scalar) -> Any:
    """Return a leaf of the state, typed as an array or numpy scalar."""
    return leaf


def to_int32(value: Any) -> jax.Array:
    return jnp.asarray(value).astype(jnp.int32)


def pick(condition: Any, true: Any, false: Any) -> Any:
    """Choose one value as `numpy.where` does, a hundred times faster."""
    return true if condition else false


def flushed(value: Any, where: Where) -> Any:
    """Return zero for a number below the smallest normal one, as XLA may."""
    tiny = tiny_of(value.dtype)
    return where(abs(value) < tiny, value.dtype.type(0), value)
