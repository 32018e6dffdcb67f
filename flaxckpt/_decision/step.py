"""`step`: count, tell whether a check is due, and compare the metric if so."""

import contextlib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from flaxckpt._decision.logs import normalized, peeked, rounded, value_of
from flaxckpt._decision.moment import Moment
from flaxckpt._decision.scalars import (
    LARGEST,
    Scalar,
    Where,
    array,
    flushed,
    improves,
    index,
    monitored,
    pick,
    to_int32,
)
from flaxckpt._decision.state import (
    CheckpointState,
    check_values,
    compared,
    with_leaves,
)
from flaxckpt._runtime.frames import outside
from flaxckpt._runtime.traces import varying_axes
from flaxckpt._runtime.unchecked import unchecked
from flaxckpt.errors import CheckpointError, SettingError

_INT32_MAX = 2**31 - 1
_FLOATS = frozenset((float, np.float32, np.float64))
_HOST_INTS = frozenset((int, np.int32, np.int64))


def step(
    state: CheckpointState,
    logs: Mapping[str, Scalar] | None,
    epoch: Scalar | None = None,
    batch: Scalar | None = None,
    *,
    step: Scalar | None = None,
) -> tuple[CheckpointState, Scalar]:
    """Decide whether to save now.

    It is pure, and the same under any transformation. If all values that it looks at
    are Python or numpy values, it returns numpy values and does not call JAX.

    Args:
        state: The state that the last call returned, or `CheckpointState.create`.
        logs: The present metrics, scalars of any numeric dtype. `step` looks only at
            the monitored one, and only at a due check.
        epoch: Zero-based epoch, i32[].
        batch: Zero-based batch within the epoch, i32[]; None at the end of an epoch.
        step: A global step, i32[], in place of epoch and batch. With `save_freq=N` a
            check is due at each multiple of N, and at a step that passes one.

    Returns:
        The state to pass to the next call, and whether to save, bool[].

    Raises:
        MetricError: A `ValueError`, if `save_best_only` needs the monitored value, and
            it is not a real scalar.
        SettingError: A `ValueError`, if `state` is no state or was deleted, if `logs`
            is no mapping, if epoch, batch or step is no such integer, or if a step
            comes where `save_freq` is `"epoch"`. `step` checks `logs`, epoch and batch
            only where it needs them.

    Warns:
        UserWarning: Once in a run, if the monitored key is needed and not in `logs`.
            Nothing is saved then. Keras would save, and overwrite the best model with
            one that nobody has validated.

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
    if step is not None or epoch is None:
        Moment(epoch, batch, step).check()
        need_steps(state)
    state, due = tick(state, epoch, batch, step)
    return judge(state, logs, due)


def need_steps(state: CheckpointState) -> None:
    """Check that global steps can make a check due.

    Raises:
        SettingError: If `save_freq` goes by epochs.
    """
    if state.save_freq == "epoch":
        advice = "calls with a step have no epochs. Pass a number of steps."
        raise SettingError("save_freq", "epoch", advice)


def tick(
    state: CheckpointState, epoch: Any, batch: Any, step: Any = None
) -> tuple[CheckpointState, Any]:
    """Count, and tell whether a check is due: the half of `step` that needs no metric.

    The counting follows Keras's `ModelCheckpoint._should_save_on_batch`, except that a
    due check takes `save_freq` from the counter and keeps the remainder.
    """
    if step is not None:
        return _at_step(state, step)
    if state.save_freq == "epoch":
        return state, np.bool_(batch is None)
    if batch is None:
        return state, np.False_
    epoch, batch = index("epoch", epoch), index("batch", batch)
    counts: tuple[Any, ...] = (
        state.seen, state.batches, state.last_epoch, state.last_batch, epoch, batch
    )  # fmt: skip
    if _HOST_INTS.issuperset(map(type, counts)):
        return _counted(state, map(int, counts), pick, np.int32)
    check_values(state)
    with unchecked():
        return _counted(state, map(to_int32, counts), jnp.where, to_int32)


def count_batches(state: CheckpointState, epoch: Any, batch: Any) -> CheckpointState:
    """Count a batch as `tick` does, where only the clock makes a check due."""
    counted, _ = tick(with_leaves(state, save_freq=LARGEST), epoch, batch)
    names = ("batches", "last_epoch", "last_batch")
    return with_leaves(state, **{name: getattr(counted, name) for name in names})


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


def _at_step(state: CheckpointState, step: Any) -> tuple[CheckpointState, Any]:
    """Count as `tick` does, by a global step.

    The steps since the last one seen, or all of them if the step is below that one,
    add up as batches do. Counted from step 0, what a due check leaves over is the rest
    of a division: so a check is due where a multiple of `save_freq` is reached.
    """
    if state.save_freq == "epoch":
        return state, np.False_
    counts: tuple[Any, ...] = state.batches, index("step", step)
    if _HOST_INTS.issuperset(map(type, counts)):
        return _advanced(state, map(int, counts), pick, np.int32)
    check_values(state)
    with unchecked():
        return _advanced(state, map(to_int32, counts), jnp.where, to_int32)


def _advanced(
    state: CheckpointState, counts: Iterable[Any], where: Where, int32: Any
) -> tuple[CheckpointState, Any]:
    last, step = counts
    every = state.save_freq
    due = step // every > where(step < last, 0, last) // every
    moved = with_leaves(state, seen=int32(step % every), batches=int32(step))
    return moved, np.bool_(due) if type(due) is bool else due


def judge(
    state: CheckpointState, logs: Mapping[str, Any] | None, due: Any
) -> tuple[CheckpointState, Any]:
    """Compare the metric if a check is due: the half of `step` that needs it."""
    if not (isinstance(due, jax.Array) or due):
        return state, due
    if not state.save_best_only:
        return _counted_stale(state, logs, due), due
    check_values(state)
    with unchecked():
        value = value_of(logs, state.monitor)
        if value is None:
            if isinstance(due, Tracer) or due:
                _warn_missing(state, logs)
            return state, np.False_
        return _judged(state, monitored(state.monitor, value), due)


def value_to_count(
    state: CheckpointState, logs: Mapping[str, Any] | None
) -> Scalar | None:
    """Return the value by which a due check counts as stale or not; None for none.

    For states without `save_best_only`, whose decision does not need it: the direction
    may not be known, and the value may be missing, or no real scalar.

    Returns:
        A JAX array of shape (), or a numpy scalar of the dtype in which it is compared.
    """
    if state.mode == "auto":
        return None
    with contextlib.suppress(CheckpointError):
        value = peeked(logs, state.monitor)
        if value is not None:
            return _comparable(state, monitored(state.monitor, value))
    return None


def _comparable(state: CheckpointState, value: Any) -> Any:
    """Return a monitored value as a JAX array, or rounded if it is one of the host."""
    if isinstance(value, jax.Array):
        return value
    return rounded(value, np.dtype(array(state.best_value).dtype))


def _kept_finite(state: CheckpointState, value: Any, where: Where) -> Any:
    """Return the largest number for infinity where the value is only counted.

    A run that does not ask for the best may begin with an infinite metric, and a leaf
    that is infinite would end its programs under `jax_debug_infs`.
    """
    if state.save_best_only:
        return value
    largest = value.dtype.type(jnp.finfo(value.dtype).max)
    value = where(value > largest, largest, value)
    return where(value < -largest, -largest, value)


def _counted_stale(
    state: CheckpointState, logs: Mapping[str, Any] | None, due: Any
) -> CheckpointState:
    value = value_to_count(state, logs)
    if value is None or _varies((value, due), state.stale):
        return state
    check_values(state)
    with unchecked():
        return _judged(state, value, due)[0]


def _varies(values: Iterable[Any], beside: Any) -> bool:
    """Tell whether values differ between shards of `shard_map` that share another."""
    shared = varying_axes(beside)
    return any(not varying_axes(each) <= shared for each in values)


def _judged(
    state: CheckpointState, value: Any, due: Any
) -> tuple[CheckpointState, Any]:
    """Compare the monitored value with the best one; return whether it improves."""
    names = compared(state)
    best, has_best, stale = (array(getattr(state, n)) for n in (*names, "stale"))
    dtype = np.dtype(best.dtype)
    if any(isinstance(x, jax.Array) for x in (due, value, best, has_best, stale)):
        where, due = jnp.where, jnp.asarray(due)
        value = jnp.asarray(_comparable(state, value))
        value = _kept_finite(state, flushed(value.astype(dtype), where), where)
        better = improves(value, best, has_best, state.mode, state.min_delta, where)
        better = due & better
        known = has_best | better
        stale = to_int32(stale)
        stale = where(due & (stale < _INT32_MAX), stale + 1, stale)
        stale = where(better, jnp.int32(0), stale)
    else:
        where = pick
        value = _kept_finite(state, _comparable(state, value), where)
        with np.errstate(all="ignore"):
            better = improves(value, best, has_best, state.mode, state.min_delta, where)
        known = np.bool_(has_best or better)
        stale = np.int32(0) if better else _one_more(stale)
    leaves = dict(zip(names, (where(better, value, best), known), strict=True))
    return with_leaves(state, stale=stale, **leaves), better


def _one_more(stale: Any) -> np.int32:
    return np.int32(min(int(stale) + 1, _INT32_MAX))


def without_improvement(state: CheckpointState, logs: Any) -> CheckpointState | None:
    """Return the state after a due check that finds no new best by one comparison.

    A value that is not better than the best is no improvement, however it is rounded
    and whatever `min_delta` is. The result is None if `judge` must look at arrays, or
    at values that may deserve a warning.
    """
    if type(state.stale) is not np.int32 or not _is_no_better(state, logs):
        return None
    return with_leaves(state, stale=_one_more(state.stale))


def _is_no_better(state: CheckpointState, logs: Any) -> bool:
    best = array(state.best_value)
    if type(best) not in _FLOATS or state.has_best is not np.True_:
        return False
    if type(logs) is not dict or type(logs.get(state.monitor)) not in _FLOATS:
        return False
    for name, value in logs.items():
        if type(value) not in _FLOATS or type(name) is not str or not name.isascii():
            return False
    value, best = float(logs[state.monitor]), float(best)
    return not (value < best if state.mode == "min" else value > best)


def _warn_missing(state: CheckpointState, logs: Mapping[str, object] | None) -> None:
    if state._warned.done:
        return
    state._warned.done = True
    there = ", ".join(map(repr, normalized(logs))) or "none"
    warnings.warn(
        f"Nothing is saved as the best: save_best_only needs {state.monitor!r}, and it "
        f"is not in `logs` (keys there are: {there}). Pass the metric, or another "
        "`monitor`.",
        stacklevel=outside(),
    )
