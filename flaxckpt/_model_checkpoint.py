"""`ModelCheckpoint`: a thin facade over template, state, store and retention."""

import difflib
import functools
import inspect
import os
import warnings
import weakref
from collections.abc import Container, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Never, Self

import numpy as np
from etils import epath
from jax.extend.core import get_opaque_trace_state
from jax.sharding import NamedSharding

from flaxckpt._checkpoints.load import check_like, restore
from flaxckpt._checkpoints.retention import LatestN, PreservationPolicy
from flaxckpt._checkpoints.series import Series
from flaxckpt._checkpoints.target import check_root
from flaxckpt._decision.logs import Logs, find, left_out, taken
from flaxckpt._decision.reserved import ADVICE, is_reserved
from flaxckpt._decision.scalars import LARGEST, is_real
from flaxckpt._decision.state import (
    CheckpointState,
    check_state,
    plain_state,
    resumed,
)
from flaxckpt._decision.step import is_no_better, judge, tick
from flaxckpt._decision.template import Template
from flaxckpt._direct.frozen_files import Filter, Frozen
from flaxckpt._disk.info import CheckpointInfo
from flaxckpt._object_store.scratch import mirrored
from flaxckpt._object_store.url import check_readable, is_url
from flaxckpt._orbax.restore import foreign_checkpoints
from flaxckpt._pods.saves import PodSaves
from flaxckpt._processes.clock import AgreedInterval, Interval
from flaxckpt._processes.messages import (
    TIMEOUT_SECS,
    Channel,
    are_several,
    from_leader,
    gathered,
)
from flaxckpt._processes.preemption import AgreedWatch, Watch
from flaxckpt._program.arrivals import Stream
from flaxckpt._program.best_trees import Kept, Snapshot
from flaxckpt._program.handover import finish_programs, stream_tree
from flaxckpt._program.shards import Place, place_of
from flaxckpt._program.traced_update import OUTSIDE, is_traced, runs_in_trace
from flaxckpt._restoring import Restored
from flaxckpt._runtime.forks import use_threads
from flaxckpt._runtime.frames import outside
from flaxckpt._runtime.gone import check_there
from flaxckpt._runtime.patience import looks
from flaxckpt._runtime.unchecked import as_arguments, unchecked
from flaxckpt._saving.call import Entry
from flaxckpt._saving.saves import Saves
from flaxckpt._trees.kinds_of_parts import Weights
from flaxckpt._trees.ties import PyTree, flatten, leaves_of
from flaxckpt._trees.weights import default_weights
from flaxckpt.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointPathError,
    Preempted,
    SettingError,
    TemplateError,
)

_ELSEWHERE = {
    "period": "save_freq",
    "every_n_train_steps": "save_freq",
    "every_n_epochs": "save_freq",
    "save_interval_steps": "save_freq",
    "train_time_interval": "save_interval_secs",
    "save_top_k": "preserve",
    "keep": "max_to_keep",
    "keep_period": "preserve",
    "preservation_policy": "preserve",
    "dirpath": "filepath",
    "filename": "filepath",
    "directory": "filepath",
    "best_mode": "mode",
}


