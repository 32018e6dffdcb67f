"""`CheckpointState`, the small pytree over which the decision is a pure function.

Nothing here knows of disks or of Orbax. `step` runs eagerly, where Python and numpy
values give numpy values and dispatch nothing to JAX. It also runs under `jit`, `scan`,
`vmap` and `shard_map`, where it is a handful of scalar operations.

The comparison is in float32 (float64 under x64) everywhere. Numbers below the smallest
normal one count as zero, because XLA treats them so on some devices. So all ways to
call `step` agree to the bit.
"""

import math
import numbers
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from flaxckpt._decision.direction import mode_of
from flaxckpt._decision.logs import SURROGATES, has_surrogates, rounded
from flaxckpt._decision.scalars import LARGEST, Scalar, array, is_real
from flaxckpt._runtime.gone import check_there, shown
from flaxckpt._runtime.unchecked import as_arguments
from flaxckpt.errors import SettingError

_COUNTERS = ("seen", "batches", "last_epoch", "last_batch")
BEST = ("best_value", "has_best")
_MET = ("met_value", "has_met")
LEAVES = (*BEST, *_COUNTERS, *_MET, "stale")
_SETTINGS = ("monitor", "mode", "save_best_only", "save_freq", "min_delta")


class _Once:
    """Remembers that a run was warned. All are equal, so none causes a retrace."""

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
@typing.no_type_check  # unflattening passes specs, shardings and batched leaves, too
@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """What the decision remembers from call to call, as a pytree.

    Make one with `create`. A program can carry it through `scan`, batch it by `vmap`,
    and pass it to and return it from `jit`. The settings are static, so a call with the
    same settings never compiles anew.

    Attributes:
        best: Best monitored value so far, f32[] (f64[] under x64); NaN while there is
            none. Changes only under `save_best_only`. Made of the two leaves below.
        best_value: The leaf behind `best`, but zero while there is no best: no leaf is
            a NaN, because `jax_debug_nans` would end a program there.
        has_best: Whether there is a best, bool[].
        seen: Batches counted toward the next due check, i32[]. Like the next three
            leaves, it changes only if `save_freq` is a number. (Those three change too
            where `ModelCheckpoint` goes by the clock.)
        batches: Batches seen in all, or the last global step, i32[]; stays at the
            largest i32 once it is there.
        last_epoch: Epoch of the last batch seen, i32[]; -1 before the first.
        last_batch: Index of that batch in its epoch, i32[]; -1 before the first.
        stale: Due checks since the monitored value last improved, i32[]: what early
            stopping waits for. A check counts where `logs` have the value, with
            `save_best_only` or without. Without it, the improvement is on the best
            value that a due check has met, and nothing counts while `mode` is `"auto"`.
            Within `vmap`, `ModelCheckpoint.update` does not count a value that differs
            between the members, nor does `step` within `shard_map` count one that
            differs between the shards, if they share the state.
        met_value: That best value, f32[] (f64[] under x64). It stays zero under
            `save_best_only`, where `best` has this place.
        has_met: Whether there is such a value, bool[].
        monitor: Key in `logs` of the value to compare. Static, as all fields below are.
        mode: `"min"` or `"max"`; `"auto"` if the direction is neither known nor needed.
        save_best_only: Whether a due check saves only what improves on `best`.
        save_freq: `"epoch"`, or the number of batches between due checks.
        min_delta: An improvement must be larger than this.
    """

    # This order is the order of the leaves.
    best_value: Scalar
    has_best: Scalar
    seen: Scalar
    batches: Scalar
    last_epoch: Scalar
    last_batch: Scalar
    met_value: Scalar
    has_met: Scalar
    stale: Scalar
    monitor: str = field(metadata=_STATIC)
    mode: str = field(metadata=_STATIC)
    save_best_only: bool = field(metadata=_STATIC)
    save_freq: str | int = field(metadata=_STATIC)
    min_delta: float = field(metadata=_STATIC)
    _warned: _Once = field(metadata=_STATIC, default_factory=_Once, repr=False)

    def __repr__(self) -> str:
        return shown(self)

    @property
    def best(self) -> Any:
        """Best monitored value so far; NaN while there is none."""
        check_values(self, BEST)
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

        Keras's `ModelCheckpoint` has the same arguments, except `min_delta`. The leaves
        are numpy scalars, in the precision that JAX is set to now.

        Args:
            monitor: Key in `logs` of the value to compare.
            mode: `"min"`, `"max"`, or `"auto"` to tell from the name of `monitor`.
            save_best_only: Save at a due check only what improves on the best.
            save_freq: With `"epoch"`, a check is due at the end of each epoch. With a
                number, a check is due every so many batches.
            initial_value_threshold: The best to improve on at first; None for no best.
                It has no effect without `save_best_only`.
            min_delta: An improvement must be larger than this.

        Returns:
            The state.

        Raises:
            SettingError: A `ValueError`, if a setting cannot work, or if the direction
                of `monitor` is needed but not known.

        Example:
            >>> state = CheckpointState.create("val_accuracy", save_best_only=True)
            >>> state.mode
            'max'
        """
        _check_settings(monitor, save_best_only, save_freq, min_delta)
        mode = mode_of(monitor, mode, is_needed=save_best_only)
        threshold = initial_value_threshold
        if threshold is not None and (not is_real(threshold) or math.isnan(threshold)):
            advice = "pass a number to improve on, or None for none."
            raise SettingError("initial_value_threshold", threshold, advice)
        dtype = jax.dtypes.canonicalize_dtype(np.float64)
        state = cls(
            best_value=rounded(0 if threshold is None else threshold, dtype),
            has_best=np.bool_(threshold is not None),
            seen=np.int32(0),
            batches=np.int32(0),
            last_epoch=np.int32(-1),
            last_batch=np.int32(-1),
            met_value=np.dtype(dtype).type(0),
            has_met=np.False_,
            stale=np.int32(0),
            monitor=monitor,
            mode=mode,
            save_best_only=bool(save_best_only),
            save_freq=save_freq if save_freq == "epoch" else int(save_freq),
            min_delta=float(min_delta),
        )
        return as_arguments(state)


def check_state(state: Any, own: CheckpointState) -> None:
    """Check that a state has the settings of `own`, and values.

    Raises:
        SettingError: If it is no state, has other settings, is that of several members
            of `vmap`, or has a deleted leaf.
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
    for name in LEAVES:
        if math.prod(getattr(getattr(state, name), "shape", ())) != 1:
            raise SettingError(
                "state", state, f"its {name} has an axis, as vmap returns it: {advice}"
            )
    check_values(state)


