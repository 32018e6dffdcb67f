"""The best trees seen so far, carried by the program itself.

A `Snapshot` needs neither a callback nor a disk: each of its slots holds a tree and
what is known of it, and `take` puts a better one in the place of the worst. Each slot
is a tree of its own, so that leaves keep their shardings, and a step that does not save
passes all of them on as they are.
"""

import numbers
import operator
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from flaxckpt._direction import direction
from flaxckpt._logs import Unusable, find, normalized
from flaxckpt._memory import beside, is_offloaded, zeros
from flaxckpt._state import _flushed, improves, index, monitored
from flaxckpt._ties import has_ties
from flaxckpt._unchecked import as_arguments, runs_unchecked, unchecked
from flaxckpt.errors import MetricError, SettingError

_STATIC = {"static": True}
_ORDERED = (jnp.bool_, jnp.integer, jnp.floating)  # each holds what the ones before do
_SHOWN = 8  # leaves that an error lists


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What one slot of a `Snapshot` holds.

    Attributes:
        tree: The tree.
        epoch: Zero-based epoch at which it was taken.
        batch: Zero-based batch within it; None at the end of an epoch.
        logs: The metrics at that time.
    """

    tree: Any
    epoch: int
    batch: int | None
    logs: Mapping[str, Any]


@jax.tree_util.register_dataclass  # pyright: ignore[reportUntypedClassDecorator]
@typing.no_type_check  # unflattening passes specs, shardings and batched leaves too
@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The best trees that a program has seen, as a pytree for it to carry.

    Make one with `like`, and give it what `take` returns through `scan`, `jit` or
    `vmap`; `ModelCheckpoint.save_snapshot` saves what it holds afterwards.

    Attributes:
        trees: A tree for each slot; zeros where nothing was taken yet.
        values: The monitored value in each slot, f32[keep] (f64[keep] under x64); 0
            where nothing was taken yet.
        epochs: Zero-based epochs, i32[keep]; -1 where nothing was taken.
        batches: Zero-based batches, i32[keep]; -1 at the end of an epoch.
        order: Which was taken before which, i32[keep]; -1 where nothing was taken.
        logs: The metrics, each of shape [keep].
        monitor: Key in `logs` of the value to compare. Static, as is `mode`.
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
        """Make a snapshot that holds nothing yet.

        Args:
            tree: What will be taken, or `jax.ShapeDtypeStruct`s of it, with shardings
                if it has some. Under `jit` the compiler chooses the shardings of the
                slots; make the snapshot outside to choose them.
            logs: The metrics that will come with it, or structs of them: scalars.
            keep: How many trees to keep. Each takes the memory of one.
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
        logs = _checked_logs(logs)
        monitor = _monitor_of(logs) if monitor is None else find(logs, monitor)
        if monitor not in logs:
            raise SettingError("monitor", monitor, f"pass {_one_of(logs)}.")
        if mode not in ("auto", "min", "max"):
            raise SettingError("mode", mode, 'pass "auto", "min" or "max".')
        known = direction(monitor) if mode == "auto" else mode
        if known is None:
            raise SettingError(
                "monitor",
                monitor,
                "whether this metric is better low or high is not known by its name. "
                'Pass mode="min" or mode="max".',
            )
        if has_ties(tree):
            raise SettingError(
                "tree",
                _Shown(type(tree).__name__),
                "a part of it is in two places, and JAX would make two of it. Pass "
                "nnx.state(model), here and to take.",
            )
        if unfit := [
            f"{path}: a {type(leaf).__name__}"
            for path, leaf in _leaves(tree)
            if not _is_array(leaf)
        ]:
            raise SettingError(
                "tree",
                _Shown(type(tree).__name__),
                f"its leaves must be arrays or numbers.{_lines(unfit)}",
            )
        none = np.full(keep, -1, np.int32)
        with unchecked():
            trees = tuple(jax.tree.map(_zeros, tree) for _ in range(keep))
        snapshot = cls(
            trees=trees,
            values=np.zeros(keep, jax.dtypes.canonicalize_dtype(np.float64)),
            epochs=none,
            batches=none.copy(),
            order=none.copy(),
            logs={name: np.zeros(keep, _form(logs[name])[1]) for name in logs},
            monitor=monitor,
            mode=known,
        )
        return as_arguments(snapshot)

    def take(
        self,
        save: Any,
        tree: Any,
        logs: Mapping[str, Any],
        epoch: Any,
        batch: Any = None,
    ) -> "Snapshot":
        """Keep a tree, if it is to be saved and is among the best.

        Pure, and the same under any transformation. A tie is no improvement on what was
        taken before, and a NaN is never taken. A step that takes nothing copies
        nothing, but under `vmap`, where the members decide one by one. Outside of a
        trace it waits for the monitored value.

        Args:
            save: Whether to save, bool[]: True, or what `step` has decided.
            tree: What to keep: of the structure, shapes and dtypes given to `like`.
            logs: The metrics of now, with the keys given to `like`.
            epoch: Zero-based epoch, i32[].
            batch: Zero-based batch within the epoch, i32[]; None at the end of one.

        Returns:
            The snapshot to go on with.

        Raises:
            MetricError: A `ValueError`, if the monitored value is not there or not a
                real scalar.
            SettingError: A `ValueError`, if tree or logs are not as given to `like`, or
                epoch or batch are no zero-based integers.
        """
        return as_arguments(self._taken(save, tree, logs, epoch, batch))

    @runs_unchecked
    def _taken(
        self, save: Any, tree: Any, logs: Mapping[str, Any], epoch: Any, batch: Any
    ) -> "Snapshot":
        logs = self._check(save, tree, logs)
        epoch = index("epoch", epoch)
        batch = -1 if batch is None else index("batch", batch)
        told = (self.values, self.order, save, epoch, batch, dict(logs))
        # Under an outer trace, what is known can be kept with what is not.
        traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((told, tree)))
        traced |= any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(self.trees))
        xp = jnp if traced else np
        if not traced and not bool(save):
            return self
        value, is_better, at = _place(self, logs[self.monitor], xp)
        take = is_better & xp.asarray(save, bool)
        if not traced and not take:
            return self
        at_slot = np.arange(len(self.trees), dtype=np.int32) == at
        put = _put_in_program if traced else _put
        old = (self.values, self.epochs, self.batches, self.order, self.logs)
        new = (value, epoch, batch, at_slot, dict(logs))
        if traced:
            told = jax.lax.cond(take, _noted, lambda old, _: old, old, new)
        else:
            told = _noted(old, new, np)
        values, epochs, batches, order, told_logs = told
        return Snapshot(
            trees=tuple(
                put(take & at_slot[slot], tree, old)
                for slot, old in enumerate(self.trees)
            ),
            values=values,
            epochs=epochs,
            batches=batches,
            order=order,
            logs=told_logs,
            monitor=self.monitor,
            mode=self.mode,
        )

    @runs_unchecked
    def entries(self, member: int | None = None) -> list[Kept]:
        """Return what is kept, best first; on the host, outside of any trace.

        Args:
            member: Which member's, if the snapshot is that of an ensemble under `vmap`.

        Returns:
            A record for each slot that is filled: its tree, epoch, batch and logs.

        Raises:
            SettingError: A `ValueError`, if `member` is needed and not given, or given
                and not there.
        """
        one = self._member(member)
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(one)):
            raise SettingError(
                "snapshot",
                _Shown("<traced>"),
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
                epoch=int(epochs[slot]),
                batch=int(batches[slot]) if batches[slot] >= 0 else None,
                logs={name: value[slot].item() for name, value in logs.items()},
            )
            for slot in filled
        ]

    def _member(self, member: int | None) -> "Snapshot":
        """Return the snapshot of one member, or this one if it has no members."""
        batched = self.order.shape[:-1]
        if not batched and member is None:
            return self
        shown = _Shown(repr(member))
        if len(batched) > 1:
            raise SettingError(
                "member",
                shown,
                f"the snapshot was batched {len(batched)} times: {batched}. Make one "
                "axis of them first, with jax.tree.map and reshape.",
            )
        if not batched:
            raise SettingError(
                "member", shown, "the snapshot is not one of an ensemble. Leave it out."
            )
        try:
            number = -1 if member is None else operator.index(member)
        except TypeError:
            number = -1
        if not 0 <= number < batched[0]:
            raise SettingError(
                "member",
                shown,
                f"the snapshot is that of an ensemble of {batched[0]}. Pass the index "
                f"of a member: 0 to {batched[0] - 1}.",
            )
        return jax.tree.map(lambda leaf: leaf[number], self)

    def _check(
        self, save: Any, tree: Any, logs: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Check what is to be taken, and return the metrics in one form."""
        if self.order.ndim != 1:
            raise SettingError(
                "snapshot",
                _Shown(f"<{self.order.shape[:-1]} members>"),
                "it is that of an ensemble. Call take under vmap, as it was made.",
            )
        if np.shape(save) != ():
            raise SettingError("save", save, "pass one truth value, of shape ().")
        logs = normalized(logs)
        if self.monitor not in logs:
            there = ", ".join(map(repr, logs or {})) or "none"
            raise MetricError(
                self.monitor, f"is what is compared, and is missing (there: {there})."
            )
        monitored(self.monitor, logs[self.monitor])
        if set(logs) != set(self.logs):
            raise SettingError(
                "logs", sorted(logs), f"the snapshot was made for {sorted(self.logs)}."
            )
        logs = _checked_logs(logs)
        for name, old in self.logs.items():
            kept, given = np.dtype(old.dtype), np.dtype(_form(logs[name])[1])
            if not _holds(kept, given, is_weak=_is_weak(logs[name])):
                raise MetricError(
                    name,
                    f"is {given}, and the snapshot was made for {kept}. Give "
                    "Snapshot.like logs of the dtypes to come.",
                )
        _check_tree(tree, self.trees[0])
        return logs


class _Shown(str):
    """A text that an error shows as it is."""

    __slots__ = ()
    __repr__ = str.__str__


def _place(snapshot: Snapshot, value: Any, xp: Any) -> tuple[Any, Any, Any]:
    """Tell whether a value is among the best, and in which slot its tree goes then.

    The value comes first, as it is compared. The slot is an empty one if there is one,
    else that of the worst, and of several such the one that came last.
    """
    values, order = xp.asarray(snapshot.values), xp.asarray(snapshot.order)
    empty = order < 0
    is_full = ~xp.any(empty)
    worst = xp.max(values) if snapshot.mode == "min" else xp.min(values)
    last = xp.where(values == worst, order, -1)
    at = xp.where(is_full, xp.argmax(last), xp.argmax(empty)).astype(np.int32)
    with np.errstate(all="ignore"):
        value = _flushed(xp.asarray(value).astype(values.dtype), xp.where)
    return value, improves(value, worst, is_full, snapshot.mode, 0.0, xp.where), at


def _noted(old: Any, new: Any, xp: Any = jnp) -> Any:
    """Return what is known of all trees, with that of a new one in its slot."""

    def put(old: Any, new: Any) -> Any:
        old = xp.asarray(old)
        return xp.where(hit, xp.asarray(new).astype(old.dtype), old)

    *kept, order, logs = old
    *given, hit, new_logs = new
    with np.errstate(all="ignore"):
        return (
            *map(put, kept, given),
            put(order, xp.max(xp.asarray(order)) + 1),
            {name: put(value, new_logs[name]) for name, value in logs.items()},
        )


def _put_in_program(take: Any, new: Any, old: Any) -> Any:
    """Return one tree or the other, and copy nothing for the old one."""

    def as_old(new: Any, old: Any) -> Any:
        return jax.tree.map(
            lambda leaf, kept: beside(jnp.asarray(leaf, dtype=kept.dtype), kept),
            new,
            old,
        )

    return jax.lax.cond(take, as_old, lambda _, old: old, new, old)


def _put(take: Any, new: Any, old: Any) -> Any:
    """Return a copy of one tree, for the loop may donate its own, or the old tree."""
    if not take:
        return old
    return jax.tree.map(_copied, new, old)


def _copied(new: Any, old: jax.Array) -> jax.Array:
    if any(isinstance(x, jax.Array) and is_offloaded(x.sharding) for x in (new, old)):
        return jax.device_put(new, old.sharding, may_alias=False)
    return jnp.array(new, dtype=old.dtype, copy=True)


def _zeros(leaf: Any) -> Any:
    """Return zeros like a leaf, sharded as it is."""
    shape, dtype = _form(leaf)
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return _zero_keys(leaf)
    if isinstance(leaf, Tracer):
        return beside(jnp.zeros_like(leaf, dtype=dtype), leaf)
    return zeros(shape, dtype, _sharding(leaf))


def _zero_keys(leaf: Any) -> Any:
    impls = []

    def data_of(keys: Any) -> Any:
        impls.append(jax.random.key_impl(keys))  # a struct does not tell it
        return jax.random.key_data(keys)

    data = jax.eval_shape(data_of, leaf)
    keys = jax.random.wrap_key_data(jnp.zeros(data.shape, data.dtype), impl=impls[0])
    sharding = None if isinstance(leaf, Tracer) else _sharding(leaf)
    return keys if sharding is None else jax.device_put(keys, sharding)


def _sharding(leaf: Any) -> Any:
    return getattr(leaf, "sharding", None) if getattr(leaf, "committed", True) else None


def _check_tree(tree: Any, old: Any) -> None:
    """Check that a tree has the leaves of the one that the snapshot was made for.

    Raises:
        SettingError: If not; it names the leaves.
    """
    given, kept = dict(_leaves(tree)), dict(_leaves(old))
    differences = []
    for path in dict.fromkeys([*kept, *given]):
        have = _described(given[path]) if path in given else "nothing"
        want = _described(kept[path]) if path in kept else "nothing"
        if have != want:
            differences.append(f"{path}: is {have}, was made for {want}")
    if not differences and jax.tree.structure(tree) != jax.tree.structure(old):
        differences.append(
            f"structure: is {jax.tree.structure(tree)}, was made for "
            f"{jax.tree.structure(old)}"
        )
    if differences:
        raise SettingError(
            "tree",
            _Shown(type(tree).__name__),
            "the snapshot was made for another. Give Snapshot.like the tree that is "
            f"taken.{_lines(differences)}",
        )


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    return [
        (jax.tree_util.keystr(path), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


def _lines(items: list[str]) -> str:
    shown = "".join(f"\n  {item}" for item in items[:_SHOWN])
    more = len(items) - _SHOWN
    return f"{shown}\n  and {more} more" if more > 0 else shown


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, numbers.Number) or (
        hasattr(leaf, "shape")
        and hasattr(leaf, "dtype")
        and leaf.dtype != object
        and (
            jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            or jnp.issubdtype(leaf.dtype, jnp.number)
            or jnp.issubdtype(leaf.dtype, jnp.bool_)
        )
    )


def _form(leaf: Any) -> tuple[tuple[int, ...], Any]:
    """Return the shape and dtype of a leaf as JAX will have it."""
    if not hasattr(leaf, "dtype"):
        return (), jax.dtypes.canonicalize_dtype(np.asarray(leaf).dtype)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return tuple(leaf.shape), leaf.dtype
    return tuple(leaf.shape), jax.dtypes.canonicalize_dtype(leaf.dtype)


def _described(leaf: Any) -> str:
    if not _is_array(leaf):
        return f"a {type(leaf).__name__}"
    shape, dtype = _form(leaf)
    return f"{dtype}[{','.join(map(str, shape))}]"


def _holds(kept: Any, given: Any, *, is_weak: bool) -> bool:
    """Tell whether metrics of one dtype may be kept as another."""
    if _rank(given) != _rank(kept) or is_weak:
        return _rank(given) <= _rank(kept)
    return np.can_cast(given, kept)


def _is_weak(value: Any) -> bool:
    return getattr(value, "weak_type", not hasattr(value, "dtype"))


def _rank(dtype: Any) -> int:
    return [jnp.issubdtype(dtype, kind) for kind in _ORDERED].index(True)


def _checked_logs(logs: Any) -> dict[str, Any]:
    """Return metrics in one form, real scalars or structs of them.

    Raises:
        SettingError: If they are no mapping, or there are none.
        MetricError: If one is something else.
    """
    flat = normalized(logs) if isinstance(logs, Mapping) else {}
    if not flat:
        raise SettingError("logs", logs, "pass a mapping of names to metrics.")
    for name, value in flat.items():
        if isinstance(value, str | Unusable):
            problem = "is text" if isinstance(value, str) else value.problem
            raise MetricError(name, f"{problem}, and must be a real number.")
        if np.shape(value) != ():
            raise MetricError(
                name,
                f"has shape {np.shape(value)}, and a snapshot keeps scalars. Reduce it "
                "first, say with .mean(), or leave it out.",
            )
    return flat


def _monitor_of(logs: Mapping[str, Any]) -> str:
    if (name := find(logs, "val_loss")) in logs:
        return name
    if len(logs) != 1:
        raise SettingError(
            "monitor", None, f"which metric to compare is not clear. Pass monitor= "
            f"{_one_of(logs)}."
        )  # fmt: skip
    return next(iter(logs))


def _one_of(logs: Mapping[str, Any]) -> str:
    return f"a key of logs: {', '.join(map(repr, logs))}"
