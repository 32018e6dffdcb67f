"""What processes compare before they write: the call, and every leaf.

Each process tells process 0 a checksum of its account. If all checksums are equal, no
process sends its account. Otherwise process 0 asks one of the processes that differ for
the whole account, and names what differs.
"""

import functools
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import xxhash

from flaxckpt._checkpoints.series_writer import Page
from flaxckpt._decision.logs import Unusable, find
from flaxckpt._processes.messages import process_count
from flaxckpt._saving.call import Call
from flaxckpt._trees.digest import checksum
from flaxckpt._trees.layout import Layout
from flaxckpt._trees.owned_shards import is_shared
from flaxckpt.errors import CheckpointError, MetricError, UnsupportedLeafError

_SHOWN = 3


def check_parts(layout: Layout, leaves: Sequence[Any]) -> None:
    """Check that each process has a part of each array that several processes share.

    JAX cannot copy an array of which a process has no part, and Orbax cannot write it.

    Raises:
        UnsupportedLeafError: If another process, or this one, has no part of an array.
            Processes may name different leaves.
    """
    pairs = zip(layout.leaves, leaves, strict=True)
    refused = [
        (leaf.name, problem)
        for leaf, value in pairs
        if is_shared(value) and (problem := _problem_of_parts(value.sharding))
    ]
    if refused:
        raise UnsupportedLeafError(tuple(refused))


@functools.lru_cache(maxsize=1024)
def _problem_of_parts(sharding: jax.sharding.Sharding) -> str:
    """Say which process has no part of arrays with a sharding; empty if all have."""
    found = {device.process_index for device in sharding.device_set}
    lacking = [index for index in range(process_count()) if index not in found]
    if not lacking:
        return ""
    return (
        f"an array on devices of {len(found)} of {process_count()} processes: process "
        f"{lacking[0]} has no part of it"
    )


def account_of(call: Call, pages: Sequence[Page], paths: list[str]) -> dict[str, Any]:
    """Return, as JSON values, what has to be the same in all processes.

    Args:
        call: The call.
        pages: What it writes.
        paths: Their paths, as users know them.
    """
    state, metric = call.kept, dict[str, Any]()
    if state is not None and (name := find(call.logs, state.monitor)) in call.logs:
        metric[name] = _comparable(call.logs[name])
    return {
        **call.at._asdict(),
        "metric": metric,
        "paths": paths,
        "leaves": [list(_rows(page)) for page in pages],
    }


def _rows(page: Page) -> Iterator[tuple[str, str]]:
    """Yield the name of each leaf, and what has to be the same in all processes."""
    pairs = zip(page.layout.leaves, page.leaves, strict=True)
    for position, (leaf, value) in enumerate(pairs):
        if position in page.own:  # the lengths of texts may differ
            shown = leaf.kind if leaf.is_bytes else leaf
            yield leaf.name, f"{shown}, each process's own"
        elif value is None or not leaf.in_orbax:
            yield leaf.name, str(leaf)
        elif is_shared(value):
            yield leaf.name, f"{leaf}, {_placement(value.sharding)}"
        else:
            yield leaf.name, f"{leaf} with digest {checksum(value)}"


@functools.lru_cache(maxsize=1024)
def _placement(sharding: jax.sharding.Sharding) -> str:
    """Describe a sharding, less its memory: one process may have copied elsewhere."""
    shown, devices = type(sharding).__name__, sorted(d.id for d in sharding.device_set)
    if isinstance(sharding, jax.sharding.NamedSharding):
        shown = f"{sharding.spec} on {dict(sharding.mesh.shape)}"
        devices = [device.id for device in np.asarray(sharding.mesh.devices).flat]
    summed = xxhash.xxh3_64_hexdigest(json.dumps(devices).encode())
    return f"{shown} ({len(devices)} devices, {summed})"


def memories_of(pages: Sequence[Page]) -> str:
    """Return a checksum of the memories in which the pages' arrays are."""
    kinds = [
        value.sharding.memory_kind if is_shared(value) else ""
        for page in pages
        for value in page.leaves
    ]
    return xxhash.xxh3_64_hexdigest(json.dumps(kinds).encode())


def _comparable(value: Any) -> Any:
    """Return a metric in the form in which the processes compare it."""
    if not isinstance(value, jax.Array | np.ndarray):
        return value if isinstance(value, str | Unusable) else float(value)
    return float(np.asarray(value)) if not value.shape else str(value.shape)


def checksum_of(account: dict[str, Any]) -> str:
    """Return a checksum of an account."""
    return xxhash.xxh3_128_hexdigest(json.dumps(account, default=str).encode())


def error_between(
    one: dict[str, Any], index: int, other: dict[str, Any]
) -> CheckpointError:
    """Return the error that tells how two accounts differ.

    Args:
        one: The account of process 0.
        index: The other process.
        other: Its account.
    """
    both = f"in process 0 and {{}} in process {index}"
    if told := _differing_call(one, other, both, ("epoch", "batch", "step")):
        return told
    names = {**one["metric"], **other["metric"]}
    for name in names:
        values = [each["metric"].get(name, math.nan) for each in (one, other)]
        if len({repr(value) for value in values}) > 1:
            return MetricError(
                name,
                f"differs between processes: {values[0]} {both.format(values[1])}. All "
                "processes must decide alike. Pass a value that all processes share: "
                "the result of a jitted function on sharded arrays, or "
                "jax.experimental.multihost_utils.process_allgather(value).mean().",
            )
    if told := _differing_call(one, other, both, ("paths",)):
        return told
    found = _differing(one["leaves"], other["leaves"])
    more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return CheckpointError(
        f"The trees differ between processes: {'; '.join(found[:_SHOWN])}{more}. "
        f"The second is process {index}'s. Save arrays that all processes share, with "
        "one sharding, and equal values of everything else; or choose what differs "
        "with per_process=, to save a value for each process."
    )


def _differing_call(
    one: dict[str, Any], other: dict[str, Any], both: str, names: Sequence[str]
) -> CheckpointError | None:
    """Return the error for the first of some arguments that differs, if one does."""
    for name in names:
        if one[name] != other[name]:
            return CheckpointError(
                f"update or save was called otherwise in one of the processes: {name} "
                f"is {one[name]} {both.format(other[name])}. Make the same calls in "
                "all of them."
            )
    return None


def _differing(
    one: Sequence[Sequence[tuple[str, str]]], other: Sequence[Sequence[tuple[str, str]]]
) -> list[str]:
    found: list[str] = []
    for first, second in zip(one, other, strict=False):
        names = [[name for name, _ in each] for each in (first, second)]
        if names[0] == names[1]:
            triples = zip(names[0], first, second, strict=True)
            pairs = [(name, a[1], b[1]) for name, a, b in triples]
        else:
            here, there = dict(first), dict(second)
            missing = "missing"
            pairs = [
                (name, here.get(name, missing), there.get(name, missing))
                for name in {**here, **there}
            ]
        found += [f"{name} is {a} and {b}" for name, a, b in pairs if a != b]
    return found or ["the trees have their leaves in another order"]
