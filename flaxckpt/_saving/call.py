"""One call that may save: its metrics, its state, and whether it saves.

The decision may be a value that a device still computes.
"""

import datetime
from typing import Any, TypeGuard, cast

import jax
import numpy as np

from flaxckpt._copies.held import Copies
from flaxckpt._copies.on_device import fill, verdict_of
from flaxckpt._decision.logs import Logs, find
from flaxckpt._decision.scalars import monitored, whole
from flaxckpt._decision.state import BEST, LEAVES, CheckpointState, with_leaves
from flaxckpt._decision.step import judge
from flaxckpt._direct.frozen_files import FrozenLeaf
from flaxckpt._runtime.gone import is_gone


class Entry:
    """One call that saves, or may.

    Attributes:
        save: Whether it saves; None before the decision, and a bool[] where a device
            decides.
        before: The state before the decision.
        state: The state after the decision.
        news: The decision in words, with which the message about the save begins.
        kept: The state to record, with copies of arrays that the loop may donate.
        by_hand: Whether the call is `save`, which a better checkpoint makes way for.
        line: Number of a line of saves, each of which is better than the one before. A
            save supersedes saves of its line only. None where that does not count.
        copies: Copies of the leaves to save, and of scalars on devices.
        frozen: The frozen ones among these leaves, by their positions.
    """

    def __init__(
        self,
        save: bool | None,
        epoch: Any,
        batch: Any,
        logs: Logs | None,
        state: CheckpointState | None,
    ) -> None:
        """Take down the arguments of the call; `logs` are normalized already."""
        self.save: Any = save
        self.epoch = whole("epoch", epoch)
        self.batch = None if batch is None else whole("batch", batch)
        self.logs = {key: _kept(value) for key, value in (logs or {}).items()}
        self.time = datetime.datetime.now(datetime.UTC)
        self.before = self.state = self.kept = state
        self.news = ""
        self.by_hand = False
        self.line: int | None = None
        self.copies: Copies | None = None
        self.frozen: dict[int, FrozenLeaf] = {}
        self._verdict: Any = None  # of a device

    @property
    def unknown(self) -> jax.Array | None:
        """The monitored value, if the check needs it and a device still computes it."""
        if self.state is None or not self.state.save_best_only:
            return None
        value = monitored(self.metric, self.logs.get(self.metric, 0))
        return value if is_unknown(value) else None

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
        found: dict[tuple[str, str], jax.Array] = {}
        for name, value in self.logs.items():
            if isinstance(value, jax.Array) and not value.shape:
                found["logs", name] = value
        for name in LEAVES:
            value = getattr(self.state, name, None)
            if isinstance(value, jax.Array) and (
                name not in BEST or self.save is not None
            ):
                found["state", name] = value  # not the best, while a device decides
        return found

    def keep(self, name: tuple[str, str], value: Any) -> None:
        """Replace one of `scalars` by a copy, which the loop cannot donate."""
        if name[0] == "logs":
            self.logs[name[1]] = value
        elif self.kept is not None and getattr(self.kept, name[1]) is getattr(
            self.state, name[1]
        ):
            self.kept = with_leaves(self.kept, **{name[1]: value})

    def judge(self) -> None:
        """Decide a due check now; wait for the metric if the decision needs it."""
        assert self.state is not None
        forced, name = self.save, self.metric
        if self.state.save_best_only:
            fetched = {name: fetched_value(getattr(self.state, name)) for name in BEST}
            self.before = self.state = with_leaves(self.state, **fetched)
            if name in self.logs:
                self.logs[name] = fetched_value(self.logs[name])
        self.state, save = judge(self.state, self.logs, np.True_)
        self.kept = self.state
        self.save = bool(save or forced)

    def decide_on_device(
        self,
        state: CheckpointState,
        value: jax.Array,
        leaves: list[Any],
        into: Copies | None,
        *,
        always: bool,
    ) -> None:
        """Have the device decide a due check, and copy if there is something to save.

        Args:
            state: The decision state after `tick`.
            value: The monitored value.
            leaves: The leaves to copy to `copies`.
            into: Earlier copies of the same plan, whose memory is used. They keep their
                values if there is nothing to save. None for new memory.
            always: Whether to copy even without a new best, for a slot, which takes any
                state.
        """
        assert self.copies is not None
        self._verdict = verdict_of(state, value)
        fill(self.copies, leaves, into, np.True_ if always else self._verdict[1])
        self.take_verdict()

    def take_verdict(self) -> None:
        """Take up the verdict of a device, once: `save` and the states."""
        verdict = self._verdict
        if self.save is None and verdict is not None and self.state is not None:
            bests, save = verdict
            after, kept, before = (
                with_leaves(self.state, **dict(zip(BEST, best, strict=True)))
                for best in bests
            )
            self.before, self.kept, self.state = before, kept, after
            self.save = save


def is_unknown(value: Any) -> TypeGuard[jax.Array]:
    """Tell whether a device still computes a value."""
    if not isinstance(value, jax.Array) or is_gone(value):
        return False
    return not cast(Any, value).is_ready()


def _kept(value: Any) -> Any:
    """Copy a numpy array, which its owner may change in place."""
    return np.array(value)[()] if isinstance(value, np.ndarray) else value


def fetched_value(value: Any) -> Any:
    return np.asarray(value)[()] if isinstance(value, jax.Array) else value
