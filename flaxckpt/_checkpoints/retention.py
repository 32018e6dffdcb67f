"""Which checkpoints to delete, chosen by their records, without a look at the disk."""

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flaxckpt._decision.logs import find, rounded
from flaxckpt._disk.info import CheckpointInfo
from flaxckpt.errors import SettingError


class PreservationPolicy(Protocol):
    """What `preserve` takes: any of Orbax's preservation policies, or your own.

    `orbax.checkpoint.v1.training.preservation_policies` has Orbax's policies:
    `LatestN`, `BestN`, `EveryNSteps`, `EveryNSeconds`, `CustomSteps`,
    `AnyPreservationPolicy`...
    """

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> Sequence[bool]:
        """Tell for each checkpoint, oldest first, whether to keep it.

        Args:
            checkpoints: `CheckpointInfo`s, which have the attributes `step`, `time` and
                `metrics` that Orbax's policies read.
            context: None; Orbax's policies take it.
        """
        ...


@dataclass(frozen=True)
class LatestN:
    """Keep the `n` newest."""

    n: int

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> Sequence[bool]:
        del context
        first = len(checkpoints) - self.n
        return [index >= first for index in range(len(checkpoints))]


def ranked(
    infos: Sequence[CheckpointInfo], monitor: str, mode: str, dtype: Any = "float32"
) -> tuple[CheckpointInfo, ...]:
    """Return the checkpoints that have a number to compare, the best first.

    Args:
        infos: Checkpoints, oldest first; of equals, the oldest comes first.
        monitor: Key in their logs.
        mode: `"min"` or `"max"`.
        dtype: The dtype in which the decision compares values. Of two values that are
            equal in this dtype, neither is better.
    """
    sign = 1 if mode == "min" else -1
    values = [(monitored_value(info.logs, monitor, dtype), info) for info in infos]
    known = [(sign * value, info) for value, info in values if value is not None]
    return tuple(info for _, info in sorted(known, key=lambda pair: pair[0]))


def monitored_value(
    logs: Mapping[str, Any], monitor: str, dtype: Any = "float32"
) -> float | None:
    """Return the number that logs hold for `monitor`, rounded to `dtype`.

    None if there is no number, or a NaN.
    """
    value = logs.get(find(logs, monitor))
    if not isinstance(value, numbers.Real):
        return None
    try:
        number = float(rounded(float(value), dtype))
    except OverflowError:  # an integer larger than any float
        return None
    return None if math.isnan(number) else number


def expired(
    infos: Sequence[CheckpointInfo],
    policy: PreservationPolicy | None,
    best: CheckpointInfo | None,
) -> tuple[CheckpointInfo, ...]:
    """Return the checkpoints to delete.

    Args:
        infos: All checkpoints of a series, oldest first, all durable.
        policy: Tells which checkpoints to keep; None keeps all.
        best: The best checkpoint; None if it is not known.

    Returns:
        The checkpoints that the policy does not keep, less the newest and the best.

    Raises:
        SettingError: If the policy raises, or does not give one answer for each.
    """
    if policy is None or not infos:
        return ()
    try:
        keep = list(policy.should_preserve(infos, context=None))
    except Exception as error:
        raise SettingError(
            "preserve",
            policy,
            f"it raised {type(error).__name__}: {error}. Nothing was deleted.",
        ) from error
    if len(keep) != len(infos):
        raise SettingError(
            "preserve",
            policy,
            f"it gave {len(keep)} answers for {len(infos)} checkpoints. It must give "
            "one for each.",
        )
    return tuple(
        info
        for info, kept in zip(infos, keep, strict=True)
        if not kept and info is not infos[-1] and info is not best
    )
