"""Checks that a tree and its metrics fit a `Snapshot`; errors name the differences."""

import numbers
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxckpt._decision.logs import Unusable, find, normalized, with_values
from flaxckpt._decision.scalars import monitored
from flaxckpt._runtime.gone import Shown, check_there
from flaxckpt._trees.leaf import is_of_keys
from flaxckpt._trees.ties import leaves_of
from flaxckpt.errors import MetricError, SettingError

_ORDERED = (jnp.bool_, jnp.integer, jnp.floating)  # each holds the kinds before it
_SHOWN = 8  # leaves that an error lists


def check_taken(
    snapshot: Any, save: Any, tree: Any, logs: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Check the arguments of `Snapshot.take`, and return the metrics in one form.

    Raises:
        MetricError: As `Snapshot.take`.
        SettingError: As `Snapshot.take`.
    """
    if snapshot.order.ndim != 1:
        raise SettingError(
            "snapshot",
            Shown(f"<{snapshot.order.shape[:-1]} members>"),
            "the snapshot belongs to an ensemble. Call take under vmap.",
        )
    check_there("snapshot", leaves(snapshot))
    check_there("save", [("", save)])
    check_there("tree", leaves(tree))
    if np.shape(save) != ():
        raise SettingError("save", save, "pass one truth value, of shape ().")
    logs = with_values(logs)
    if snapshot.monitor not in logs:
        there = ", ".join(map(repr, logs or {})) or "none"
        problem = f"is the metric to compare, and `logs` lack it (keys there: {there})."
        raise MetricError(snapshot.monitor, problem)
    monitored(snapshot.monitor, logs[snapshot.monitor])
    if set(logs) != set(snapshot.logs):
        raise SettingError(
            "logs", sorted(logs), f"the snapshot was made for {sorted(snapshot.logs)}."
        )
    logs = checked_logs(logs)
    for name, old in snapshot.logs.items():
        kept, given = np.dtype(old.dtype), np.dtype(shape_dtype(logs[name])[1])
        if not _holds(kept, given, is_weak=_is_weak(logs[name])):
            raise MetricError(
                name,
                f"is {given}, and the snapshot was made for {kept}. Give "
                "Snapshot.like logs of the dtypes to come.",
            )
    _check_tree(tree, snapshot.trees[0])
    return logs


def _check_tree(tree: Any, old: Any) -> None:
    """Check that a tree has the leaves of the tree that the snapshot was made for.

    Raises:
        SettingError: If it has others; the error names the leaves that differ.
    """
    given, kept = dict(leaves(tree)), dict(leaves(old))
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
            Shown(type(tree).__name__),
            "the snapshot was made for another. Give Snapshot.like the tree that is "
            f"taken.{lines(differences)}",
        )


def leaves(tree: Any) -> list[tuple[str, Any]]:
    try:
        found = jax.tree_util.tree_flatten_with_path(tree)[0]
    except ValueError:
        leaves_of(tree)  # raises an error that says what is wrong
        raise
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in found]


def lines(items: list[str]) -> str:
    shown = "".join(f"\n  {item}" for item in items[:_SHOWN])
    more = len(items) - _SHOWN
    return f"{shown}\n  and {more} more" if more > 0 else shown


def is_array(leaf: Any) -> bool:
    return isinstance(leaf, numbers.Number) or (
        hasattr(leaf, "shape")
        and hasattr(leaf, "dtype")
        and (
            is_of_keys(leaf.dtype)
            or jnp.issubdtype(leaf.dtype, jnp.number)
            or jnp.issubdtype(leaf.dtype, jnp.bool_)
        )
    )


def shape_dtype(leaf: Any) -> tuple[tuple[int, ...], Any]:
    """Return the shape of a leaf, and the dtype that JAX will give it."""
    if not hasattr(leaf, "dtype"):
        return (), jax.dtypes.canonicalize_dtype(np.asarray(leaf).dtype)
    if is_of_keys(leaf.dtype):
        return tuple(leaf.shape), leaf.dtype
    return tuple(leaf.shape), jax.dtypes.canonicalize_dtype(leaf.dtype)


def _described(leaf: Any) -> str:
    if not is_array(leaf):
        return f"a {type(leaf).__name__}"
    shape, dtype = shape_dtype(leaf)
    return f"{dtype}[{','.join(map(str, shape))}]"


def _holds(kept: Any, given: Any, *, is_weak: bool) -> bool:
    """Tell whether a metric of the dtype `given` may be kept as `kept`."""
    if _rank(given) != _rank(kept) or is_weak:
        return _rank(given) <= _rank(kept)
    return np.can_cast(given, kept)


def _is_weak(value: Any) -> bool:
    return getattr(value, "weak_type", not hasattr(value, "dtype"))


def _rank(dtype: Any) -> int:
    return [jnp.issubdtype(dtype, kind) for kind in _ORDERED].index(True)


def checked_logs(logs: Any) -> dict[str, Any]:
    """Return metrics as flat real scalars, or structs of scalars.

    Raises:
        SettingError: If `logs` is no mapping, or is empty.
        MetricError: If a metric is neither.
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


def monitor_of(logs: Mapping[str, Any]) -> str:
    if (name := find(logs, "val_loss")) in logs:
        return name
    if len(logs) != 1:
        raise SettingError(
            "monitor", None, f"which metric to compare is not clear. Pass monitor= "
            f"{one_of(logs)}."
        )  # fmt: skip
    return next(iter(logs))


def one_of(logs: Mapping[str, Any]) -> str:
    return f"a key of logs: {', '.join(map(repr, logs))}"
