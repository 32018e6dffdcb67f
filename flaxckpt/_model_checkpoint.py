"""`ModelCheckpoint`: the facade over the decision, the saves and the series on disk."""

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
from flaxckpt._pods.saves import PodSaver
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
from flaxckpt._saving.call import Call
from flaxckpt._saving.parts import SaverParts
from flaxckpt._saving.saves import Saver
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
    """Save a training loop's checkpoints when a metric, a count or a clock says so.

    This is the JAX counterpart of Keras's callback of the same name, with the same
    arguments in the same order. The object holds the settings and the saves under way.
    The decision's memory is the `CheckpointState` that `update` takes and returns. Only
    one thread at a time may use the object.

    Attributes:
        counts: A `SaveCounts` of the saves so far.
        preempted: Whether a signal has told the process to end, and a save for it is
            on disk.

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
            filepath: Template of the checkpoints' paths, in Python's format syntax:
                `"runs/{epoch:02d}-{val_loss:.2f}"`. Its fields are `{epoch}` and
                `{batch}`, both shown one-based, and the keys of `logs`. Each checkpoint
                is a directory. Without fields each save replaces the one before. The
                template may start with `~`, or with `gs://` or `s3://` for an object
                store.
            monitor: Key in `logs` of the value to compare.
            verbose: 1 prints decisions and saves; 0 prints nothing.
            save_best_only: Whether a due check saves only what improves on the best.
            save_weights_only: Whether to save the weights, not the whole tree.
            mode: `"min"`, `"max"`, or `"auto"` to tell from the name of `monitor`.
            save_freq: When a check is due: `"epoch"` for the end of each epoch, a
                number for every so many batches.
            initial_value_threshold: The first best value; None for no best value.
            min_delta: The difference from the best that an improvement must exceed.
            save_interval_secs: Make a check due, too, at the first `update` that comes
                this many seconds after the last due check, forced `update` or `save`.
                The time begins at the first `update`. Not within jit. In several
                processes the clock of process 0 counts. None for no such check.
            max_to_keep: Keep this many of the newest checkpoints, and the best one too
                if it is not among them. None keeps all.
            preserve: A preservation policy, such as Orbax's, in place of
                `max_to_keep`. The newest and the best checkpoint are always kept.
            overwrite: With `save_best_only`, whether a save may replace a better
                checkpoint at its path, such as one of an earlier run that this run did
                not `restore`. If False, `update` saves to the path with `.aside` added
                until its save is at least as good; `save` takes the path, and moves the
                better checkpoint aside.
            weights: A function from a tree to its weights; None for `default_weights`,
                which knows Flax's `TrainState`, NNX and Equinox.
            save_last: Keep a slot beside the checkpoints, named `last` or by this text.
                A due check saves the whole tree there unless it saves it as a
                checkpoint. So a run that saves only the best, or only weights, can be
                resumed. `latest` and `restore` include the slot. It is deleted once a
                newer checkpoint can be resumed from.
            save_on_preemption: Handle SIGTERM and SIGINT (in several processes,
                SIGTERM). After a signal the next `update` or `save` saves the whole
                tree, in the slot if not as a checkpoint, and raises `Preempted` when it
                is on disk. `"flag"` only sets `preempted`, and raises nothing. A second
                signal ends the process as usual. Make the object in the main thread.
            sync: Whether to sync a checkpoint to the disk before it counts as saved and
                before an older one is deleted. With False, a crash of the machine may
                lose checkpoints; a crash of the process still loses none.
            snapshot: Where a save copies the tree to. `"device"` copies on its devices;
                `"host"` waits for the values; `"auto"` copies on the devices unless one
                reports too little room; `"none"` copies nothing, and waits until the
                checkpoint is written.
            max_in_flight: How many saves may be under way, each with a copy of the
                tree, before a call waits. None allows as many as fit into 64 MiB, at
                least 1 and at most 8; in several processes, 1.
            compress: Whether to compress the arrays: a few percent smaller, at several
                times the work.
            engine: Who writes the values. Orbax saves each tree. With `"auto"` it has
                flaxckpt write the values straight from memory once it has written a
                tree of the same form itself; with `"orbax"` it writes all values.
            frozen: Picks the leaves that stay the same for the whole run, such as base
                weights in fine-tuning: a function of a leaf's path (a tuple of names)
                and the leaf, or a type of leaf. An NNX `Variable` is one leaf, so NNX's
                filters work: `nnx.Not(nnx.LoRAParam)`. A frozen leaf is stored once,
                and linked from each checkpoint; if it changes, it is written again.
            stop_on_error: Whether a program that calls `update` in jit ends at its next
                save after a save has failed. If False, `wait`, `close` or the next call
                outside of jit raises the error.
            timeout_secs: In several processes, after how many seconds the others raise
                an error if a process does not come. In `restore` it is always 600.
            **unknown: Refused with an error that suggests the right name.

        Raises:
            SettingError: A `ValueError`, if a setting cannot work.
            TemplateError: A `ValueError`, if `filepath` is malformed.
            CheckpointPathError: A `ValueError`, if a file or a link that leads nowhere
                is in the place of a directory, or if a name is too long.
            TypeError: If an argument is unknown.
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
        make = Saver
        if are_several():
            make = functools.partial(PodSaver, timeout=float(timeout_secs))
            if compress:
                advice = "several processes store what is not compressed. Pass False."
                raise SettingError("compress", compress, advice)
            if engine != "auto":
                advice = 'several processes write shards by themselves. Pass "auto".'
                raise SettingError("engine", engine, advice)
        parts = SaverParts(
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
        self._saves = make(parts)
        self.counts = self._saves.counts
        check_root(self._root)
        self.preempted = False
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._has_streamed = False
        self._shardings: dict[Any, list[Any]] = {}
        self._stop_on_error = bool(stop_on_error)
        # The state that the last call was given and replaced: not to be given again.
        self._stale: CheckpointState | None = None
        self._known: CheckpointState | None = None  # the state returned last
        self._is_plain = (  # a call that finds no new best has nothing else to do
            bool(save_best_only and not save_last and save_interval_secs is None)
            and self._mode != "auto"
            and not verbose
            and type(self._saves) is Saver
        )
        self._is_warned = self._is_warned_of_best = False
        self._left_out: set[str] = set()  # names in logs that were warned of
        self._by_epoch = save_freq == "epoch"
        self._never_due: bool | None = None  # True while calls are of a kind never due
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
            like: A sharded tree that `update` will save within jit, or
                `jax.ShapeDtypeStruct`s of it. Within jit its shardings cannot be seen;
                without `like`, each save gathers the whole tree on one device.
                `restore` notes the shardings of its own `like`, too.

        Returns:
            The state for the first call of `update`.
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
        """Decide whether to save, and start the save.

        A call without a due check takes a few microseconds and looks only at the
        counters. A save copies `tree` on its devices and then writes in the background,
        so the loop may donate or change `tree` at once. If the decision depends on a
        metric that a device still computes, the device decides and copies, and `best`
        in the returned state is still to come, too. A call may wait for an earlier save
        while `max_in_flight` saves are under way (see `counts`), and for a metric that
        is on other devices than `tree`, or beside offloaded arrays. With
        `snapshot="host"` it waits for the values, with `"none"` for the disk.

        Within `jit`, `scan`, `while_loop` and `cond` the program decides. If it saves,
        it hands the tree to the host, shard by shard, and goes on. `wait` and `close`
        raise the errors of these saves; see `stop_on_error`.

        Args:
            state: What `init`, `restore` or the last `update` returned.
            tree: What to save: any pytree of arrays and scalars.
            logs: The current metrics; None for none.
            epoch: Zero-based epoch, an integer or i32[].
            batch: Zero-based batch within the epoch, likewise; None at the end of an
                epoch.
            force: Whether to save in any case, bool[].

        Returns:
            The state for the next call.

        Raises:
            CheckpointWriteError: If an earlier save failed in the background.
            TemplateError: If `logs` lack a field of the filepath.
            CheckpointPathError: If no checkpoint can be written at the path.
            UnsupportedLeafError: If `tree` has a leaf that cannot be saved.
            MetricError: If the monitored value is not a real scalar, or if a metric was
                deleted or donated.
            SettingError: If `state` has other settings, if `tree` has no values, or if
                epoch or batch is not a zero-based integer.
            CheckpointLockedError: If another process writes these checkpoints.
            Preempted: After the save is on disk, if a signal told the process to end.
            CheckpointError: Within `vmap`, where each member decides for itself; within
                `shard_map`; and within jit with `save_interval_secs` or in several
                processes.
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
            call = Call(bool(force), epoch, batch, logs, state)
            if due or (late and self._is_comparable(logs)):
                self._saves.decide(call, now=preempted)
            lasts = (bool(due or late) and self._save_last) or preempted
            path = self._saves.start(tree, call, lasts=lasts)
        self._restart_interval()
        if preempted:
            self._finish_preempted(path)
        assert call.state is not None
        improved = call.saves and given.save_best_only and not force
        counted = bool(due) and not self._by_epoch
        self._stale = given if improved or counted else None
        self._warn_of_left_out(logs)
        self._known = as_arguments(call.state, lambda: leaves_of(tree))
        return self._known

    def _is_passed_over(
        self,
        given: CheckpointState,
        state: CheckpointState,
        logs: Any,
        epoch: Any,
        batch: Any,
    ) -> bool:
        """Tell by one comparison that a due check saves nothing.

        Most due checks find no new best. False means that `update` has to look further.
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
        """Return a state whose best is the best on disk, after a save has failed."""
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
        """Save now, whatever the policy says; the writing goes on in the background.

        With `save_best_only`, a better checkpoint at the path moves aside; see
        `overwrite`.

        Args:
            tree: What to save.
            epoch: Zero-based epoch.
            batch: Zero-based batch within the epoch; None at the end of an epoch.
            logs: The current metrics; None for none.
            state: The decision state for `restore` to return; None for none.

        Returns:
            The checkpoint's path or URL. The checkpoint is there after `wait`.

        Raises:
            CheckpointError: As `update`; also within any JAX trace.
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
            call = Call(True, epoch, batch, logs, state)
            call.by_hand = True
            path = Path(self._template.render(call.epoch, call.batch, logs))
            self._saves.start(tree, call, lasts=preempted)
        self._restart_interval()
        if preempted:
            self._finish_preempted(path)
        self._warn_of_left_out(logs)
        return self._series.area.shown(path)

    def save_snapshot(
        self, snapshot: Snapshot, member: int | None = None
    ) -> tuple[Path, ...]:
        """Save the trees of a snapshot, the earliest first, as `save` does.

        Args:
            snapshot: A snapshot that a program has filled.
            member: Index of the ensemble's member, for a snapshot made under `vmap`;
                otherwise None. The logs get the index, so `{member}` in the filepath
                shows it.

        Returns:
            The checkpoints' paths or URLs; none if the snapshot is empty.

        Raises:
            SettingError: A `ValueError`, if `snapshot` is no `Snapshot` or has no such
                member, or if `max_to_keep` or `preserve` would delete checkpoints of
                other members.
            TemplateError: If two checkpoints would have the same path, or if the
                filepath lacks `{member}` for an ensemble. Nothing is saved then.
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
        """Wait until every save is on disk.

        The call also waits for the jitted programs with saves that this thread has
        called; those of other threads must have ended. In a process that was forked
        from the one that made the object, the call does nothing.

        Raises:
            CheckpointWriteError: If a save failed.
        """
        if self._series.area.is_inherited:
            return
        self._finish_streams()
        self._saves.wait()

    def close(self) -> None:
        """Wait as `wait` does, then release copies, lock and signal handlers.

        In a process that was forked from the one that made the object, the call does
        nothing.

        Raises:
            CheckpointWriteError: If a save failed.

        Warns:
            UserWarning: If no check was ever due, or if a signal came after the last
                `update` or `save`.
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
        # After an interrupt, which is no `Exception`, a save may still need the lock.
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
        """Release lock and signal handlers; say if no state was saved for a signal."""
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
        """Finish the saves under way, also when the loop raised."""
        if error is None:
            self.close()
            return
        said: set[str] = set()
        is_closed = False
        while not is_closed:
            try:
                self.close()
                is_closed = True
            except Warning as warning:  # raised where a filter makes warnings errors
                notes = [f"And: {warning}", *getattr(warning, "__notes__", ())]
                new = [note for note in notes if note not in said]
                for note in new:
                    error.add_note(note)
                said.update(new)
                is_closed = not new  # some warnings come at every close
            except CheckpointError as failure:
                is_closed = True
                if isinstance(error, CheckpointError):  # one traceback shows both
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
        """The newest checkpoint on disk, the slot of `save_last` included, or None."""
        infos, unlisted = self._series.by_age()
        self._warn_of_unlisted(unlisted)
        return self._shown(infos[-1]) if infos else None

    @property
    def best(self) -> CheckpointInfo | None:
        """The checkpoint on disk with the best monitored value.

        None if no checkpoint has a number for `monitor`. A NaN does not count.

        Raises:
            SettingError: A `ValueError`, if the direction of `monitor` is not known.
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
        """Load a checkpoint, with the decision state to go on from it.

        The call first waits for saves under way. It changes nothing on disk. In several
        processes, every one must call it.

        Args:
            like: A tree of the wanted structure, of arrays or
                `jax.ShapeDtypeStruct`s with shardings; see `flaxckpt.load`.
            which: `"latest"`, `"best"`, or a checkpoint's path or URL. A
                `CheckpointInfo` stands for that very checkpoint.
            cast: Convert leaves that differ only in dtype, rather than raise.
            verify: Check each leaf against the digest of what was saved.

        Returns:
            The checkpoint; None if there is none, or if `which` is `"best"` and no
            checkpoint has a number for `monitor`.

        Raises:
            CheckpointNotFoundError: If no checkpoint is at the path `which`.
            CheckpointCorruptError: If the checkpoint at the path `which` is damaged, or
                if all checkpoints are damaged.
            CheckpointPathError: If this process cannot read a checkpoint that may be
                the one to restore, for lack of permission, say. The call does not take
                an older one instead.
            SettingError: A `ValueError`, if `which` is none of these, or if it is
                `"best"` and the direction of `monitor` is not known.
            CheckpointError: As `flaxckpt.load`; also if an earlier save failed.

        Warns:
            UserWarning: For each damaged checkpoint that was passed over, and for each
                unreadable one of another filepath. Also if the call returns None, but
                there are checkpoints without the metric or of other filepaths.
        """
        if self._series.area.is_inherited:  # `wait` does nothing then
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
                    os.path.exists(path)  # False for a name that is too long, too
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
            # All processes of a run go by what process 0 lists.
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
                    is_deleted = True  # its record was; it was loaded as plain Orbax's
                    break
                except CheckpointNotFoundError:
                    is_deleted = True  # by a writer, which has saved a newer one
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
        """Return how each leaf of a traced tree is sharded; None where not known."""
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
        """Wait for the saves of running programs, before a save outside of them.

        The copy for that save is made after the program that computes its values, and
        the program may wait for the very memory that the save would claim.
        """
        if self._has_streamed:
            finish_programs()

    def _finish_streams(self) -> None:
        """Wait for the saves of running programs, and reset their streams."""
        self._finish_programs()
        for stream in self._streams:
            stream.reset()

    def _check_for_members(self) -> None:
        """Check that an ensemble's members do not replace or delete each other's."""
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
        """Return the path of the slot for `save_last` and for a preemption."""
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
        """Warn once of each metric that no record keeps."""
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
        """Warn once if retention cannot know the best checkpoint, which it spares."""
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
        """Tell whether a check due by the clock compares, or only fills the slot.

        Within an epoch, `logs` often lack the monitored value.
        """
        has_value = find(logs or {}, self._monitor) in (logs or {})
        return has_value or not (self._save_last and self._fresh.save_best_only)

    def _restart_interval(self) -> None:
        if self._interval is not None:
            self._interval.restart()

    def _finish_preempted(self, path: Path | None) -> None:
        """Wait until the save is on disk, and tell the loop of the preemption."""
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
        """List the checkpoints to try to restore, in order; each step lists anew.

        Yields:
            For each checkpoint its time, which identifies it, and its path; and
            messages about those that cannot be listed.

        Raises:
            CheckpointCorruptError: If none can be listed, and some are damaged.
            CheckpointPathError: If one that may be of this filepath cannot be read.
            CheckpointError: If checkpoints were deleted as fast as they were listed.
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

        `mark` is the time of the checkpoint that was listed at the path; another one
        there raises `CheckpointNotFoundError`. `damaged` are the times of checkpoints
        whose values do not count for the best.
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
        gathered("restored", problem)  # raises the error of any process
        assert found is not None
        tree, info = found.tree, found.info
        if like is not None:
            self._note_shardings(tree)  # a sharding in `like` may place a subtree
        durable = from_leader("best", lambda: self._series.durable_best(info, damaged))
        with unchecked():
            state = resumed(self.init(), info and info.state, durable)
        state = as_arguments(state, lambda: leaves_of(tree))
        if info is None:  # plain Orbax wrote it
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
        """Warn if there are checkpoints, but none has a number for `monitor`."""
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
        """Warn if there are only checkpoints of other filepaths or of plain Orbax."""
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
    """Warn while an error is raised; where a filter forbids it, add a note instead."""
    try:
        warnings.warn(message, stacklevel=outside())
    except Warning:
        error.add_note(f"And: {message}")


def _print(message: str) -> None:
    print(f"{message}\n", end="", flush=True)  # in one piece: other threads print, too


def _unknown_argument(*names: str) -> str:
    known = list(inspect.signature(ModelCheckpoint).parameters)[:-1]
    name = names[0]
    meant = _ELSEWHERE.get(name) or next(
        iter(difflib.get_close_matches(name, known)), ""
    )
    hint = f"Did you mean {meant!r}?" if meant else f"It takes {', '.join(known)}."
    return f"ModelCheckpoint got an unknown argument {name!r}. {hint}"
