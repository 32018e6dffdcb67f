"""`update` and `save`: from the loop's call to the save that it starts."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flaxckpt._checkpoints.series import Series
from flaxckpt._decision.logs import Logs, with_values
from flaxckpt._decision.moment import Moment
from flaxckpt._decision.state import CheckpointState, check_state
from flaxckpt._decision.step import count_batches, need_steps, tick, without_improvement
from flaxckpt._pods.saves import PodSaver
from flaxckpt._program.traced_update import Programs
from flaxckpt._restoring import Restorer
from flaxckpt._runtime.frames import outside
from flaxckpt._runtime.gone import check_there
from flaxckpt._runtime.traces import is_traced, runs_in_trace
from flaxckpt._runtime.unchecked import as_arguments, unchecked
from flaxckpt._saving.advice import Advice
from flaxckpt._saving.call import Call
from flaxckpt._saving.count import Count
from flaxckpt._saving.saves import Saver
from flaxckpt._saving.triggers import Triggers
from flaxckpt._settings import Settings
from flaxckpt._trees.ties import PyTree, leaves_of
from flaxckpt.errors import CheckpointError, Preempted


@dataclass(eq=False, repr=False)
class Updater:
    """The calls of `update` and `save`, each of which may start a save."""

    settings: Settings
    series: Series
    saves: Saver | PodSaver
    programs: Programs
    restorer: Restorer
    triggers: Triggers
    advice: Advice
    count: Count
    # The state that the last call replaced by another: the loop must not pass it again.
    _replaced: CheckpointState | None = None
    _known: CheckpointState | None = None  # the state that the last call returned
    _is_new_to_trees: bool = True  # until a call that saves nothing brings a tree
    _has_met: bool = False  # with the other processes, if there are several
    # None before the first check of it; True while no call could be due.
    _never_due: bool | None = None

    def update(
        self,
        state: CheckpointState,
        tree: PyTree,
        logs: Logs | None,
        epoch: Any,
        batch: Any,
        step: Any,
        *,
        force: bool,
    ) -> CheckpointState:
        """Decide whether to save, and start the save."""
        self._meet()
        self.saves.check()
        preempted = self.triggers.is_newly_preempted()
        overdue = self.triggers.is_interval_over()
        given = state
        if not isinstance(state, CheckpointState):
            check_state(state, self.settings.fresh)
        if given is self._replaced:
            self.advice.of_same_state()
        # numpy's own True or False, unless a trace or a device has the answer
        if step is not None or epoch is None:
            self._check_step(Moment(epoch, batch, step), state, force=force)
        state, due = tick(state, epoch, batch, step)
        if batch is not None and self.settings.clock_counts:
            state = count_batches(state, epoch, batch)
        if due is np.False_ and force is False and not (preempted or overdue):
            if self._never_due is None:
                is_end = batch is None and step is None
                self._never_due = self.settings.by_epoch or is_end
            if self._is_new_to_trees:
                self._is_new_to_trees = False
                self.saves.prepare(tree)
            if given is self._known:
                self._known = state
            return state
        self._never_due, at = False, Moment(epoch, batch, step)
        self.saves.check_parent()  # a forked child must tell nobody of its error
        with self.saves.telling_others():
            anyway = preempted or force is not False or due is not np.True_
            if not anyway and (after := self._without_save(given, state, logs, at)):
                self._replaced = None if self.settings.by_epoch else given
                self._known = as_arguments(after, lambda: leaves_of(tree))
                return self._known
            check_state(state, self.settings.fresh)
            check_there("force", [("", force)])
            logs = with_values(logs)
            self.advice.of_no_best(logs)
            if is_traced(due, force, at, logs, state):
                state = self.programs.update(given, state, due, tree, logs, at, force)
                self.advice.of_left_out(logs)
                return state
            self.programs.finish()
            with unchecked():
                if state.save_best_only and self.saves.lost_best():
                    state = self.restorer.with_best_on_disk(state)
                call = Call(bool(force), at, logs, state)
                call.clock_counts = self.settings.clock_counts
                if force is not False and self.settings.by_epoch:
                    call.seen = self._seen_by_hand(call.at)
                if due or (overdue and self.triggers.is_comparable(logs)):
                    if state.save_best_only:
                        self.saves.decide(call, now=preempted)
                    else:
                        call.count_stale(lambda: leaves_of(tree))
        to_slot = bool((due or overdue) and self.settings.save_last) or preempted
        with unchecked():
            path = self.saves.start(tree, call, to_slot=to_slot)
        self.triggers.restart()
        if preempted:
            self._finish_preempted(path)
        self.saves.raise_earlier()
        assert call.state is not None
        improved = call.saves and given.save_best_only and not force
        counted = bool(due) and not self.settings.by_epoch
        self._replaced = given if improved or counted else None
        self.advice.of_left_out(logs)
        self._known = as_arguments(call.state, lambda: leaves_of(tree))
        return self._known

    def _check_step(self, at: Moment, state: CheckpointState, *, force: bool) -> None:
        """Check a call with a global step, or without any moment."""
        at.check()
        if not (self.settings.goes_by_clock or force is not False):
            need_steps(state)

    def _meet(self) -> None:
        """Find out at the first call whether saves will work, and not hours later."""
        if not self._has_met:
            self.saves.meet()
            self._has_met = True

    def _without_save(
        self,
        given: CheckpointState,
        state: CheckpointState,
        logs: Any,
        at: Moment,
    ) -> CheckpointState | None:
        """Return the state after a due check that, by one comparison, saves nothing.

        Most due checks find no new best. None means that `update` has to look further.
        """
        if (
            self.settings.goes_by_best_alone
            and given is self._known
            and at.is_plain
            and not self.saves.report.has_failed
            and not runs_in_trace()
        ):
            return without_improvement(state, logs)
        return None

    def save(
        self,
        tree: PyTree,
        at: Moment,
        logs: Logs | None,
        state: CheckpointState | None,
    ) -> Path:
        """Save now, whatever the policy says; return the checkpoint's path or URL."""
        self._meet()
        self.saves.check()
        self.saves.check_parent()  # a forked child must tell nobody of its error
        preempted = self.triggers.is_newly_preempted()
        with self.saves.telling_others():
            logs = with_values(logs)
            if is_traced(at, logs, state):
                raise CheckpointError(
                    "save was called in a running JAX trace (jit, scan...). Call "
                    "update(..., force=True) there, which saves when the program runs."
                )
            if state is not None:
                check_state(state, self.settings.fresh)
            self.programs.finish()
            with unchecked():
                call = Call(True, at, logs, state)
                call.by_hand, call.seen = True, self._seen_by_hand(call.at)
                template = self.settings.template
                path = Path(template.render(call.at, logs))
        with unchecked():
            self.saves.start(tree, call, to_slot=preempted)
        self.triggers.restart()
        if preempted:
            self._finish_preempted(path)
        self.saves.raise_earlier()
        self.advice.of_left_out(logs)
        return self.series.area.shown(path)

    def _seen_by_hand(self, at: Moment) -> int | None:
        """Return how many batches a run has seen at a save by hand; None for epochs."""
        batches = None if self._known is None else self._known.batches
        counts = self.settings.clock_counts or not self.settings.by_epoch
        if counts and type(batches) is np.int32:
            return int(batches)
        return None if at.batch is None else self.count.note(at)

    def _finish_preempted(self, path: Path | None) -> None:
        """Wait until the save is on disk, and tell the loop of the preemption."""
        self.programs.reset()
        self.saves.join()  # not `wait`: an earlier save's error must not come first
        self.triggers.preempted = True
        if self.settings.save_on_preemption is True:
            latest = self.restorer.latest()
            shown = path and self.series.area.shown(path)
            if latest is not None and not latest.weights_only:
                shown = latest.path
            preempted = Preempted(self.triggers.signal, str(shown))
            self.saves.add_earlier(preempted)
            raise preempted

    def warn_if_never_due(self) -> None:
        """Warn if all calls of `update` were of a kind that is never due."""
        if self._never_due and not self.settings.goes_by_clock:
            how = "without `batch`"
            if not self.settings.by_epoch:
                how = "with `batch` or `step`"
            warnings.warn(
                "No check was ever due: with save_freq="
                f"{self.settings.fresh.save_freq!r} only calls of update {how} count.",
                stacklevel=outside(),
            )
