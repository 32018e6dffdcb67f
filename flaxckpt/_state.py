"""The decision whether to save: a pure function over a small pytree.

Nothing here knows of disks or of Orbax. `step` runs eagerly, where Python and numpy
values in give numpy values out and dispatch nothing to JAX, and under `jit`, `scan`,
`vmap` and `shard_map`, where it is a handful of scalar operations.

The comparison is float32 (float64 under x64) everywhere, and numbers below the smallest
normal one count as zero, because XLA treats them so on some devices: all ways to call
`step` agree to the bit.
"""

import math
import numbers
import operator
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from flaxckpt._direction import direction
from flaxckpt._frames import outside
from flaxckpt._logs import Unusable, normalized, rounded, value_of
from flaxckpt._unchecked import as_arguments, unchecked
from flaxckpt.errors import MetricError, SettingError

Scalar: TypeAlias = jax.typing.ArrayLike
"""A Python number, or a numpy or JAX array of shape ()."""
Where: TypeAlias = Callable[[Any, Any, Any], Any]

_INT32_MAX = 2**31 - 1
_LARGEST = 2**30  # of what is counted: the sum of two is an int32 still
_HOST_INTS = frozenset((int, np.int32, np.int64))
_COUNTERS = ("seen", "batches", "last_epoch", "last_batch")
BEST = ("best_value", "has_best")
LEAVES = (*BEST, *_COUNTERS)
_SETTINGS = ("monitor", "mode", "save_best_only", "save_freq", "min_delta")


class _Once:
    """Remembers that a run was warned. All are equal, so they never cause a retrace."""

    def __init__(self) -> None:
        self.done = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Once)

    def __hash__(self) -> int:
        return 0

    def __repr__(self) -> str:
        return "..."


_STATIC = {"static": True}


@jax.tree_util.register_dataclass  # pyright: ignore[reportUntypedClassDecorator]
@typing.no_type_check  # unflattening passes specs, shardings and batched leaves too
@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """What the decision remembers from call to call, as a pytree.

    Make one with `create`. It can be carried through `scan`, batched by `vmap`, given
    to and returned from `jit`; the settings are static, so that a call with the same
    settings never compiles anew.

    Attributes:
        best: Best monitored value so far, f32[] (f64[] under x64); NaN while there is
            none. Moves only under `save_best_only`. Made of the two leaves below.
        best_value: The same as a leaf, but zero while there is none: no leaf is a NaN,
            at which `jax_debug_nans` would end a program.
        has_best: Whether there is a best, bool[].
        seen: Batches since the last due check, i32[]. Moves, as the next three do,
            only where `save_freq` is a number.
        batches: Batches seen in all, i32[]; stays at its largest value once there.
        last_epoch: Epoch of the last batch seen, i32[]; -1 before the first.
        last_batch: Index of that batch in its epoch, i32[]; -1 before the first.
        monitor: Key in `logs` of the value to compare. Static, as are all below.
        mode: `"min"` or `"max"`; `"auto"` where no direction is known or needed.
        save_best_only: Whether a due check saves only what improves on `best`.
        save_freq: `"epoch"`, or the number of batches between due checks.
        min_delta: By more than how much an improvement must improve.
    """

    best_value: Scalar
    has_best: Scalar
    seen: Scalar
    batches: Scalar
    last_epoch: Scalar
    last_batch: Scalar
    monitor: str = field(metadata=_STATIC)
    mode: str = field(metadata=_STATIC)
    save_best_only: bool = field(metadata=_STATIC)
    save_freq: str | int = field(metadata=_STATIC)
    min_delta: float = field(metadata=_STATIC)
    _warned: _Once = field(metadata=_STATIC, default_factory=_Once, repr=False)

    @property
    def best(self) -> Any:
        """Best monitored value so far; NaN while there is none."""
        return _known_best(self.best_value, self.has_best)

    @classmethod
    def create(
        cls,
        monitor: str = "val_loss",
        mode: str = "auto",
        save_best_only: bool = False,
        save_freq: str | int = "epoch",
        initial_value_threshold: float | None = None,
        min_delta: float = 0.0,
    ) -> "CheckpointState":
        """Make the state of a run that has seen nothing yet.

        The arguments are those of Keras's `ModelCheckpoint`. The leaves are numpy
        scalars, in the precision that JAX is set to now.

        Args:
            monitor: Key in `logs` of the value to compare.
            mode: `"min"`, `"max"`, or `"auto"` to tell from the name of `monitor`.
            save_best_only: Save at a due check only what improves on the best.
            save_freq: `"epoch"`: a check is due at the end of each epoch. A number:
                a check is due every so many batches.
            initial_value_threshold: The best to improve on at first; None for no best.
                Has no effect without `save_best_only`.
            min_delta: By more than how much an improvement must improve.

        Returns:
            The state.

        Raises:
            SettingError: A `ValueError`, if a setting cannot work, or if the direction
                of `monitor` is needed and not known.

        Example:
            >>> state = CheckpointState.create("val_accuracy", save_best_only=True)
            >>> state.mode
            'max'
        """
        _check_settings(monitor, mode, save_best_only, save_freq, min_delta)
        mode = mode if mode != "auto" else direction(monitor) or "auto"
        if save_best_only and mode == "auto":
            raise SettingError(
                "monitor",
                monitor,
                "whether this metric is better low or high is not known by its name. "
                'Pass mode="min" or mode="max".',
            )
        if initial_value_threshold is not None:
            if not is_real(initial_value_threshold) or math.isnan(
                initial_value_threshold
            ):
                raise SettingError(
                    "initial_value_threshold",
                    initial_value_threshold,
                    "pass a number to improve on, or None for none.",
                )
        threshold = initial_value_threshold
        dtype = jax.dtypes.canonicalize_dtype(np.float64)
        state = cls(
            best_value=rounded(0 if threshold is None else threshold, dtype),
            has_best=np.bool_(threshold is not None),
            seen=np.int32(0),
            batches=np.int32(0),
            last_epoch=np.int32(-1),
            last_batch=np.int32(-1),
            monitor=monitor,
            mode=mode,
            save_best_only=bool(save_best_only),
            save_freq=save_freq if save_freq == "epoch" else int(save_freq),
            min_delta=float(min_delta),
        )
        return as_arguments(state)


