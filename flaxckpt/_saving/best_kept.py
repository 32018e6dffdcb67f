"""`BestKept`: no save replaces a better checkpoint at its path.

Either the save or the better checkpoint goes aside.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from flaxckpt._checkpoints.series_writer import Page, SeriesWriter
from flaxckpt._decision.logs import Logs
from flaxckpt._decision.state import CheckpointState, plain_state
from flaxckpt._saving.call import Call
from flaxckpt._saving.report import Report


class BestKept:
    """Places the saves of a series that has improvements only."""

    def __init__(self, disk: SeriesWriter, report: Report, *, overwrite: bool) -> None:
        """Place nothing yet.

        Args:
            disk: Writes the series.
            report: Prints and warns of where a save goes.
            overwrite: Whether a worse save may replace a better one all the same.
        """
        self._disk, self._report, self._overwrite = disk, report, overwrite
        self._has_saved = self._has_told_reason = False
        self._owes_place = False  # a warning has yet to say where this run saves aside

    def place(self, page: Page, call: Call, logs: Logs) -> Callable[[], None]:
        """Choose where a page goes if a better checkpoint may be at its path.

        A worse page goes aside, but a page saved by hand gets its path: in a store the
        better checkpoint is copied aside first. On a disk the page goes aside, and the
        two are swapped once the page is written, so the path is never missing.

        Returns:
            What to call once the page is in its place.
        """
        state, path, shown = call.kept, page.path, self._report.shown
        placed = self._disk.rivals.place(
            path, logs, overwrite=self._overwrite, by_hand=call.by_hand
        )
        chosen, rest = placed.path, placed.rest
        if placed.reason and not self._has_told_reason and chosen != path:
            self._has_told_reason = True
            self._report.warn(
                f"{shown(path)!r} is not replaced: {placed.reason}. What this run "
                f"saves goes to {shown(chosen)!r}. To replace it, pass overwrite=True."
            )
        if placed.kept is not None:
            if self._disk.series.area.is_mirror:
                is_moved = self._disk.rivals.make_way(path, placed.kept)
                kept = placed.kept if is_moved else None
                return functools.partial(self._settle, page, rest, kept, None)
            page.path = placed.kept
            return functools.partial(self._settle, page, rest, placed.kept, path)
        page.path = chosen
        if chosen != path:
            better, own = shown(path), shown(chosen)
            self._report.say(call, f"{better} has a better one: this one goes to {own}")
        is_news = not self._has_saved or (self._owes_place and chosen != path)
        if state is not None and is_news and not self._overwrite:
            self._warn_of_better(state, chosen if chosen != path else None)
        self._has_saved = True
        return functools.partial(self._disk.drop, rest)

    def _settle(
        self, page: Page, rest: Sequence[Path], kept: Path | None, path: Path | None
    ) -> None:
        """Finish a save by hand that has taken the place of a better checkpoint.

        Args:
            page: What was written.
            rest: The checkpoints to delete.
            kept: The place aside of the better checkpoint; None if it is gone.
            path: The path to swap with `kept`; None if the page is there already.
        """
        if kept is not None and path is not None:
            page.path = path
            kept = kept if self._disk.rivals.swap(kept, path) else None
        self._disk.drop(rest)
        if kept is not None:
            here, aside = self._report.shown(page.path), self._report.shown(kept)
            self._report.warn(
                f"save() took the place of a better checkpoint at {here!r}, which is "
                f"kept at {aside!r}. To replace it, pass overwrite=True."
            )

    def _warn_of_better(self, state: CheckpointState, aside: Path | None) -> None:
        """Warn if a checkpoint on disk is better than the best that the run knows."""
        best, own = self._disk.best_value(), plain_state(state)["best"]
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
                "The better one stays, and this run's is saved aside, at "
                f"{self._report.shown(aside)!r}, until it is at least as good; to "
                "replace the better one, pass overwrite=True. "
            )
        self._report.warn(
            f"{self._report.shown()!r} has a checkpoint of an earlier run with "
            f"{state.monitor} {shown}, which this run does not know of: {of_run}. "
            f"{how}To go on from the better one, begin with ckpt.restore(like=tree)."
        )


def _apart(one: float, other: float) -> tuple[str, str]:
    """Show two numbers with five digits, or as many as tell them apart."""
    digits = 5
    while one != other and digits < 17 and f"{one:.{digits}g}" == f"{other:.{digits}g}":
        digits += 1
    return f"{one:.{digits}g}", f"{other:.{digits}g}"