class ModelCheckpoint:
    """Saves a training loop's checkpoints when a metric or the clock of steps says so.

    The JAX counterpart of Keras's callback of that name, with its arguments in its
    order. The object holds settings and the write in progress; what the decision
    remembers is in the `CheckpointState` that `update` takes and returns. Not for use
    by several threads at once.

    Attributes:
        counts: What became of the saves so far, a `SaveCounts`.
        preempted: Whether a signal has told the process to end, and its state is saved.

    Example:
        >>> with ModelCheckpoint("runs/{epoch:02d}-{val_loss:.2f}") as ckpt:
        ...     state = ckpt.init()
        ...     for epoch, loss in enumerate([0.5, 0.25]):
        ...         params = {"w": np.full(2, loss)}
        ...         state = ckpt.update(state, params, {"val_loss": loss}, epoch)
        >>> [info.path.name for info in ckpt.checkpoints]
        ['01-0.50', '02-0.25']
    """

    def __init__(
        self,
        filepath: str | os.PathLike[str],
        monitor: str = "val_loss",
        verbose: int = 0,
        save_best_only: bool = False,
        save_weights_only: bool = False,
        mode: str = "auto",
        save_freq: str | int = "epoch",
        initial_value_threshold: float | None = None,
        *,
        min_delta: float = 0.0,
        save_interval_secs: float | None = None,
        max_to_keep: int | None = None,
        preserve: PreservationPolicy | None = None,
        overwrite: bool = False,
        weights: Weights | None = None,
        save_last: bool | str = False,
        save_on_preemption: bool | str = False,
        sync: bool = True,
        snapshot: str = "auto",
        max_in_flight: int | None = None,
        compress: bool = False,
        engine: str = "auto",
        frozen: Filter | type | None = None,
        stop_on_error: bool = False,
        timeout_secs: float = TIMEOUT_SECS,
        **unknown: Never,
    ) -> None:
        """Check the settings; write nothing.

        Args:
            filepath: Where to save: a path with fields `{epoch}` and `{batch}`, shown
                one-based, and any key of `logs`, in Python's format syntax:
                `"runs/{epoch:02d}-{val_loss:.2f}"`. Each checkpoint is a directory.
                Without fields every save replaces the last. May start with `~`, or with
                `gs://` or `s3://` for one in an object store.
            monitor: Key in `logs` of the value to compare.
            verbose: 1 prints what is decided and saved; 0 is silent.
            save_best_only: Save at a due check only what improves on the best.
            save_weights_only: Save the weights, not the whole training state.
            mode: `"min"`, `"max"`, or `"auto"` to tell from the name of `monitor`.
            save_freq: `"epoch"`: a check is due at the end of each epoch. A number:
                every so many batches.
            initial_value_threshold: The best to improve on at first.
            min_delta: By more than how much an improvement must improve.
            save_interval_secs: A check is due, too, at the first `update` that comes so
                many seconds after the last one that was due, or a `save`; of a run that
                begins or resumes, after its first `update`. Not within jit. In several
                processes the clock of one counts. None for none.
            max_to_keep: Keep so many of the newest checkpoints, and the best one
                beside them if it is not among them. None keeps all.
            preserve: A preservation policy, such as Orbax's, in place of
                `max_to_keep`. The newest and the best are kept whatever it says.
            overwrite: With `save_best_only`, whether a run that did not `restore` may
                replace a better checkpoint of an earlier run at the same path. False:
                the better one stays, and what is not better is saved beside it, at the
                path with `.aside` added, until the run has something better.
            weights: Picks the weights from a tree; None for `default_weights`, which
                knows Flax's `TrainState`, NNX and Equinox.
            save_last: At due checks that save nothing else, save the whole tree in a
                slot beside the checkpoints, named so or `last`: a run that saves only
                the best, or only weights, can be resumed from where it was. `latest`
                and `restore` know it; it is gone once something newer can be resumed.
            save_on_preemption: Handle SIGTERM and SIGINT: the next `update` saves, in
                that slot if nothing else is due, and raises `Preempted`; or with
                `"flag"` sets `preempted`. For the main thread. A second signal ends
                the process as ever.
            sync: Have the disk take a checkpoint before it counts as saved, and before
                anything older is deleted. False for scratch: a crash of the process
                still loses nothing, one of the machine may.
            snapshot: Where a save keeps its copy of the tree until it is written:
                `"device"`; `"host"`, which waits for the values; `"auto"`, on the
                device where there is room; `"none"` for no copy, which waits until it
                is written.
            max_in_flight: How many saves there may be at a time, each with a copy of
                the tree; one more waits. None: as many as fit into 64 MiB, up to 8, or
                else 1.
            compress: Compress the arrays: a few percent smaller, at several times the
                work.
            engine: Orbax saves each tree. `"auto"`: it has flaxckpt write the values
                straight from memory where Orbax has written a tree of the same form
                before. `"orbax"`: it writes them itself, always.
            frozen: Tells of a leaf whether it stays the same for the whole run, as base
                weights do in fine-tuning: a function of its path, a tuple of names,
                and of the leaf; or a type of leaf. An NNX `Variable` is one leaf, so
                NNX's filters work: `nnx.Not(nnx.LoRAParam)`. Such leaves are stored
                once, and linked from each checkpoint. One that changes all the same is
                written again.
            stop_on_error: Where `update` is called in jit, end the program if a save
                has failed, at the next one. False: the error is raised by `wait` or
                `close`, or the next call outside of jit.
            timeout_secs: In several processes, how long to wait for one that does not
                come, before an error is raised in the others.
            **unknown: None; there to name what was meant.

        Raises:
            SettingError: A `ValueError`, if a setting cannot work.
            TemplateError: A `ValueError`, if `filepath` is malformed.
            CheckpointPathError: A `ValueError`, if there is a file where a directory
                has to be.
            TypeError: If there is no such argument.
        """
        if unknown:
            raise TypeError(_unknown_argument(*unknown))
        in_store = is_url(filepath)
        if in_store:
            url = os.fspath(filepath)
            self._template = Template.parse(mirrored(url), url)
        else:
            self._template = Template.parse(filepath)
        self._root = Path(self._template.root)
        self._settings: dict[str, Any] = {
            "monitor": monitor,
            "mode": mode,
            "save_best_only": save_best_only,
            "save_freq": save_freq,
            "initial_value_threshold": initial_value_threshold,
            "min_delta": min_delta,
        }
        self._fresh = CheckpointState.create(**self._settings)
        self._monitor, self._mode = monitor, self._fresh.mode
        if verbose not in (0, 1):
            raise SettingError("verbose", verbose, "pass 0 or 1.")
        if max_to_keep is not None:
            if preserve is not None:
                raise SettingError(
                    "max_to_keep", max_to_keep, "pass it or `preserve`, not both."
                )
            if type(max_to_keep) is not int or max_to_keep < 1:
                raise SettingError(
                    "max_to_keep",
                    max_to_keep,
                    "pass a number of checkpoints of at least 1, or None for all.",
                )
            preserve = LatestN(max_to_keep)
        elif preserve is not None and (
            isinstance(preserve, type) or not hasattr(preserve, "should_preserve")
        ):
            raise SettingError(
                "preserve",
                preserve,
                "pass a preservation policy, such as Orbax's LatestN(3).",
            )
        switches = {
            "save_weights_only": save_weights_only,
            "overwrite": overwrite,
            "sync": sync,
            "compress": compress,
            "stop_on_error": stop_on_error,
        }
        for name, value in switches.items():
            if not isinstance(value, bool | np.bool_):
                raise SettingError(name, value, "pass True or False.")
        if save_interval_secs is not None and not (
            is_real(save_interval_secs) and 0 < save_interval_secs < np.inf
        ):
            raise SettingError(
                "save_interval_secs",
                save_interval_secs,
                "pass a number of seconds above 0, or None.",
            )
        if weights is not None and not callable(weights):
            raise SettingError(
                "weights", weights, "pass a function from a tree to its weights."
            )
        if snapshot not in ("auto", "device", "host", "none"):
            raise SettingError(
                "snapshot", snapshot, 'pass "auto", "device", "host" or "none".'
            )
        if engine not in ("auto", "orbax"):
            raise SettingError("engine", engine, 'pass "auto" or "orbax".')
        if max_in_flight is not None and (
            type(max_in_flight) is not int or max_in_flight < 1
        ):
            raise SettingError(
                "max_in_flight", max_in_flight, "pass a number of at least 1, or None."
            )
        if save_on_preemption not in (False, True, "flag"):
            raise SettingError(
                "save_on_preemption", save_on_preemption, 'pass True, False or "flag".'
            )
        if frozen is not None and not callable(frozen):
            raise SettingError(
                "frozen",
                frozen,
                "pass a function of a leaf's path and the leaf, or a type of leaf.",
            )
        if frozen is not None and (compress or in_store):
            what = "compressed files" if compress else "files in an object store"
            advice = f"{what} are not linked. Pass one of the two."
            raise SettingError("frozen", frozen, advice)
        stored_once = None if frozen is None else Frozen(frozen)
        self._has_policy, self._max_to_keep = preserve is not None, max_to_keep
        self._save_last = bool(save_last)
        self._raise_preempted = save_on_preemption is True
        self._series = Series(
            self._template,
            self._slot_path(save_last),
            policy=preserve,
            monitor=monitor,
            mode=self._mode,
            dtype=np.asarray(self._fresh.best_value).dtype,
            sync=bool(sync),
            compress=bool(compress),
            may_write=engine == "auto",
            frozen=stored_once,
            in_store=in_store,
        )
        make = Saves
        if are_several():
            make = functools.partial(PodSaves, timeout=float(timeout_secs))
            if compress:
                advice = "several processes store what is not compressed. Pass False."
                raise SettingError("compress", compress, advice)
            if engine != "auto":
                advice = 'several processes write shards by themselves. Pass "auto".'
                raise SettingError("engine", engine, advice)
        self._saves = make(
            self._template,
            self._series,
            weights=weights or default_weights,
            weights_only=bool(save_weights_only),
            snapshot=snapshot,
            max_in_flight=max_in_flight,
            frozen=stored_once,
            best_only=bool(save_best_only),
            overwrite=bool(overwrite),
            tell=_print if verbose else None,
        )
        self.counts = self._saves.counts
        check_root(self._root)
        self.preempted = False
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._has_streamed = False
        self._shardings: dict[Any, list[Any]] = {}
        self._stop_on_error = bool(stop_on_error)
        self._stale: CheckpointState | None = None  # it has a new best by now
        self._known: CheckpointState | None = None  # that was returned last
        self._is_plain = (  # a call that finds no new best has nothing else to do
            bool(save_best_only and not save_last and save_interval_secs is None)
            and self._mode != "auto"
            and not self._saves.tells
            and type(self._saves) is Saves
        )
        self._is_warned = self._is_warned_of_best = False
        self._left_out: set[str] = set()  # names in logs that were warned of
        self._by_epoch = save_freq == "epoch"
        self._never_due: bool | None = None  # whether the calls so far never will be
        self._interval: Interval | None = None
        if save_interval_secs is not None:
            self._never_due = False
            self._interval = Interval(save_interval_secs)
            if are_several():
                channel = Channel(f"{self._series.name} interval", timeout_secs)
                self._interval = AgreedInterval(save_interval_secs, channel=channel)
        self._watch: Watch | AgreedWatch | None = None
        if save_on_preemption:
            self._watch = AgreedWatch() if are_several() else Watch()

    # ---- the loop --------------------------------------------------------------------

    def init(self, like: PyTree = None) -> CheckpointState:
        """Return the decision state of a run that has seen nothing yet.

        Args:
            like: What will be saved, if `update` is called within jit on a tree that
                is sharded: there its shardings cannot be seen, and without them all is
                gathered on one device before it is saved. `restore` notes those of its
                `like`, too.
        """
        self._note_shardings(like)
        with unchecked():
            state = CheckpointState.create(**self._settings)
        return as_arguments(state, lambda: leaves_of(like))

    def update(
        self,
        state: CheckpointState,
        tree: PyTree,
        logs: Logs | None,
        epoch: int,
        batch: int | None = None,
        *,
        force: bool = False,
    ) -> CheckpointState:
        """Decide whether to save, and start saving if so.

        Where no check is due, a few microseconds; nothing is looked at but the
        counters. A save copies `tree` on its devices and goes on in the background, so
        `tree` may be donated or changed at once. Where a due check depends on a metric
        that a device still computes, the device decides and copies, and nothing waits;
        `best` in the state returned is then still to come, too. What makes a call wait
        is more saves than `max_in_flight`, see `counts`, or another `snapshot`.

        Within `jit`, `scan`, `while_loop` and `cond` the program decides, and where it
        saves hands the tree over to the host, shard by shard, and goes on. Errors are
        raised by `wait` and `close`; see `stop_on_error`.

        Args:
            state: From `init`, `restore` or the call before.
            tree: What to save: any pytree of arrays and scalars.
            logs: The metrics of now; None for none.
            epoch: Zero-based epoch.
            batch: Zero-based batch within it; None at the end of an epoch.
            force: Save anyway.

        Returns:
            The state for the next call.

        Raises:
            CheckpointWriteError: If an earlier save failed in the background.
            TemplateError: If `logs` lack a field of the filepath.
            CheckpointPathError: If the path cannot be written to.
            UnsupportedLeafError: If `tree` has a leaf that cannot be saved.
            MetricError: If the monitored value is no real scalar.
            SettingError: If `state` is not one of this object's, or epoch or batch are
                no zero-based integers.
            CheckpointLockedError: If another process writes these checkpoints.
            Preempted: If the process was told to end, after saving.
            CheckpointError: Within `vmap`, where each member decides for itself, and
                within `shard_map`; and within jit with `save_interval_secs`.
        """
        self._saves.check()
        preempted = self._is_newly_preempted()
        late = self._interval is not None and self._is_late(self._interval)
        given = state
        if not isinstance(state, CheckpointState):
            check_state(state, self._fresh)
        if given is self._stale:
            self._warn_of_stale()
        state, due = tick(state, epoch, batch)
        if due is np.False_ and force is False and not (preempted or late):
            if self._never_due is None:
                self._never_due = self._by_epoch or batch is None
            if given is self._known:
                self._known = state
            return state
        self._never_due = False
        self._saves.check_parent()
        anyway = preempted or force is not False or due is not np.True_
        if not anyway and self._is_passed_over(given, state, logs, epoch, batch):
            self._stale = None if self._by_epoch else given
            self._known = as_arguments(state, lambda: leaves_of(tree))
            return self._known
        check_state(state, self._fresh)
        check_there("force", [("", force)])
        logs = taken(logs)
        if self._has_policy:
            self._check_policy(logs)
        if is_traced(tree, due, force, epoch, batch, logs, state):
            state = self._update_traced(
                given, state, due, tree, logs, epoch, batch, force
            )
            self._warn_of_left_out(logs)
            return state
        self._finish_programs()
        with unchecked():
            if state.save_best_only and self._saves.lost_best():
                state = self._with_best_on_disk(state)
            entry = Entry(bool(force), epoch, batch, logs, state)
            if due or (late and self._is_comparable(logs)):
                self._saves.decide(entry, now=preempted)
            lasts = (bool(due or late) and self._save_last) or preempted
            path = self._saves.start(tree, entry, lasts=lasts)
        self._restart_interval()
        if preempted:
            self._finish_preempted(path)
        assert entry.state is not None
        improved = entry.save is True and given.save_best_only and not force
        counted = bool(due) and not self._by_epoch
        self._stale = given if improved or counted else None
        self._warn_of_left_out(logs)
        self._known = as_arguments(entry.state, lambda: leaves_of(tree))
        return self._known

    def _is_passed_over(
        self,
        given: CheckpointState,
        state: CheckpointState,
        logs: Any,
        epoch: Any,
        batch: Any,
    ) -> bool:
        """Tell, at the cost of a comparison, that a due check saves nothing.

        Most find no new best. False where more is to be looked at.
        """
        counted = epoch, 0 if batch is None else batch
        return (
            self._is_plain
            and given is self._known
            and all(type(at) is int and 0 <= at < LARGEST for at in counted)
            and is_no_better(state, logs)
            and not self._saves.has_failed
            and not runs_in_trace()
        )

    def _with_best_on_disk(self, state: CheckpointState) -> CheckpointState:
        """Return a state after a save that failed: its best is one that is on disk."""
        stored = {**plain_state(state), "best": None}
        return resumed(self.init(), stored, self._series.durable_best(None))

    def save(
        self,
        tree: PyTree,
        epoch: int,
        batch: int | None = None,
        logs: Logs | None = None,
        state: CheckpointState | None = None,
    ) -> Path:
        """Save now, whatever the policy says, in the background as `update` does.

        Args:
            tree: What to save.
            epoch: Zero-based epoch.
            batch: Zero-based batch within it; None at the end of an epoch.
            logs: The metrics of now; None for none.
            state: The decision state to restore with it; None for none.

        Returns:
            Where the checkpoint will be; it is there when `wait` has returned.

        Raises:
            CheckpointError: As `update`.
        """
        self._saves.check()
        self._saves.check_parent()
        preempted = self._is_newly_preempted()
        logs = taken(logs)
        if is_traced(tree, epoch, batch, logs, state):
            raise CheckpointError(
                "save was called in a running JAX trace (jit, scan...). Call "
                "update(..., force=True) there, which saves when the program runs."
            )
        if state is not None:
            check_state(state, self._fresh)
        self._finish_programs()
        with unchecked():
            entry = Entry(True, epoch, batch, logs, state)
            entry.by_hand = True
            path = Path(self._template.render(entry.epoch, entry.batch, logs))
            self._saves.start(tree, entry, lasts=preempted)
        self._restart_interval()
        if preempted:
            self._finish_preempted(path)
        self._warn_of_left_out(logs)
        return self._series.area.shown(path)

    def save_snapshot(
        self, snapshot: Snapshot, member: int | None = None
    ) -> tuple[Path, ...]:
        """Save what a snapshot holds, the earliest first, as `save` does.

        Args:
            snapshot: What a program has kept.
            member: Whose, if it is that of an ensemble under `vmap`. The index is put
                in the logs, so that `{member}` in the filepath names the checkpoint.

        Returns:
            Where the checkpoints will be; none where nothing was kept.

        Raises:
            SettingError: A `ValueError`, if `member` is not one of the snapshot's, or
                checkpoints of an ensemble would be deleted to keep fewer.
            TemplateError: If two of the checkpoints would be at one path, or there is
                no `{member}` in the filepath of an ensemble's. Nothing is saved then.
            CheckpointError: As `save`.
        """

        def time(kept: Kept) -> tuple[float, float]:
            return kept.epoch, np.inf if kept.batch is None else kept.batch

        if not isinstance(snapshot, Snapshot):
            advice = "pass the flaxckpt.Snapshot first."
            raise SettingError("snapshot", f"<{type(snapshot).__name__}>", advice)
        extra = {} if member is None else {"member": int(member)}
        if extra:
            self._check_for_members()
        entries = [
            (kept, {**kept.logs, **extra})
            for kept in sorted(snapshot.entries(member), key=time)
        ]
        paths = [
            self._template.render(kept.epoch, kept.batch, logs)
            for kept, logs in entries
        ]
        if len(set(paths)) < len(paths):
            raise TemplateError(
                self._template.label,
                f"the snapshot holds {len(paths)} trees, and one would replace "
                "another. Put {epoch} into it, or what else tells them apart.",
            )
        return tuple(
            self.save(kept.tree, kept.epoch, kept.batch, logs) for kept, logs in entries
        )

    def wait(self) -> None:
        """Wait until all that was saved is on disk.

        Of jitted programs that save, those that this thread has called are waited for;
        another thread's must have ended.

        Raises:
            CheckpointWriteError: If a save failed.
        """
        if self._series.area.is_inherited:
            return
        self._finish_streams()
        self._saves.wait()

    def close(self) -> None:
        """Wait as `wait` does, and release thread, lock and signal handlers.

        In a process that was forked from the one that made the object, does nothing.

        Raises:
            CheckpointWriteError: If a save failed.
        """
        if self._series.area.is_inherited:
            return
        try:
            try:
                self._finish_streams()
            except Exception:
                self._saves.close()  # before the lock is given back
                raise
            self._saves.close()
        except Exception as error:
            if late := self._release():
                _warn_beside(error, late)
            raise
        # But not where an interrupt left a save under way.
        if late := self._release():
            warnings.warn(late, stacklevel=outside())
        if self._never_due:
            how = "without `batch`" if self._by_epoch else "with `batch`"
            warnings.warn(
                "No check was ever due: with save_freq="
                f"{self._fresh.save_freq!r} only calls of update {how} count.",
                stacklevel=outside(),
            )

    def _release(self) -> str:
        """Release lock and signal handlers; say if a signal has come to nothing."""
        watch = self._watch
        is_late = self._is_newly_preempted()
        try:
            self._series.area.close()
        finally:
            if watch is not None:
                watch.close()
        if watch is None or not is_late:
            return ""
        return (
            f"{watch.signal} came after the last call of update or save outside of "
            "jit, so no state was saved for it. End the program now."
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Finish the save in flight, also when the loop raised."""
        if error is None:
            self.close()
            return
        said: set[str] = set()
        is_closed = False
        while not is_closed:
            try:
                self.close()
                is_closed = True
            except Warning as warning:  # where a filter makes errors of them
                notes = [f"And: {warning}", *getattr(warning, "__notes__", ())]
                new = [note for note in notes if note not in said]
                for note in new:
                    error.add_note(note)
                said.update(new)
                is_closed = not new  # each close says that
            except CheckpointError as failure:
                is_closed = True
                if isinstance(error, CheckpointError):  # they are told together
                    error.add_note(f"And: {failure}")
                else:
                    _warn_beside(
                        error,
                        "A save failed, too, while another error ended the loop: "
                        f"{failure}",
                    )

    # ---- what there is ---------------------------------------------------------------

    @property
    def checkpoints(self) -> tuple[CheckpointInfo, ...]:
        """The checkpoints of this filepath that are on disk, oldest first."""
        infos, unlisted = self._series.listed()
        self._warn_of_unlisted(unlisted)
        return tuple(map(self._shown, infos))

    def _warn_of_unlisted(self, errors: Iterable[CheckpointError]) -> None:
        for error in errors:
            warnings.warn(f"Left out of the listing: {error}", stacklevel=outside())

    @property
    def latest(self) -> CheckpointInfo | None:
        """What was saved last, of what is on disk, the last slot included, or None."""
        infos, unlisted = self._series.by_age()
        self._warn_of_unlisted(unlisted)
        return self._shown(infos[-1]) if infos else None

    @property
    def best(self) -> CheckpointInfo | None:
        """The checkpoint with the best monitored value, of those on disk.

        None where no checkpoint has one; a NaN is none.

        Raises:
            SettingError: A `ValueError`, if it is not known which way is better.
        """
        self._need_mode()
        return self._series.best_of(self.checkpoints)

    def restore(
        self,
        like: PyTree = None,
        which: str | os.PathLike[str] = "latest",
        *,
        cast: bool = False,
        verify: bool = True,
    ) -> Restored | None:
        """Load a checkpoint, with all that is needed to go on from it.

        Waits for a save that is under way. Changes nothing on disk.

        Args:
            like: A tree of the wanted structure, of arrays or
                `jax.ShapeDtypeStruct`s with shardings; see `flaxckpt.load`.
            which: `"latest"`, `"best"`, or a checkpoint's path or URL; its
                `CheckpointInfo` for that very one.
            cast: Convert where only dtypes differ, rather than raise.
            verify: Check each leaf against the digest of what was saved.

        Returns:
            What was found; None if there is no checkpoint. For `"best"` also if none
            has a number for `monitor`, which warns.

        Raises:
            CheckpointNotFoundError: If `which` is a path and there is none.
            CheckpointCorruptError: If `which` is a path and that one is damaged, or if
                all there are are damaged.
            CheckpointPathError: If this process cannot read what may be the one to
                restore, as for lack of permission: no older one is taken instead.
            CheckpointError: As `flaxckpt.load`.

        Warns:
            UserWarning: Naming each damaged checkpoint that was passed over; or the
                metrics that there are, if there are checkpoints and none of them has
                the monitored one.
        """
        if self._series.area.is_inherited:  # and nothing of the parent's is waited for
            use_threads()
        self.wait()
        check_like(like)
        self._note_shardings(like)
        advice = 'pass "latest", "best" or the path of a checkpoint.'
        check_readable("which", which, advice)
        if is_url(which) or isinstance(which, CheckpointInfo):
            return self._loaded(which, like, cast=cast, verify=verify)
        if which not in ("latest", "best"):
            path = Path(os.path.abspath(os.path.expanduser(which)))
            if (
                isinstance(which, str)
                and os.sep not in which
                and not (
                    os.path.exists(path)  # nor does a name that is too long
                )
            ):
                raise SettingError("which", which, advice)
            return self._loaded(path, like, cast=cast, verify=verify)
        if which == "best":
            self._need_mode()
        candidates, told = self._candidates(which), set[str]()
        errors: dict[str, CheckpointCorruptError] = {}
        is_deleted = True
        while is_deleted:
            # All processes of a run go by what one of them sees.
            found, damaged = from_leader("restore", lambda: next(candidates))
            is_deleted = False
            for problem in sorted(set(damaged) - told):
                warnings.warn(problem, stacklevel=outside())
            told.update(damaged)
            for mark, path in found:
                if mark in errors:
                    continue
                try:
                    loaded = self._loaded(
                        path,
                        like,
                        cast=cast,
                        verify=verify,
                        mark=mark,
                        damaged=errors,
                    )
                    if loaded.epoch is not None:
                        return loaded
                    is_deleted = True  # its record was, and it was loaded without
                    break
                except CheckpointNotFoundError:
                    is_deleted = True  # by a writer that has saved a newer one
                    break
                except CheckpointCorruptError as error:
                    errors[mark] = error
                    warnings.warn(
                        f"PASSED OVER: checkpoint {error.path!r} is damaged "
                        f"({error.problem}). "
                        "restore tries the next one.",
                        stacklevel=outside(),
                    )
        if errors:
            raise next(iter(errors.values()))
        if which == "best":
            self._warn_of_no_value()
        self._warn_of_others()
        return None

    # ---- how -------------------------------------------------------------------------

    def _update_traced(
        self,
        before: CheckpointState,
        state: CheckpointState,
        due: Any,
        tree: PyTree,
        logs: Logs | None,
        epoch: Any,
        batch: Any,
        force: Any,
    ) -> CheckpointState:
        """Update within a program that is being traced, after `tick`."""
        state, save = judge(state, logs, due)
        state, stream = stream_tree(
            self._saves,
            tree,
            logs,
            epoch,
            batch,
            before=before,
            state=state,
            due=due,
            save=save | force,
            lasts=due if self._save_last else np.False_,
            places=self._places(tree),
            stops=self._stop_on_error,
        )
        self._streams.add(stream)
        self._has_streamed = True
        return state

    def _places(self, tree: PyTree) -> list[Place | None]:
        """Tell how a tree of traced values is sharded, as far as that is known."""
        flat = flatten(tree)
        leaves, structure = flat.leaves, flat.key
        if self._shardings and structure not in self._shardings:
            warnings.warn(
                "update saves a tree of another structure than `like` of init or "
                "restore has, so it is not known how it is sharded, and all of it is "
                "gathered before it is saved. Pass init(like=...) what is saved.",
                stacklevel=outside(),
            )
        known = self._shardings.get(structure, [None] * len(leaves))
        return list(map(place_of, leaves, known))

    def _note_shardings(self, like: PyTree) -> None:
        flat = flatten(like)
        shardings = [getattr(leaf, "sharding", None) for leaf in flat.leaves]
        if any(isinstance(each, NamedSharding) for each in shardings):
            self._shardings = {flat.key: shardings}

    def _finish_programs(self) -> None:
        """Let what programs save come before what is saved outside of them.

        A copy is made when the program that computes its values has ended, and that may
        wait for the very memory.
        """
        if self._has_streamed:
            finish_programs()

    def _finish_streams(self) -> None:
        """Wait for what running programs have still to hand over."""
        self._finish_programs()
        for stream in self._streams:
            stream.reset()

    def _check_for_members(self) -> None:
        """Check that members of an ensemble do not replace or displace each other."""
        if "member" not in self._template.fields:
            raise TemplateError(
                self._template.label,
                "the members of an ensemble would replace each other. Put {member} "
                "into it.",
            )
        if self._has_policy:
            number = self._max_to_keep
            raise SettingError(
                "preserve" if number is None else "max_to_keep",
                "<a policy>" if number is None else number,
                "the members of an ensemble count as one series, of which it would "
                "keep so many in all. A snapshot's `keep` holds that many of each.",
            )

    def _need_mode(self) -> None:
        if self._mode == "auto":
            raise SettingError(
                "monitor",
                self._monitor,
                "whether this metric is better low or high is not known by its name. "
                'Pass mode="min" or mode="max".',
            )

    def _slot_path(self, save_last: bool | str) -> Path:
        """Return where the last state is saved if nothing else is."""
        name = save_last if isinstance(save_last, str) else "last"
        if not name or name in (".", "..") or "/" in name or "\0" in name:
            raise SettingError("save_last", save_last, "pass True, or a file's name.")
        if is_reserved(name):
            raise SettingError("save_last", save_last, f"it is {ADVICE}")
        path = self._root / name
        if not save_last and self._template.text == str(path):
            path = self._root / "preempted"
        if save_last and self._template.text == str(path):
            raise SettingError(
                "save_last",
                save_last,
                f"the checkpoints themselves are saved at {str(path)!r}. Pass another "
                "name.",
            )
        return path

    def _warn_of_stale(self) -> None:
        if not self._is_warned:
            self._is_warned = True
            warnings.warn(
                "update got the same state as in the call before, so the decision of "
                "that call is lost, and each call may save. "
                "Write state = ckpt.update(state, ...).",
                stacklevel=outside(),
            )

    def _warn_of_left_out(self, logs: Logs) -> None:
        """Say once what of metrics no record keeps."""
        new = {
            name: problem
            for name, problem in left_out(logs).items()
            if name not in self._left_out
        }
        if new:
            self._left_out |= new.keys()
            each = ", ".join(f"{name!r} {problem}" for name, problem in new.items())
            warnings.warn(
                f"Not all of logs is saved with a checkpoint: {each}, and a record "
                "keeps numbers and text. Reduce it to a scalar, or leave it out.",
                stacklevel=outside(),
            )

    def _check_policy(self, logs: Logs | None) -> None:
        """Warn if the best, which retention spares, cannot be known."""
        if self._is_warned_of_best or not logs:
            return
        name = self._monitor
        if find(logs, name) not in logs:
            problem = f"logs has no {name!r}, only {', '.join(map(repr, logs))}"
        elif self._mode == "auto":
            problem = f"whether {name!r} is better low or high is not known: pass mode"
        else:
            return
        self._is_warned_of_best = True
        warnings.warn(
            f"{problem}. So it is not known which checkpoint is the best, and it is "
            "not kept beside those that max_to_keep or preserve keep.",
            stacklevel=outside(),
        )

    def _is_newly_preempted(self) -> bool:
        watch = self._watch
        return watch is not None and not self.preempted and watch.look() is not None

    def _is_late(self, interval: Interval) -> bool:
        if get_opaque_trace_state(convention="nnx") != OUTSIDE:
            raise CheckpointError(
                "update was called in a running JAX trace (jit, scan...), where there "
                "is no clock for save_interval_secs. Call it between the parts of "
                "flaxckpt.scan_in_chunks, or go by save_freq alone."
            )
        return interval.is_over()

    def _is_comparable(self, logs: Logs | None) -> bool:
        """Tell whether a check due by the clock is more than one for the slot.

        Between the ends of epochs there often is no value to compare.
        """
        has_value = find(logs or {}, self._monitor) in (logs or {})
        return has_value or not (self._save_last and self._fresh.save_best_only)

    def _restart_interval(self) -> None:
        if self._interval is not None:
            self._interval.restart()

    def _finish_preempted(self, path: Path | None) -> None:
        """Make sure that what was saved is on disk, and tell the loop."""
        self.wait()
        self.preempted = True
        if self._raise_preempted and self._watch is not None:
            latest = self.latest
            shown = path and self._series.area.shown(path)
            if latest is not None and not latest.weights_only:
                shown = latest.path
            raise Preempted(str(self._watch.signal), str(shown))

    def _candidates(
        self, which: Any
    ) -> Iterator[tuple[list[tuple[str, str]], list[str]]]:
        """List what to try to restore from, in order, anew each time.

        Yields:
            For each checkpoint what tells it from any other, and its path; and what is
            wrong with those that cannot be listed.

        Raises:
            CheckpointCorruptError: If there are none, and some are damaged.
            CheckpointPathError: If what may be the one to restore cannot be read.
            CheckpointError: If they were deleted as fast as they were listed.
        """
        for _ in looks():
            if which == "best":
                infos, beside = self._series.listed()
                infos = self._series.ranked(infos)
            else:
                infos, beside = self._series.by_age()
                infos = infos[::-1]
            ours = [e for e in beside if self._series.may_be_ours(e.path)]
            for error in ours:
                if isinstance(error, CheckpointPathError):
                    raise error
            damaged = [e for e in beside if isinstance(e, CheckpointCorruptError)]
            if not infos and damaged:
                raise damaged[0]
            shown = self._series.area.shown
            places = [(str(info.time), str(shown(info.path))) for info in infos]
            told = [f"PASSED OVER: {e}" for e in damaged if e in ours]
            others = [e for e in beside if isinstance(e, CheckpointPathError)]
            yield places, told + [f"Left out: {e}" for e in others]
        raise CheckpointError(
            f"The checkpoints in {str(self._series.area.shown(self._root))!r} were "
            "deleted faster than they could be loaded. Restore again, or keep more of "
            "them (max_to_keep)."
        )

    def _shown(self, info: CheckpointInfo) -> CheckpointInfo:
        return replace(info, path=self._series.area.shown(info.path))

    def _loaded(
        self,
        path: str | os.PathLike[str],
        like: PyTree,
        *,
        cast: bool,
        verify: bool,
        mark: str | None = None,
        damaged: Container[str] = (),
    ) -> Restored:
        """Load a checkpoint, in all processes or in none.

        Those that were found to be damaged, by their times, are nothing to beat.

        Raises:
            CheckpointNotFoundError: Also if it is not the one that was listed there.
        """
        shown = os.fspath(path)
        where: Any = epath.Path(shown) if is_url(shown) else Path(shown)
        found, problem = None, None
        try:
            found = restore(path, like, cast=cast, verify=verify)
            if mark is not None and found.info and str(found.info.time) != mark:
                raise CheckpointNotFoundError(shown, (), "it was replaced meanwhile")
        except CheckpointError as error:
            problem = error
        gathered("restored", problem)  # raises what any of them met
        assert found is not None
        tree, info = found.tree, found.info
        if like is not None:
            self._note_shardings(tree)  # `like` may have placed whole subtrees
        durable = from_leader("best", lambda: self._series.durable_best(info, damaged))
        with unchecked():
            state = resumed(self.init(), info and info.state, durable)
        state = as_arguments(state, lambda: leaves_of(tree))
        if info is None:  # plain Orbax's
            return Restored(
                tree=tree, state=state, epoch=None, batch=None, logs={}, path=where
            )
        return Restored(
            tree=tree,
            state=state,
            epoch=info.epoch,
            batch=info.batch,
            logs=info.logs,
            path=where,
        )

    def _warn_of_no_value(self) -> None:
        """Warn if there are checkpoints, but none has a value to be the best by."""
        infos = self._series.listed()[0]
        if not infos:
            return
        there = sorted({name for info in infos for name in info.logs})
        advice = 'Their logs are empty. Pass logs, or restore(which="latest").'
        if there:
            advice = (
                f"Their logs have: {', '.join(map(repr, there))}. Pass one of these as "
                '`monitor`, or restore(which="latest").'
            )
        warnings.warn(
            "No best checkpoint to restore: no checkpoint has a number for "
            f"{self._monitor!r}. {advice}",
            stacklevel=outside(),
        )

    def _warn_of_others(self) -> None:
        """Warn if nothing was found for the reason that the filepath was changed."""
        template, others = self._template, self._series.others()
        foreign = foreign_checkpoints(self._root)
        if (others or foreign) and not self._series.listed()[0]:
            there = [f"checkpoints of other filepaths: {', '.join(others)}"] * bool(
                others
            ) + [f"checkpoints of plain Orbax: {', '.join(foreign)}"] * bool(foreign)
            path = os.path.join(template.root, template.name)
            warnings.warn(
                f"No checkpoint of {path!r} to restore, but there are "
                f"{' and '.join(there)}. Restore one of those by its path, as in "
                "restore(which=path).",
                stacklevel=outside(),
            )


def _warn_beside(error: BaseException, message: str) -> None:
    """Warn beside an error; where a filter makes an error of that, note it on this."""
    try:
        warnings.warn(message, stacklevel=outside())
    except Warning:
        error.add_note(f"And: {message}")


def _print(message: str) -> None:
    print(f"{message}\n", end="", flush=True)  # in one piece, for others write too


def _unknown_argument(*names: str) -> str:
    known = list(inspect.signature(ModelCheckpoint).parameters)[:-1]
    name = names[0]
    meant = _ELSEWHERE.get(name) or next(
        iter(difflib.get_close_matches(name, known)), ""
    )
    hint = f"Did you mean {meant!r}?" if meant else f"It takes {', '.join(known)}."
    return f"ModelCheckpoint got an unknown argument {name!r}. {hint}"