def step(
    state: CheckpointState,
    logs: Mapping[str, Scalar] | None,
    epoch: Scalar,
    batch: Scalar | None = None,
) -> tuple[CheckpointState, Scalar]:
    """Decide whether to save now.

    Pure, and the same under any transformation. Where all that is looked at are Python
    and numpy values, the results are numpy values and JAX is not called.

    Args:
        state: The state after the call before, or from `CheckpointState.create`.
        logs: The metrics of now, scalars of any numeric dtype. Only the monitored one
            is looked at, and only at a due check with `save_best_only`.
        epoch: Zero-based epoch, i32[].
        batch: Zero-based batch within the epoch, i32[]; None at the end of an epoch.

    Returns:
        The state to pass to the next call, and whether to save, bool[].

    Raises:
        MetricError: A `ValueError`, if the monitored value is not a real scalar.
        SettingError: A `ValueError`, if epoch or batch are no zero-based integers.

    Warns:
        UserWarning: Once for a run, if the monitored key is not in `logs` where it is
            needed. Nothing is saved then: Keras would save, and overwrite the best
            model with one that nobody has validated.

    Example:
        >>> state = CheckpointState.create("loss", save_best_only=True)
        >>> state, save = step(state, {"loss": 0.5}, epoch=0)
        >>> bool(save), float(state.best)
        (True, 0.5)
    """
    if not isinstance(state, CheckpointState):
        raise SettingError(
            "state",
            f"<{type(state).__name__}>",
            "pass a CheckpointState first; step returns one, and whether to save.",
        )
    state, due = tick(state, epoch, batch)
    return judge(state, logs, due)


def tick(
    state: CheckpointState,
    epoch: Any,
    batch: Any,
) -> tuple[CheckpointState, Any]:
    """Count, and tell whether a check is due: the half of `step` that needs no metric.

    The counting follows Keras's `ModelCheckpoint._should_save_on_batch`, but that a due
    check takes `save_freq` from the counter and keeps the remainder.
    """
    if state.save_freq == "epoch":
        return state, np.bool_(batch is None)
    if batch is None:
        return state, np.False_
    epoch, batch = index("epoch", epoch), index("batch", batch)
    counts: tuple[Any, ...] = (
        state.seen, state.batches, state.last_epoch, state.last_batch, epoch, batch
    )  # fmt: skip
    if _HOST_INTS.issuperset(map(type, counts)):
        return _counted(state, map(int, counts), _pick, np.int32)
    with unchecked():
        return _counted(state, map(_to_int32, counts), jnp.where, _to_int32)


def _counted(
    state: CheckpointState, counts: Iterable[Any], where: Where, int32: Any
) -> tuple[CheckpointState, Any]:
    seen, batches, last_epoch, last_batch, epoch, batch = counts
    fresh = (epoch != last_epoch) | (batch <= last_batch)
    added = where(fresh, batch + 1, batch - last_batch)
    room = _INT32_MAX - batches
    seen = seen + added
    due = seen >= state.save_freq
    return with_leaves(
        state,
        seen=int32(seen % state.save_freq),
        batches=int32(batches + where(added < room, added, room)),
        last_epoch=int32(epoch),
        last_batch=int32(batch),
    ), np.bool_(due) if type(due) is bool else due


