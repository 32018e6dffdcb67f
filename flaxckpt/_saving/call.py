"""One call that may save: its metrics, its state, and whether it saves."""

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard, cast

import jax
import numpy as np

from flaxckpt._copies.beside import beside
from flaxckpt._copies.held import Copies
from flaxckpt._copies.on_device import verdict_of
from flaxckpt._decision.logs import Logs, find
from flaxckpt._decision.moment import Moment
from flaxckpt._decision.scalars import monitored
from flaxckpt._decision.state import (
    LEAVES,
    CheckpointState,
    judged,
    with_judged,
    with_leaves,
)
from flaxckpt._decision.step import judge, value_to_count
from flaxckpt._direct.frozen_files import FrozenLeaf
from flaxckpt._runtime.gone import is_gone


class Save:
    """The call saves in the series."""


class Skip:
    """The call saves nothing in the series."""


class Undecided:
    """The decision needs a metric that a device still computes."""


@dataclass(frozen=True)
class OnDevice:
    """A device decides.

    Attributes:
        flag: Whether the call saves in the series, bool[].
    """

    flag: jax.Array


Decision: TypeAlias = Save | Skip | Undecided | OnDevice


class Call:
    """One call that saves, or may.

    Attributes:
        at: When it is made, in ints.
        decision: Whether it saves in the series.
        before: The state before the decision.
        state: The state after the decision.
        news: The decision in words, with which the message about the save begins.
        kept: The state to record, with copies of arrays that the loop may donate.
        clock_counts: Whether the state counts batches though none makes a check due.
        seen: How many batches the run has seen, where the state does not tell.
        by_hand: Whether the call is `save`, which a better checkpoint makes way for.
        line: The number of its line; see `Lines`. None where that does not count.
        copies: Copies of the leaves to save, and of scalars on devices.
        frozen: The frozen ones among these leaves, by their positions.
    """

    def __init__(
        self,
        saves: bool,
        at: Moment,
        logs: Logs | None,
        state: CheckpointState | None,
    ) -> None:
        """Take down the arguments of the call; `logs` are normalized already."""
        self.decision: Decision = Save() if saves else Skip()
        self.at = at.whole()
        self.logs = {key: _kept(value) for key, value in (logs or {}).items()}
        self.time = datetime.datetime.now(datetime.UTC)
        self.before = self.state = self.kept = state
        self.news = ""
        self.clock_counts = False
        self.seen: int | None = None
        self.by_hand = False
        self.line: int | None = None
        self.copies: Copies | None = None
        self.frozen: dict[int, FrozenLeaf] = {}

    @property
    def saves(self) -> bool:
        """Whether it is known that the call saves in the series."""
        return isinstance(self.decision, Save)

    @property
    def skips(self) -> bool:
        """Whether it is known that the call saves nothing in the series."""
        return isinstance(self.decision, Skip)

    @property
    def unknown(self) -> jax.Array | None:
        """The monitored value that a check needs, if a device still computes it."""
        value = monitored(self.metric, self.logs.get(self.metric, 0))
        return value if is_unknown(value) else None

    @property
    def step(self) -> int:
        """What retention policies count by; see `CheckpointInfo`."""
        if self.at.step is not None:
            return self.at.step
        epochs, kept = self.at.epoch + 1, self.kept
        if kept is not None and kept.save_freq != "epoch":
            return int(np.asarray(kept.batches))
        if kept is not None and self.clock_counts:
            return int(np.asarray(kept.batches)) or epochs
        return epochs if self.seen is None else self.seen

    @property
    def metric(self) -> str:
        """The name of the monitored value in `logs`, which may lack it."""
        assert self.state is not None
        return find(self.logs, self.state.monitor)

    @property
    def improves(self) -> bool:
        """Whether the decision has found a new best; the decision must be known."""
        before, state = self.before, self.state
        if before is None or state is None or not np.asarray(state.has_best):
            return False
        is_new = not np.asarray(before.has_best)
        return is_new or bool(
            np.asarray(before.best_value) != np.asarray(state.best_value)
        )

    def scalars(self) -> dict[tuple[str, str], jax.Array]:
        """Return the scalars of logs and state on devices; the loop may donate them."""
        scalars: dict[tuple[str, str], jax.Array] = {}
        for name, value in self.logs.items():
            if isinstance(value, jax.Array) and not value.shape:
                scalars["logs", name] = value
        is_open = isinstance(self.decision, Undecided)
        for name in LEAVES:
            value = getattr(self.state, name, None)
            if not isinstance(value, jax.Array):
                continue
            assert self.state is not None
            if is_open and name in judged(self.state):
                continue  # still to be decided
            if getattr(self.kept, name) is value:  # otherwise it is copied already
                scalars["state", name] = value
        return scalars

    def keep(self, name: tuple[str, str], value: Any) -> None:
        """Replace one of `scalars` by a copy, which the loop cannot donate."""
        if name[0] == "logs":
            self.logs[name[1]] = value
        elif self.kept is not None and getattr(self.kept, name[1]) is getattr(
            self.state, name[1]
        ):
            self.kept = with_leaves(self.kept, **{name[1]: value})

    def judge(self) -> None:
        """Decide a due check now, and wait for the metric."""
        assert self.state is not None
        forced, name = self.saves, self.metric
        self.before = self.state = _fetched(self.state)
        if name in self.logs:
            self.logs[name] = fetched_value(self.logs[name])
        self.state, save = judge(self.state, self.logs, np.True_)
        self.kept = self.state
        self.decision = Save() if save or forced else Skip()

    def count_stale(self, leaves: Callable[[], Sequence[Any]]) -> None:
        """Save whatever the metric is, and count in the state whether it has improved.

        Nothing waits for a metric on a device: the devices of the tree count.

        Args:
            leaves: Returns the leaves of the tree, beside which programs take the
                state.
        """
        state, self.decision = self.state, Save()
        assert state is not None
        value = value_to_count(state, self.logs)
        counts = [getattr(state, name) for name in judged(state)]
        if not any(isinstance(each, jax.Array) for each in (value, *counts)):
            self.state, _ = judge(state, self.logs, np.True_)
            self.kept = self.state
        elif value is not None:
            value, *counts = beside(leaves(), value, *counts)
            (after, kept, _), _ = verdict_of(with_judged(state, counts), value)
            self.state, self.kept = with_judged(state, after), with_judged(state, kept)

    def judge_on_device(self, value: jax.Array) -> None:
        """Have a device decide a due check; it computes the best of the states, too.

        Args:
            value: The monitored value.
        """
        assert self.state is not None
        leaves, flag = verdict_of(self.state, value)
        after, kept, before = (with_judged(self.state, each) for each in leaves)
        self.before, self.kept, self.state = before, kept, after
        self.decision = OnDevice(flag)

    def wait_for_flag(self) -> bool:
        """Wait for a device's decision; return False if no device decides."""
        decision = self.decision
        if not isinstance(decision, OnDevice):
            return False
        self.decision = Save() if decision.flag else Skip()
        return True


def is_unknown(value: Any) -> TypeGuard[jax.Array]:
    """Tell whether a device still computes a value."""
    if not isinstance(value, jax.Array) or is_gone(value):
        return False
    return not cast(Any, value).is_ready()


def _kept(value: Any) -> Any:
    """Copy a numpy array, which its owner may change in place."""
    return np.array(value)[()] if isinstance(value, np.ndarray) else value


def _fetched(state: CheckpointState) -> CheckpointState:
    """Return a state with the leaves on the host that `judged` names."""
    leaves = (fetched_value(getattr(state, name)) for name in judged(state))
    return with_judged(state, tuple(leaves))


def fetched_value(value: Any) -> Any:
    return np.asarray(value)[()] if isinstance(value, jax.Array) else value
