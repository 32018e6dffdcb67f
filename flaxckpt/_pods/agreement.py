"""What processes compare before they write: epoch, batch, metric and paths."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from flaxckpt._copies.held import HostCopy
from flaxckpt._decision.logs import Unusable, find
from flaxckpt._processes.messages import process_index
from flaxckpt._saving.call import Call
from flaxckpt._saving.job import translated
from flaxckpt._trees.owned_shards import Shards
from flaxckpt.errors import CheckpointError, MetricError


def with_sharding(copy: Any, leaf: Any) -> Any:
    """Return a host copy that keeps the array's sharding, which its form depends on."""
    if not isinstance(leaf, jax.Array) or isinstance(copy, Shards):
        return copy
    copy = copy.view(HostCopy)
    copy.sharding = leaf.sharding
    return copy


def summary(call: Call, paths: list[str]) -> dict[str, Any]:
    """Return what has to be the same in all processes."""
    state, values = call.kept, dict[str, Any]()
    if state is not None and (name := find(call.logs, state.monitor)) in call.logs:
        values[name] = _comparable(call.logs[name])
    return {"epoch": call.epoch, "batch": call.batch, "values": values, "paths": paths}


def _comparable(value: Any) -> Any:
    """Return a metric in the form in which the processes compare it."""
    if not isinstance(value, jax.Array | np.ndarray):
        return value if isinstance(value, str | Unusable) else float(value)
    return float(np.asarray(value)) if not value.shape else str(value.shape)


def agree(summaries: Sequence[dict[str, Any]]) -> None:
    """Check that the summaries of all processes are equal.

    Raises:
        MetricError: If the monitored value differs.
        CheckpointError: If the epoch, the batch or the paths differ.
    """
    first = summaries[0]
    for name in first["values"]:
        values = [each["values"].get(name, math.nan) for each in summaries]
        if len({repr(value) for value in values}) > 1:
            raise MetricError(
                name,
                f"differs between processes: {_listed(values)}. All processes must "
                "decide alike. Pass a value that all processes share: the result of a "
                "jitted function on sharded arrays, or "
                "jax.experimental.multihost_utils.process_allgather(value).mean().",
            )
    for name in ("epoch", "batch", "paths"):
        values = [each[name] for each in summaries]
        if any(value != values[0] for value in values):
            raise CheckpointError(
                f"update or save was called otherwise in one of the processes: {name} "
                f"is {_listed(values)}. Make the same calls in all of them."
            )


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(f"{value} in process {i}" for i, value in enumerate(values))


def translated_for_all(error: BaseException, where: str) -> CheckpointError:
    return translated(error, where, in_process())


def in_process() -> str:
    """Return the text that names this process at the end of an error's cause."""
    return f" (in process {process_index()})"