def judge(
    state: CheckpointState,
    logs: Mapping[str, Any] | None,
    due: Any,
) -> tuple[CheckpointState, Any]:
    """Compare, where a check is due: the half of `step` that needs the metric."""
    if not state.save_best_only or not (isinstance(due, jax.Array) or due):
        return state, due
    with unchecked():
        return _judged(state, logs, due)


def _judged(
    state: CheckpointState, logs: Mapping[str, Any] | None, due: Any
) -> tuple[CheckpointState, Any]:
    traced = isinstance(due, jax.Array)
    value = value_of(logs, state.monitor)
    if value is None:
        if isinstance(due, Tracer) or due:
            _warn_missing(state, logs)
        return state, np.False_
    value = monitored(state.monitor, value)
    best, has_best = _array(state.best_value), _array(state.has_best)
    dtype = np.dtype(best.dtype)
    if traced or any(isinstance(x, jax.Array) for x in (value, best, has_best)):
        where = jnp.where
        value = _flushed(jnp.asarray(value).astype(dtype), where)
        save = due & improves(value, best, has_best, state.mode, state.min_delta, where)
        known = has_best | save
    else:
        where = _pick
        with np.errstate(all="ignore"):
            value = rounded(value, dtype)
            save = improves(value, best, has_best, state.mode, state.min_delta, where)
        known = np.bool_(has_best or save)
    return with_leaves(state, best_value=where(save, value, best), has_best=known), save


def check_state(state: Any, own: CheckpointState) -> None:
    """Check that a state is one of those that begin with `own`.

    Raises:
        SettingError: If it is something else, or of other settings.
    """
    advice = "pass what init, restore or the last update has returned."
    if not isinstance(state, CheckpointState):
        raise SettingError("state", f"<{type(state).__name__}>", advice)
    for name in _SETTINGS:
        given, wanted = getattr(state, name), getattr(own, name)
        if given != wanted:
            raise SettingError(
                "state", state, f"its {name} is {given!r}, here {wanted!r}: {advice}"
            )


def with_leaves(state: CheckpointState, **leaves: Scalar) -> CheckpointState:
    """Return the state with new leaves: `dataclasses.replace`, five times as fast."""
    moved = object.__new__(CheckpointState)
    object.__setattr__(moved, "__dict__", state.__dict__ | leaves)
    return moved


def plain_state(state: CheckpointState) -> dict[str, Any]:
    """Return a state's fields as plain values; a best of None is none.

    Waits for leaves on devices.
    """
    plain = {name: getattr(state, name) for name in _SETTINGS}
    for name in _COUNTERS:
        plain[name] = np.asarray(getattr(state, name)).item()
    has_best = bool(np.asarray(state.has_best))
    plain["best"] = np.asarray(state.best_value).item() if has_best else None
    return plain


def resumed(
    fresh: CheckpointState,
    stored: Mapping[str, Any] | None,
    durable: float | None,
) -> CheckpointState:
    """Return the state to go on with from a checkpoint.

    Args:
        fresh: A state with the settings of now.
        stored: `plain_state` of the state in the checkpoint; None if it has none.
        durable: The best monitored value among the checkpoints on disk; None for none.

    Returns:
        The stored state, under the settings of now. Its best is the best on disk: that
        is what has to be beaten, whether the checkpoint knew of it or not, and a better
        one that the checkpoint knew of was not saved, as after a failed write. Where no
        checkpoint on disk has a value to compare, the stored best counts, if it is that
        of the same metric.
    """
    state = fresh
    if stored is not None:
        state = with_leaves(
            state, **{name: np.int32(stored[name]) for name in _COUNTERS}
        )
    if not state.save_best_only:
        return state
    dtype = np.dtype(_array(state.best_value).dtype)
    better, worse = (min, max) if state.mode == "min" else (max, min)
    known = [_array(fresh.best_value)] if fresh.has_best else []
    if durable is not None:
        best = better([rounded(durable, dtype), *known])
    elif stored is None or stored["best"] is None or not _decides_alike(stored, state):
        return state
    else:
        best = worse([rounded(stored["best"], dtype), *known])
    return with_leaves(state, best_value=best, has_best=np.True_)


def _decides_alike(stored: Mapping[str, Any], state: CheckpointState) -> bool:
    names = ("monitor", "mode", "save_best_only")
    return all(stored[name] == getattr(state, name) for name in names)


def improves(
    value: Any, best: Any, has_best: Any, mode: str, min_delta: float, where: Where
) -> Any:
    """Tell whether `value` is better than `best` by more than `min_delta`.

    Any number is better than no best, and a NaN is never better.
    """
    delta = _flushed(value.dtype.type(min_delta), _pick)
    if mode == "min":
        better = value < _flushed(best - delta, where)
    else:
        better = value > _flushed(best + delta, where)
    return where(has_best, better, value == value)


