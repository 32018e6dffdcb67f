"""`Publisher`: writes what jobs hold, on the thread of the queue."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from flaxckpt._checkpoints.series_writer import Page, SeriesWriter
from flaxckpt._checkpoints.together import Together
from flaxckpt._decision.logs import plain_scalars
from flaxckpt._decision.state import plain_state
from flaxckpt._disk.info import CheckpointInfo
from flaxckpt._runtime.failures import in_one_line
from flaxckpt._saving.best_kept import BestKept
from flaxckpt._saving.call import Call
from flaxckpt._saving.contents import Contents
from flaxckpt._saving.hooks import Hooks
from flaxckpt._saving.job import nothing
from flaxckpt._saving.paths import Paths
from flaxckpt._saving.report import Report


@dataclass
class Publisher:
    """Puts checkpoints in their places, and deletes what retention does not keep.

    Attributes:
        disk: Writes the series.
        paths: Its paths.
        report: Counts what is saved, prints and warns.
        best_kept: Places the saves; None if a save may replace a better one.
        weights_only: Whether the series gets the weights alone.
        hooks: Are told of what is saved.
    """

    disk: SeriesWriter
    paths: Paths
    report: Report
    best_kept: BestKept | None
    weights_only: bool
    hooks: Hooks

    def write(self, contents: Contents) -> None:
        """Write the last call that saves, and delete what retention does not keep.

        Nothing is deleted before the new checkpoint is in its place.
        """
        settled = self.pages_to_write(contents, self.paths.check)
        if settled is not None:
            with self.disk.series.area.claim.turn:
                self.put(*settled)

    def pages_to_write(
        self, contents: Contents, check: Callable[[Path], None]
    ) -> tuple[Call, list[Page]] | None:
        """Wait for the copies; return the call to write and its pages, if any.

        Args:
            contents: What to write.
            check: Checks a path that was not known before.
        """
        newest = contents.calls[-1].copies
        assert newest is not None
        # This waits without the interpreter's lock, which the loop needs.
        jax.block_until_ready((newest.arrays, newest.beside))
        call = self._chosen(contents)
        if call is None:
            return None
        assert call.copies is not None
        leaves = call.copies.refilled(newest).leaves()
        for position, leaf in call.frozen.items():
            if leaf.value is None:
                leaf.value = leaves[position]
            leaves[position] = leaf
        number = len(leaves) - len(contents.scalars)
        for name, value in zip(contents.scalars, leaves[number:], strict=True):
            call.keep(name, np.asarray(value)[()])
        del leaves[number:]
        pages: list[Page] = []
        if call.saves:
            path, tree = contents.path, contents.series
            if path is None:
                template = self.paths.template
                path = Path(template.render(call.at, call.logs))
                check(path)
                self.report.saving(call, path)
            assert tree is not None
            own = leaves[: len(tree.layout.leaves)]
            pages.append(tree.page(path, own, in_slot=False))
        tree = contents.slot
        if tree is not None and not (call.saves and tree is contents.series):
            own = leaves[len(leaves) - len(tree.layout.leaves) :]
            slot = self.disk.series.slot()
            pages.append(tree.page(slot, own, in_slot=True))
        return call, pages

    def _chosen(self, contents: Contents) -> Call | None:
        """Take up what devices have decided, and return the call to write, if any."""
        for call in contents.calls:
            if call.wait_for_flag():
                self.report.decided(call)
                if call.saves and contents.path is not None:
                    self.report.saving(call, contents.path)
        wanted = [call for call in contents.calls if call.saves]
        if contents.slot is not None:
            wanted = wanted or contents.calls
        self.report.counts.superseded += max(len(wanted) - 1, 0)
        for call in wanted[:-1]:
            self.report.say(call, "superseded by a newer one before it was written")
        return wanted[-1] if wanted else None

    def put(
        self, call: Call, pages: list[Page], together: Together | None = None
    ) -> None:
        """Write a call, and delete what retention does not keep.

        The caller holds the area's turn, because other objects may write the series.

        Args:
            call: The call.
            pages: Its directories; the path of one that goes aside is changed.
            together: How several processes write each page; None for one process.
        """
        # The lock may have been deleted.
        self.paths.take_lock(pages[0].path if pages else None)
        state, logs = call.kept, plain_scalars(call.logs)
        is_direct, series = True, self.disk.series
        for page in pages:
            settle = nothing
            if self.best_kept is not None and not page.in_slot:
                settle = self.best_kept.place(page, call, logs)
            info = CheckpointInfo(
                path=page.path,
                epoch=call.at.epoch,
                batch=call.at.batch,
                step=call.step,
                logs=logs,
                time=call.time,
                weights_only=self.weights_only and not page.in_slot,
                series=series.slot_name if page.in_slot else series.name,
                state=None if state is None else plain_state(state),
                saved_as=series.saved_as(page.path),
            )
            task, info = self.disk.write(page, info, together)
            is_direct = is_direct and task.is_direct
            self.note_fault(page.path, task.fault)
            settle()
            if self.hooks:
                shown, is_best = series.area.shown(page.path), self.disk.is_best(info)
                self.hooks.note(replace(info, path=shown, is_best=is_best))
            shown = self.report.shown(page.path)
            self.report.say(call, f"finished saving model to {shown}")
        if call.saves:
            for problem in self.disk.prune(resumable=not self.weights_only):
                self.report.warn(problem)
        self.report.count_saved(is_direct=is_direct)
        if self.disk.way.frozen is not None:
            self.report.counts.linked_bytes = self.disk.way.frozen.linked_bytes

    def note_fault(self, path: Path, fault: Exception | None) -> None:
        """Warn if the direct way has failed, and have Orbax write from now on."""
        if fault is not None:
            self.disk.way.writes_directly = False
            self.report.warn(
                f"Orbax wrote {self.report.shown(path)!r} after flaxckpt's direct way "
                f"had failed ({in_one_line(fault)}). Nothing is lost but time: Orbax "
                "writes from now on. Please report it."
            )
