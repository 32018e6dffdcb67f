"""`BestKept`: no save replaces a better checkpoint at its path.

Either the save or the better checkpoint goes aside.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flaxckpt._checkpoints.series import Page, Series
from flaxckpt._decision.logs import Logs
from flaxckpt._decision.state import CheckpointState, plain_state
from flaxckpt._saving.call import Call
from flaxckpt._saving.paths import Paths
from flaxckpt._saving.queue import JobQueue
from flaxckpt._saving.report import Report


@dataclass
class Placing:
    """What is to be done once a page is written.

    Attributes:
        path: The path that the page was meant for.
        rest: The checkpoints to delete.
        kept: The place aside of the better checkpoint; None if it stays where it is.
        swaps: Whether the page was written there, and the two exchange their names.
    """

    path: Path
    rest: Sequence[Path] = ()
    kept: Path | None = None
    swaps: bool = False


class BestKept:
    """Places the saves of a series that has improvements only."""

    def __init__(
        self,
        series: Series,
        paths: Paths,
        report: Report,
        queue: JobQueue,
        *,
        overwrite: bool,
    ) -> None:
        """Place nothing yet.

        Args:
            series: The series.
            paths: Its paths.
            report: Prints where a save goes.
            queue: Keeps warnings for the next call.
            overwrite: Whether a worse save may replace a better one all the same.
        """
        self._series, self._paths, self._report = series, paths, report
        self._queue, self._overwrite = queue, overwrite
        self._has_saved = self._has_told_reason = False
        self._owes_place = False  # a warning has yet to say where this run saves aside

    def place(self, page: Page, call: Call, logs: Logs) -> Placing:
        """Choose where a page goes if a better checkpoint may be at its path.

        A worse page goes aside, but a page saved by hand gets its path: in a store the
        better checkpoint is copied aside first. On a disk the page goes aside, and
        `settle` swaps the two once the page is written, so the path is never missing.
        """
        state, path = call.kept, page.path
        placed = self._series.place(
            path, logs, overwrite=self._overwrite, by_hand=call.by_hand
        )
        chosen, rest = placed.path, placed.rest
        if placed.reason and not self._has_told_reason and chosen != path:
            self._has_told_reason = True
            self._queue.warn(
                f"{self._paths.shown(path)!r} is not replaced: {placed.reason}. What "
                f"this run saves goes to {self._paths.shown(chosen)!r}. To replace it, "
                "pass overwrite=True."
            )
        if placed.kept is not None:
            if self._series.area.is_mirror:
                is_moved = self._series.make_way(path, placed.kept)
                return Placing(path, rest, placed.kept if is_moved else None)
            page.path = placed.kept
            return Placing(path, rest, placed.kept, swaps=True)
        page.path = chosen
        if chosen != path:
            better, own = self._paths.shown(path), self._paths.shown(chosen)
            self._report.say(call, f"{better} has a better one: this one goes to {own}")
        is_news = not self._has_saved or (self._owes_place and chosen != path)
        if state is not None and is_news and not self._overwrite:
            self._warn_of_better(state, chosen if chosen != path else None)
        self._has_saved = True
        return Placing(path, rest)

    def settle(self, page: Page, placing: Placing) -> None:
        """Swap, and delete what is superfluous, after the page is in its place."""
        kept = placing.kept
        if kept is not None and placing.swaps:
            page.path = placing.path
            kept = kept if self._series.swap(kept, page.path) else None
        self._series.drop(placing.rest)
        if kept is not None:
            here, aside = self._paths.shown(page.path), self._paths.shown(kept)
            self._queue.warn(
                f"save() took the place of a better checkpoint at {here!r}, which is "
                f"kept at {aside!r}. To replace it, pass overwrite=True."
            )

    def _warn_of_better(self, state: CheckpointState, aside: Path | None) -> None:
        """Warn if a checkpoint on disk is better than the best that the run knows."""
        best, own = self._series.best_value(), plain_state(state)["best"]
        if best is None or (
            own is not None and (best >= own if state.mode == "min" else best <= own)
        ):
            return
        self._owes_place = aside is None
        shown, own_shown = _apart(best, best if own is None else own)
        of_run = "it has none yet" if own is None else f"its own best is {own_shown}"
        how = ""
        if aside is not None:
            how = (
                "The better one stays, and this run's is saved aside until it is "
                f"better, at {self._paths.shown(aside)!r}; to replace the better one, "
                "pass overwrite=True. "
            )
        self._queue.warn(
            f"{self._paths.shown()!r} has a checkpoint of an earlier run with "
            f"{state.monitor} {shown}, which this run does not know of: {of_run}. "
            f"{how}To go on from the better one, begin with ckpt.restore(like=tree)."
        )


def _apart(one: float, other: float) -> tuple[str, str]:
    """Show two numbers with five digits, or as many as tell them apart."""
    digits = 5
    while one != other and digits < 17 and f"{one:.{digits}g}" == f"{other:.{digits}g}":
        digits += 1
    return f"{one:.{digits}g}", f"{other:.{digits}g}"
