"""`Snapshot`: the best trees seen so far, carried by the program itself.

A `Snapshot` needs neither a callback nor a disk. Each slot holds a tree with its epoch,
batch and metrics, and `take` puts a better tree in the place of the worst. Each slot is
a separate tree, so leaves keep their shardings, and a step that takes nothing passes
all slots on as they are.
"""

import numbers
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from flaxckpt._decision.direction import mode_of
from flaxckpt._decision.logs import find
from flaxckpt._decision.moment import Moment
from flaxckpt._decision.scalars import as_number
from flaxckpt._program.best_trees_checks import (
    check_taken,
    checked_logs,
    is_array,
    leaves,
    lines,
    monitor_of,
    one_of,
    shape_dtype,
)
from flaxckpt._program.best_trees_slots import (
    noted,
    place_for,
    put_in,
    put_in_program,
    zeros_like,
)
from flaxckpt._runtime.gone import Shown, check_there, shown
from flaxckpt._runtime.unchecked import as_arguments, runs_unchecked, unchecked
from flaxckpt._trees.ties import has_ties
from flaxckpt.errors import SettingError

_STATIC = {"static": True}
_END, _STEP = -1, -2  # in place of a batch


def _moment_of(epoch: int, batch: int) -> Moment:
    """Return when a tree was taken, from what its slot has."""
    if batch == _STEP:
        return Moment(step=epoch)
    return Moment(epoch, None if batch == _END else batch)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What one slot of a `Snapshot` holds.

    Attributes:
        tree: The tree.
        epoch: Zero-based epoch at which it was taken; None if that was a global step.
        batch: Zero-based batch within the epoch; None at the end of an epoch.
        logs: The metrics at that time.
        step: The global step at which it was taken; None if that was an epoch.
    """

    tree: Any
    epoch: int | None
    batch: int | None
    logs: Mapping[str, Any]
    step: int | None = None


@jax.tree_util.register_dataclass  # pyright: ignore[reportUntypedClassDecorator]
@typing.no_type_check  # unflattening passes specs, shardings and batched leaves too
@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The best trees that a program has seen, as a pytree for the program to carry.

    Make one with `like`, and carry what `take` returns through `scan`, `jit` or `vmap`.
    Afterwards `ModelCheckpoint.save_snapshot` saves the trees.

    Attributes:
        trees: A tree for each slot; zeros in an empty slot.
        values: The monitored value in each slot, f32[keep] (f64[keep] under x64); 0 in
            an empty slot.
        epochs: Zero-based epochs, or global steps, i32[keep]; -1 in an empty slot.
        batches: Zero-based batches, i32[keep]; -1 at the end of an epoch, and in an
            empty slot; -2 beside a global step.
        order: The order in which the trees were taken, i32[keep]; -1 in an empty slot.
        logs: The metrics, each of shape [keep].
        monitor: Key in `logs` of the value to compare. `monitor` and `mode` are static.
        mode: `"min"` or `"max"`.
    """

    trees: tuple[Any, ...]
    values: Any
    epochs: Any
    batches: Any
    order: Any
    logs: dict[str, Any]
    monitor: str = field(metadata=_STATIC)
    mode: str = field(metadata=_STATIC)

    def __repr__(self) -> str:
        return shown(self)

    @classmethod
    def like(
        cls,
        tree: Any,
        logs: Mapping[str, Any],
        keep: int = 1,
        *,
        monitor: str | None = None,
        mode: str = "auto",
    ) -> "Snapshot":
        """Make an empty snapshot.

        Args:
            tree: A tree like those to take, or `jax.ShapeDtypeStruct`s of one, with the
                shardings of the slots. Under `jit` the compiler chooses the shardings;
                make the snapshot outside to choose them.
            logs: Metrics like those to take, or structs of them: scalars.
            keep: How many trees to keep. Each needs the memory of one tree.
            monitor: Key in `logs` of the value to compare. None for `val_loss`, or
                for the only metric.
            mode: `"min"`, `"max"`, or `"auto"` to tell from the name of `monitor`.

        Returns:
            The snapshot.

        Raises:
            SettingError: A `ValueError`, if a setting cannot work, or if the direction
                of `monitor` is not known.
            MetricError: A `ValueError`, if one of `logs` is not a real scalar.

        Example:
            >>> snapshot = Snapshot.like({"w": np.zeros(2)}, {"loss": 0.0})
            >>> for epoch, loss in enumerate([0.5, 0.25, 0.75]):
            ...     tree = {"w": np.full(2, loss)}
            ...     snapshot = snapshot.take(True, tree, {"loss": loss}, epoch)
            >>> snapshot.entries()[0].epoch
            1
        """
        if isinstance(keep, bool) or not isinstance(keep, numbers.Integral) or keep < 1:
            raise SettingError("keep", keep, "pass a number of trees of at least 1.")
        logs = checked_logs(logs)
        monitor = monitor_of(logs) if monitor is None else find(logs, monitor)
        if monitor not in logs:
            raise SettingError("monitor", monitor, f"pass {one_of(logs)}.")
        mode = mode_of(monitor, mode)
        if has_ties(tree):
            raise SettingError(
                "tree",
                Shown(type(tree).__name__),
                "a part of it is in two places, and JAX would make two of it. Pass "
                "nnx.state(model), here and to take.",
            )
        if unfit := [
            f"{path}: a {type(leaf).__name__}"
            for path, leaf in leaves(tree)
            if not is_array(leaf)
        ]:
            raise SettingError(
                "tree",
                Shown(type(tree).__name__),
                f"its leaves must be arrays or numbers.{lines(unfit)}",
            )
        none = np.full(keep, -1, np.int32)
        with unchecked():
            trees = tuple(jax.tree.map(zeros_like, tree) for _ in range(keep))
        snapshot = cls(
            trees=trees,
            values=np.zeros(keep, jax.dtypes.canonicalize_dtype(np.float64)),
            epochs=none,
            batches=none.copy(),
            order=none.copy(),
            logs={name: np.zeros(keep, shape_dtype(logs[name])[1]) for name in logs},
            monitor=monitor,
            mode=mode,
        )
        return as_arguments(snapshot)

    def take(
        self,
        save: Any,
        tree: Any,
        logs: Mapping[str, Any],
        epoch: Any = None,
        batch: Any = None,
        *,
        step: Any = None,
    ) -> "Snapshot":
        """Keep a tree if `save` is true and the tree is among the best.

        The function is pure, and the same under any transformation. A tie does not
        displace a tree that was taken before, and a NaN is never taken. A call that
        takes nothing copies nothing, except under `vmap`, where each member decides for
        itself. Outside of a trace the call waits for the monitored value.

        Args:
            save: Whether to save, bool[]: True, or what `step` has decided.
            tree: The tree, with the structure, shapes and dtypes given to `like`.
            logs: The current metrics, with the keys given to `like`.
            epoch: Zero-based epoch, i32[].
            batch: Zero-based batch within the epoch, i32[]; None at the end of one.
            step: A global step, i32[], in place of epoch and batch.

        Returns:
            The snapshot to go on with.

        Raises:
            MetricError: A `ValueError`, if the monitored value is missing, or if a
                metric is not a real scalar or does not fit its dtype in `like`.
            SettingError: A `ValueError`, if tree or logs are not as given to `like`, or
                if epoch, batch or step is not a zero-based integer, or if there is
                neither an epoch nor a step, or both.
        """
        at = Moment(epoch, batch, step)
        return as_arguments(self._taken(save, tree, logs, at))

    @runs_unchecked
    def _taken(
        self, save: Any, tree: Any, logs: Mapping[str, Any], at: Moment
    ) -> "Snapshot":
        logs = check_taken(self, save, tree, logs)
        at.check()
        if at.step is None:
            epoch, batch = at.epoch, _END if at.batch is None else at.batch
        else:
            epoch, batch = at.step, _STEP
        told = (self.values, self.order, save, epoch, batch, dict(logs))
        # Under an outer trace, some of these may be concrete values.
        traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((told, tree)))
        traced |= any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(self.trees))
        xp = jnp if traced else np
        if not traced and not bool(save):
            return self
        value, is_better, place = place_for(self, logs[self.monitor], xp)
        take = is_better & xp.asarray(save, bool)
        if not traced and not take:
            return self
        at_slot = np.arange(len(self.trees), dtype=np.int32) == place
        put = put_in_program if traced else put_in
        old = (self.values, self.epochs, self.batches, self.order, self.logs)
        new = (value, epoch, batch, at_slot, dict(logs))
        if traced:
            told = jax.lax.cond(take, noted, lambda old, _: old, old, new)
        else:
            told = noted(old, new, np)
        values, epochs, batches, order, told_logs = told
        return replace(
            self,
            trees=tuple(
                put(take & at_slot[slot], tree, old)
                for slot, old in enumerate(self.trees)
            ),
            values=values,
            epochs=epochs,
            batches=batches,
            order=order,
            logs=told_logs,
        )

    @runs_unchecked
    def entries(self, member: int | None = None) -> list[Kept]:
        """Return what is kept, best first; on the host, outside of any trace.

        Args:
            member: Index of the ensemble's member, for a snapshot made under `vmap`;
                otherwise None.

        Returns:
            For each filled slot, a record of its tree, epoch, batch, step and logs.

        Raises:
            SettingError: A `ValueError`, if there is no such member, if `member` is
                None for an ensemble, or if the call is in a trace.
        """
        check_there("snapshot", leaves(self))
        one = self._member(member)
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(one)):
            raise SettingError(
                "snapshot",
                Shown("<traced>"),
                "its entries are known when the program has run. Return it from there.",
            )
        sign = 1 if self.mode == "min" else -1
        values, order = sign * np.asarray(one.values), np.asarray(one.order)
        filled = [slot for slot in range(len(one.trees)) if order[slot] >= 0]
        filled.sort(key=lambda slot: (values[slot], order[slot]))
        logs = {name: np.asarray(value) for name, value in one.logs.items()}
        epochs, batches = np.asarray(one.epochs), np.asarray(one.batches)
        return [
            Kept(
                tree=one.trees[slot],
                logs={name: value[slot].item() for name, value in logs.items()},
                **_moment_of(int(epochs[slot]), int(batches[slot]))._asdict(),
            )
            for slot in filled
        ]

    def _member(self, member: int | None) -> "Snapshot":
        """Return the snapshot of one member, or this one if it has no members."""
        batched = self.order.shape[:-1]
        if not batched and member is None:
            return self
        shown = Shown(repr(member))
        if len(batched) > 1:
            raise SettingError(
                "member",
                shown,
                f"the snapshot was batched {len(batched)} times: {batched}. Make one "
                "axis of them first, with jax.tree.map and reshape.",
            )
        if not batched:
            raise SettingError(
                "member", shown, "the snapshot belongs to no ensemble. Leave it out."
            )
        number = as_number(member, otherwise=-1)
        if not 0 <= number < batched[0]:
            raise SettingError(
                "member",
                shown,
                f"the snapshot belongs to an ensemble of {batched[0]}. Pass the index "
                f"of a member: 0 to {batched[0] - 1}.",
            )
        return jax.tree.map(lambda leaf: leaf[number], self)