def monitored(monitor: str, value: Any) -> Any:
    """Check that a monitored value is a real scalar, without waiting for it.

    Args:
        monitor: Its name.
        value: As `_logs.settled` returns it.

    Returns:
        A Python number, a numpy scalar or a JAX array of shape ().

    Raises:
        MetricError: If it is anything else.
    """
    if isinstance(value, numbers.Real):
        return value
    if isinstance(value, str | Unusable):
        problem = "is text" if isinstance(value, str) else value.problem
        advice = "and a monitored value must be a real number."
        raise MetricError(monitor, f"{problem}, {advice}")
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


def _check_settings(
    monitor: str,
    mode: str,
    save_best_only: bool,
    save_freq: Any,
    min_delta: float,
) -> None:
    if not isinstance(monitor, str) or not monitor:
        raise SettingError("monitor", monitor, "pass the name of a key in `logs`.")
    if mode not in ("auto", "min", "max"):
        raise SettingError("mode", mode, 'pass "auto", "min" or "max".')
    if not isinstance(save_best_only, bool | np.bool_):
        raise SettingError("save_best_only", save_best_only, "pass True or False.")
    if save_freq != "epoch" and (
        isinstance(save_freq, bool)
        or not isinstance(save_freq, numbers.Integral)
        or not 1 <= int(save_freq) <= _LARGEST
    ):
        raise SettingError(
            "save_freq",
            save_freq,
            'pass "epoch", or a number of batches of at least 1.',
        )
    if not is_real(min_delta) or not 0 <= min_delta < math.inf:
        raise SettingError("min_delta", min_delta, "pass a number of at least 0.")


def is_real(value: Any) -> bool:
    """Tell whether a value is a real number, and no bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def index(name: str, value: Any) -> Any:
    """Check that epoch or batch is a zero-based integer, as far as is known now."""
    if type(value) is int and 0 <= value < _LARGEST:
        return value
    if isinstance(value, jax.Array):
        if value.shape == () and jnp.issubdtype(value.dtype, jnp.integer):
            return value
    else:
        try:
            value = operator.index(value)
        except TypeError:
            pass
        else:
            if 0 <= value < _LARGEST:
                return value
    raise _not_an_index(name, value)


def _not_an_index(name: str, value: Any) -> SettingError:
    return SettingError(
        name, value, "pass a zero-based integer below 2**30, as a scalar."
    )


def whole(name: str, value: Any) -> int:
    """Return epoch or batch as a number, waiting for a device that computes it.

    Raises:
        SettingError: If it is no zero-based integer.
    """
    value = np.asarray(value)[()] if hasattr(value, "shape") else value
    if isinstance(value, bool | np.bool_):
        raise _not_an_index(name, value)
    return operator.index(index(name, value))


def _array(leaf: Scalar) -> Any:
    """Return a leaf of the state, typed as what it is: an array or numpy scalar."""
    return leaf


def _to_int32(value: Any) -> jax.Array:
    return jnp.asarray(value).astype(jnp.int32)


def _pick(condition: Any, true: Any, false: Any) -> Any:
    """Choose as `numpy.where` does, one value, a hundred times faster."""
    return true if condition else false


def _known_best(value: Any, has_best: Any) -> Any:
    """Return the best of a state, from its two leaves: NaN where there is none.

    Waits for no device, where that is possible: then JAX chooses. It must not where it
    looks for NaNs, nor on arrays of several processes, of which one alone may ask.
    """
    if not hasattr(has_best, "dtype"):  # a spec, say, in the place of a leaf
        return value
    if isinstance(has_best, Tracer) or (
        isinstance(has_best, jax.Array)
        and has_best.is_fully_addressable
        and not typing.cast(Any, has_best).is_ready()
        and not (jax.config.jax_debug_nans or jax.config.jax_debug_infs)  # pyright: ignore
    ):
        return jnp.where(has_best, value, np.dtype(value.dtype).type(math.nan))
    has_best = np.asarray(has_best)
    if has_best.all():
        return value
    return np.where(has_best, value, np.dtype(value.dtype).type(math.nan))[()]


def _flushed(value: Any, where: Where) -> Any:
    """Return zero for a number below the smallest normal one, as XLA may see it."""
    tiny = jnp.finfo(value.dtype).tiny
    return where(abs(value) < tiny, value.dtype.type(0), value)


def _warn_missing(state: CheckpointState, logs: Mapping[str, object] | None) -> None:
    if state._warned.done:
        return
    state._warned.done = True
    there = ", ".join(map(repr, normalized(logs))) or "none"
    warnings.warn(
        f"Nothing is saved: save_best_only needs {state.monitor!r}, and it is not in "
        f"`logs` (keys there are: {there}). Pass the metric, or another `monitor`.",
        stacklevel=outside(),
    )