def check_values(state: CheckpointState, names: Iterable[str] = LEAVES) -> None:
    """Check that leaves of a state were not deleted or donated.

    Raises:
        SettingError: If one was.
    """
    check_there("state", ((name, getattr(state, name)) for name in names))


def with_leaves(state: CheckpointState, **leaves: Scalar) -> CheckpointState:
    """Return the state with new leaves, five times as fast as `dataclasses.replace`."""
    moved = object.__new__(CheckpointState)
    object.__setattr__(moved, "__dict__", state.__dict__ | leaves)
    return moved


def compared(state: CheckpointState) -> tuple[str, str]:
    """Name the leaves of the value to improve on, and of whether there is one."""
    return BEST if state.save_best_only else _MET


def judged(state: CheckpointState) -> tuple[str, ...]:
    """Name the leaves that comparing a metric changes.

    Without `save_best_only` no decision depends on them.
    """
    return (*compared(state), "stale")


def with_judged(state: CheckpointState, leaves: Iterable[Any]) -> CheckpointState:
    """Return the state with new leaves for those that `judged` names."""
    return with_leaves(state, **dict(zip(judged(state), leaves, strict=True)))


def plain_state(state: CheckpointState) -> dict[str, Any]:
    """Return a state's fields as plain values; None stands for no best, and none met.

    It waits for leaves on devices.
    """
    plain = {name: getattr(state, name) for name in _SETTINGS}
    for name in (*_COUNTERS, "stale"):
        plain[name] = np.asarray(getattr(state, name)).item()
    for name, (value, is_there) in (("best", BEST), ("met", _MET)):
        has_value = bool(np.asarray(getattr(state, is_there)))
        plain[name] = np.asarray(getattr(state, value)).item() if has_value else None
    return plain


def resumed(
    fresh: CheckpointState, stored: Mapping[str, Any] | None, durable: float | None
) -> CheckpointState:
    """Return the state with which a run goes on from a checkpoint.

    Args:
        fresh: A new state with the present settings.
        stored: `plain_state` of the state in the checkpoint; None if it has none.
        durable: The best monitored value among the checkpoints on disk; None for none.

    Returns:
        The stored counters under the present settings. The best is the best on disk, or
        the initial threshold if that is better. A stored best that is better than both
        does not count: its save failed. If no checkpoint on disk has a value to
        compare, the best is the stored best, or the initial threshold if that is worse.
        A stored best of another metric does not count, nor do the checks since.
    """
    state, dtype = fresh, np.dtype(array(fresh.best_value).dtype)
    if stored is not None:
        state = with_leaves(
            state, **{name: np.int32(stored[name]) for name in _COUNTERS}
        )
        if _decides_alike(stored, state):
            state = with_leaves(state, stale=np.int32(stored["stale"]))
            if (met := stored["met"]) is not None:
                met = rounded(met, dtype)
                state = with_leaves(state, met_value=met, has_met=np.True_)
    if not state.save_best_only:
        return state
    better, worse = (min, max) if state.mode == "min" else (max, min)
    known = [array(fresh.best_value)] if fresh.has_best else []
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


def _check_settings(
    monitor: str, save_best_only: bool, save_freq: Any, min_delta: float
) -> None:
    if not isinstance(monitor, str) or not monitor:
        raise SettingError("monitor", monitor, "pass the name of a key in `logs`.")
    if has_surrogates(monitor):
        raise SettingError("monitor", monitor, f"it has {SURROGATES}")
    if not isinstance(save_best_only, bool | np.bool_):
        raise SettingError("save_best_only", save_best_only, "pass True or False.")
    if save_freq != "epoch" and (
        isinstance(save_freq, bool)
        or not isinstance(save_freq, numbers.Integral)
        or not 1 <= int(save_freq) <= LARGEST
    ):
        advice = 'pass "epoch", or a number of batches of at least 1.'
        raise SettingError("save_freq", save_freq, advice)
    if not is_real(min_delta) or not 0 <= min_delta < math.inf:
        raise SettingError("min_delta", min_delta, "pass a number of at least 0.")


def _known_best(value: Any, has_best: Any) -> Any:
    """Return the best of a state from its two leaves, or NaN if there is none.

    JAX chooses while a device still computes `has_best`, so that the caller need not
    wait. JAX must not choose where it checks for NaNs, nor on arrays of several
    processes, since one process alone may ask.
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
