"""What became of the saves: `SaveCounts`, and what `verbose` prints."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flaxckpt._checkpoints.series import Series
from flaxckpt._saving.call import Call
from flaxckpt._saving.queue import JobQueue


@dataclass
class SaveCounts:
    """What became of the saves of a `ModelCheckpoint`.

    Attributes:
        saved: Saves that were written.
        direct: Saves whose values flaxckpt wrote straight from memory.
        by_orbax: Saves whose values Orbax wrote.
        superseded: Saves that were not written, because a newer save to the same path
            came while they waited for their turn.
        delayed: Calls that waited because `max_in_flight` saves were under way.
        delayed_secs: How long these calls waited in all, in seconds.
        failed: Saves that failed. `wait`, `close` or a later call raises the first
            error, with the others as notes.
        linked_bytes: Bytes of frozen leaves that were linked, not written again.
    """

    saved: int = 0
    direct: int = 0
    by_orbax: int = 0
    superseded: int = 0
    delayed: int = 0
    delayed_secs: float = 0.0
    failed: int = 0
    linked_bytes: int = 0


class Report:
    """Counts the saves of one series, and prints and warns of what becomes of them.

    Attributes:
        counts: What became of the saves.
        has_failed: Whether a save has failed since `SaverParts.lost_best` last said so.
        tell: Prints a message; None to be silent.
        warn: Keeps a warning for the next call.
    """

    def __init__(
        self, series: Series, queue: JobQueue, tell: Callable[[str], None] | None
    ) -> None:
        """Count nothing yet."""
        self.counts, self.has_failed = SaveCounts(), False
        self._series, self.tell, self.warn = series, tell, queue.warn

    def shown(self, path: Path | None = None) -> str:
        """Return a path as its users know it; without one, the root of the series."""
        return str(self._series.area.shown(path or self._series.root))

    def say(self, call: Call, message: str) -> None:
        if self.tell is not None:
            self.tell(f"{call.at.shown}: {message}")

    def saving(self, call: Call, path: Path) -> None:
        self.say(call, f"{call.news}saving model to {self.shown(path)}")

    def count_delay(self, secs: float) -> None:
        self.counts.delayed += secs > 0
        self.counts.delayed_secs += secs

    def count_saved(self, *, is_direct: bool) -> None:
        """Count a save that was written, by flaxckpt's direct way or by Orbax."""
        self.counts.saved += 1
        self.counts.direct += is_direct
        self.counts.by_orbax += not is_direct

    def decided(self, call: Call) -> None:
        """Print a decision as Keras does, or keep it for the message about the save."""
        state = call.kept
        if self.tell is None or state is None or not state.save_best_only:
            return
        before = np.asarray(call.before.best) if call.before is not None else np.nan
        old = "None" if np.isnan(before) else f"{before:.5f}"
        new = np.asarray(state.best)
        if call.saves and new != before and not np.isnan(new):
            call.news = f"{state.monitor} improved from {old} to {new:.5f}, "
        elif not call.saves and call.metric in call.logs:
            if np.isnan(float(call.logs[call.metric])):
                self.say(call, f"{state.monitor} is nan, which is no improvement")
            else:
                self.say(call, f"{state.monitor} did not improve from {old}")
