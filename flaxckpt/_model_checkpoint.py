"""`ModelCheckpoint`: the facade over the decision, the saves and the series on disk."""

import os
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Never, Self

import numpy as np

from flaxckpt._checkpoints.load_tree import Options
from flaxckpt._checkpoints.retention import PreservationPolicy
from flaxckpt._checkpoints.series import Series
from flaxckpt._checkpoints.series_writer import SeriesWriter
from flaxckpt._checkpoints.target import check_root
from flaxckpt._decision.logs import Logs
from flaxckpt._decision.moment import Moment
from flaxckpt._decision.state import CheckpointState
from flaxckpt._direct.frozen_files import Frozen
from flaxckpt._disk.info import CheckpointInfo, Hook
from flaxckpt._pods.saves import PodSaver
from flaxckpt._processes.messages import TIMEOUT_SECS, are_several, is_leader
from flaxckpt._program.best_trees import Snapshot
from flaxckpt._program.best_trees_saved import to_save
from flaxckpt._program.traced_update import Programs
from flaxckpt._restoring import Restored, Restorer
from flaxckpt._resuming import Start, iterators_in, skip_ahead
from flaxckpt._runtime.beside import close_beside, warn_beside
from flaxckpt._runtime.forks import use_threads
from flaxckpt._runtime.frames import outside
from flaxckpt._saving.advice import Advice
from flaxckpt._saving.at_exit import settle_saves
from flaxckpt._saving.count import Count
from flaxckpt._saving.parts import SaverParts
from flaxckpt._saving.saves import Saver
from flaxckpt._saving.triggers import Triggers
from flaxckpt._settings import Settings, unknown_argument
from flaxckpt._trees.chosen import Filter
from flaxckpt._trees.in_place import put_into
from flaxckpt._trees.kinds_of_parts import Weights
from flaxckpt._trees.renaming import Rename
from flaxckpt._trees.selection import Select
from flaxckpt._trees.ties import PyTree, leaves_of
from flaxckpt._updating import Updater
from flaxckpt.errors import SettingError


class ModelCheckpoint:
    """Save a training loop's checkpoints when a metric, a count or a clock says so.

    This is the JAX counterpart of Keras's callback of the same name, with the same
    arguments in the same order. The object holds the settings and the saves under way.
    The decision's memory is the `CheckpointState` that `update` takes and returns. Only
    one thread at a time may use the object.

    Attributes:
        counts: A `SaveCounts` of the saves so far.

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
        on_saved: Hook | Iterable[Hook] | None = None,
        sync: bool = True,
        snapshot: str = "auto",
        max_in_flight: int | None = None,
        compress: bool = False,
        engine: str = "auto",
        frozen: Filter | type | None = None,
        per_process: Filter | type | None = None,
        stop_on_error: bool = False,
        timeout_secs: float = TIMEOUT_SECS,
        **unknown: Never,
    ) -> None:
        """Check the settings; write nothing.

        Args:
            filepath: Template of the checkpoints' paths, in Python's format syntax:
                `"runs/{epoch:02d}-{val_loss:.2f}"`. Its fields are `{epoch}` and
                `{batch}`, both shown one-based, or `{step}`, shown as it is, and the
                keys of `logs`. Each checkpoint is a directory. Without fields each save
                replaces the one before. The template may start with `~`, or with
                `gs://` or `s3://` for an object store.
            monitor: Key in `logs` of the value to compare.
            verbose: 1 prints decisions and saves, or logs them if the logger `flaxckpt`
                is configured; 0 prints nothing.
            save_best_only: Whether a due check saves only what improves on the best.
            save_weights_only: Whether to save the weights, not the whole tree.
            mode: `"min"`, `"max"`, or `"auto"` to tell from the name of `monitor`.
            save_freq: When a check is due: `"epoch"` for the end of each epoch, a
                number for every so many batches, or global steps.
            initial_value_threshold: The first best value; None for no best value.
            min_delta: The difference from the best that an improvement must exceed.
            save_interval_secs: Make a check due, too, at the first `update` that comes
                this many seconds after the last due check, the last `save` or the last
                `update(force=True)`, whichever came last. The time begins at the first
                `update`. Not within jit. In several processes the clock of process 0
                counts. None for no such check.
            max_to_keep: Keep this many of the newest checkpoints, and the best one too
                if it is not among them. None keeps all.
            preserve: A preservation policy, such as Orbax's, in place of
                `max_to_keep`. The newest and the best checkpoint are always kept.
            overwrite: With `save_best_only`, whether a save may replace a better
                checkpoint at its path, such as one of an earlier run that this run did
                not `restore`. If False, `update` saves a worse checkpoint at the path
                with `.aside` added; `save` saves it at the path, and moves the better
                one aside.
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
            on_saved: A function, or several, called with the `CheckpointInfo` of each
                checkpoint once it is on disk: in the background, in process 0 alone.
                `wait` waits for them, and the next call raises their errors. See
                docs/following.md.
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
            engine: Who writes the values. With `"auto"` flaxckpt writes them straight
                from memory, once Orbax has written a tree of the same form in this
                process; with `"orbax"` Orbax writes all values, and so it does for
                several processes in an object store.
            frozen: Picks the leaves that stay the same for the whole run, such as base
                weights in fine-tuning: a function of a leaf's path (a tuple of names)
                and the leaf, or a type of leaf. An NNX `Variable` is one leaf, so NNX's
                filters work: `nnx.Not(nnx.LoRAParam)`. A frozen leaf is stored once,
                and linked from each checkpoint; if it changes, it is written again.
            per_process: Picks the leaves that each of several processes has for itself,
                such as the state of its data iterator; as for `frozen`. A checkpoint
                then has a value of each process, and each restores its own. All other
                values must be equal in all processes.
            stop_on_error: Whether a program that calls `update` in jit ends at its next
                save after a save has failed. If False, `wait`, `close` or the next call
                outside of jit raises the error.
            timeout_secs: In several processes, after how many seconds without a sign of
                life of a process the others raise an error. In `restore` it is always
                600.
            **unknown: Refused with an error that suggests the right name.

        Raises:
            SettingError: A `ValueError`, if a setting cannot work.
            TemplateError: A `ValueError`, if `filepath` is malformed.
            CheckpointPathError: A `ValueError`, if a file or a link that leads nowhere
                is in the place of a directory, or if a name is too long.
            TypeError: If an argument is unknown.
        """
        given = {**locals()}  # the arguments: no other name is bound yet
        del given["self"], given["unknown"]
        if unknown:
            raise TypeError(unknown_argument(next(iter(unknown))))
        self._settings = settings = Settings(**given)
        self._series = Series(
            settings.template,
            settings.slot,
            monitor=monitor,
            mode=settings.fresh.mode,
            dtype=np.asarray(settings.fresh.best_value).dtype,
            sync=bool(sync),
            in_store=settings.in_store,
        )
        self._disk = disk = SeriesWriter(
            self._series,
            policy=settings.policy,
            compress=bool(compress),
            writes_directly=engine == "auto",
            frozen=None if frozen is None else Frozen(frozen),
        )
        parts, timeout = SaverParts(settings, disk), float(timeout_secs)
        self._saves = (
            PodSaver(parts, timeout=timeout) if are_several() else Saver(parts)
        )
        self.counts = self._saves.counts
        check_root(self._series.root)
        self._programs = Programs(settings, self._saves)
        count = Count()
        self._restorer = Restorer(settings, self._series, self._programs, count)
        self._triggers = Triggers(settings, self._series.name)
        self._updater = Updater(
            settings,
            self._series,
            self._saves,
            self._programs,
            self._restorer,
            self._triggers,
            Advice(settings),
            count,
        )

    # ---- the loop --------------------------------------------------------------------

    def init(self, like: PyTree = None) -> CheckpointState:
        """Return the decision state of a run that has seen nothing yet.

        Args:
            like: A tree that `update` will save, or `jax.ShapeDtypeStruct`s of it with
                shardings. Within jit its shardings cannot be seen; without `like`, each
                save gathers the whole tree on one device. Outside of jit, the first two
                saves of a tree compile programs that copy it; with `like` of more than
                128 arrays (in several processes, of any number), a thread compiles them
                now. In several processes on CPU, it also claims the memory of the
                copies. `resume` does the same for its tree. `restore` does, too, but
                claims no memory.

        Returns:
            The state for the first call of `update`.
        """
        self._programs.note_shardings(like)
        self._saves.prepare(like)
        return self._settings.new_state(like)

    def update(
        self,
        state: CheckpointState,
        tree: PyTree,
        logs: Logs | None,
        epoch: int | None = None,
        batch: int | None = None,
        *,
        step: int | None = None,
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
        raise the errors of these saves; see `stop_on_error`. Within `vmap`, all members
        are saved together as one tree, with a first axis for the members.

        Args:
            state: What `init`, `restore` or the last `update` returned.
            tree: What to save: any pytree of arrays and scalars.
            logs: The current metrics; None for none.
            epoch: Zero-based epoch, an integer or i32[].
            batch: Zero-based batch within the epoch, an integer or i32[]. None at the
                end of an epoch.
            step: A global step, an integer or i32[], in place of epoch and batch. It is
                the number of the step that was done last: `save_freq=N` makes a check
                due at each multiple of N, and at a step that passes one.
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
            SettingError: If `state` has other settings, if `tree` has no values, if
                epoch, batch or step is not such an integer, or if a step comes where
                only epochs are due.
            CheckpointLockedError: If another process writes these checkpoints.
            Preempted: After the save is on disk, if a signal told the process to end.
            CheckpointError: Within `vmap`, if its members may save at different calls;
                within `shard_map`; and within jit with `save_interval_secs` or in
                several processes.

        Warns:
            UserWarning: Within `vmap`, if the members have metrics of their own, which
                the record of their checkpoint lacks.
        """
        return self._updater.update(state, tree, logs, epoch, batch, step, force=force)

    def save(
        self,
        tree: PyTree,
        epoch: int | None = None,
        batch: int | None = None,
        logs: Logs | None = None,
        state: CheckpointState | None = None,
        *,
        step: int | None = None,
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
            step: A global step, in place of epoch and batch.

        Returns:
            The checkpoint's path or URL. The checkpoint is there after `wait`.

        Raises:
            CheckpointError: As `update`; also within any JAX trace.
        """
        at = Moment(epoch, batch, step)
        return self._updater.save(tree, at, logs, state)

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
        return tuple(
            self.save(kept.tree, kept.epoch, kept.batch, logs, step=kept.step)
            for kept, logs in to_save(snapshot, member, self._settings)
        )

    def wait(self) -> None:
        """Wait until every save is on disk, and `on_saved` was called with it.

        The call also waits for the jitted programs with saves that this thread has
        called. The programs of other threads must have ended. In a process that was
        forked from the one that made the object, the call does nothing.

        Raises:
            CheckpointWriteError: If a save failed, or a function of `on_saved` did.
        """
        if self._series.area.claim.is_inherited:
            return
        self._saves.queue.refuse_hooks()
        self._programs.reset()
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
        if self._series.area.claim.is_inherited:
            return
        self._saves.queue.refuse_hooks()
        try:
            try:
                self._programs.reset()
            except Exception:
                self._saves.close()  # before the lock is given back
                raise
            self._saves.close()
        except Exception as error:
            if late := self._release():
                warn_beside(error, late)
            raise
        # After an interrupt, which is no `Exception`, a save may still need the lock.
        if late := self._release():
            warnings.warn(late, stacklevel=outside())
        self._updater.warn_if_never_due()

    def finish(self) -> None:
        """Mark the run as ended, once every save is on disk.

        `finished` then tells the script that runs next, and `flaxckpt.watch` ends. The
        next save takes the mark away. In several processes, every one calls this.

        Raises:
            CheckpointWriteError: If a save failed; nothing is marked then.
            CheckpointLockedError: If another process writes these checkpoints.
            CheckpointPathError: If the mark cannot be written.

        Example:
            >>> with ModelCheckpoint("ended/{epoch}") as ckpt:
            ...     if not ckpt.finished:
            ...         state = ckpt.update(ckpt.init(), {"w": np.ones(2)}, {}, 0)
            ...         ckpt.finish()
            >>> ModelCheckpoint("ended/{epoch}").finished
            True
        """
        self._saves.check_parent()
        self.wait()
        if is_leader():
            self._disk.finish()

    def _release(self) -> str:
        """Release lock and signal handlers; say if no state was saved for a signal."""
        late = self._triggers.late_signal()
        try:
            self._series.area.close()
        finally:
            self._triggers.close()
        return late

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
        else:
            close_beside(error, self.close)

    # ---- what there is ---------------------------------------------------------------

    @property
    def preempted(self) -> bool:
        """Whether a signal told the process to end, and a save for it is on disk."""
        return self._triggers.preempted

    @property
    def finished(self) -> bool:
        """Whether a run of this filepath has ended by `finish`, and saved no more.

        In several processes each looks for itself.
        """
        return self._series.area.is_finished

    @property
    def checkpoints(self) -> tuple[CheckpointInfo, ...]:
        """The checkpoints of this filepath that are on disk, oldest first."""
        return self._restorer.shown(*self._series.listed())

    @property
    def latest(self) -> CheckpointInfo | None:
        """The newest checkpoint on disk, the slot of `save_last` included, or None."""
        return self._restorer.latest()

    @property
    def best(self) -> CheckpointInfo | None:
        """The checkpoint on disk with the best monitored value.

        None if no checkpoint has a number for `monitor`. A NaN does not count.

        Raises:
            SettingError: A `ValueError`, if the direction of `monitor` is not known.
        """
        self._settings.need_mode()
        return self._series.best_of(self.checkpoints)

    def resume(
        self,
        tree: PyTree,
        *,
        data: Any = None,
        cast: bool = False,
        verify: bool = True,
    ) -> tuple[PyTree, CheckpointState, Start]:
        """Begin a run, or go on where the last one was: one call in front of the loop.

        The call restores the newest checkpoint of the filepath, `save_last`'s included.

        Args:
            tree: The tree to train, or `jax.ShapeDtypeStruct`s with shardings; as
                `like` of `restore`. The values go into its NNX objects in place, and
                states into its iterators.
            data: An iterator over batches without a state to save, such as a generator,
                or a list of them. The call takes from each the batches that the run has
                seen, and drops them. In a run that counts global steps these are as
                many as the step to go on with: one for each step, from step 0. In a run
                of epochs they are those of the epoch that the run goes on in, so pass
                an iterator over one epoch.
            cast: As for `restore`.
            verify: As for `restore`.

        Returns:
            The tree, the decision state for `update`, and where to go on, which is an
            int for `range(start, ...)` and tells the batch, too. In a new run they are
            `tree` itself, `init(tree)` and 0.

        Raises:
            SettingError: A `ValueError`, if `data` is no iterator, or ends before the
                batches to drop do.
            CheckpointError: As `restore`.

        Example:
            >>> with ModelCheckpoint("resumed/{epoch}") as ckpt:
            ...     tree, state, start = ckpt.resume({"w": np.zeros(2)})
            ...     for epoch in range(start, 3):
            ...         state = ckpt.update(state, tree, {}, epoch)
            >>> ckpt.resume(tree)[2]
            Start(epoch=3, batch=0)
        """
        iterators = iterators_in(data)
        found = self._restored(tree, "latest", Options(cast=cast, verify=verify))
        if found is None:
            return tree, self.init(tree), Start(is_new=True)
        self._saves.prepare(found.tree)
        start = Start.after(found.epoch, found.batch, found.step)
        skip_ahead(iterators, start, leaves_of(tree))
        return put_into(tree, found.tree), found.state, start

    def restore(
        self,
        like: PyTree = None,
        which: str | os.PathLike[str] = "latest",
        *,
        cast: bool = False,
        verify: bool = True,
        partial: bool = False,
        select: Select | None = None,
        rename: Rename | None = None,
    ) -> Restored | None:
        """Load a checkpoint, with the decision state to go on from it.

        The call first waits for saves under way, of other objects of this process, too:
        an interrupted loop may have left one. It changes nothing on disk. In several
        processes, every one must call it.

        Args:
            like: A tree of the wanted structure, of arrays or
                `jax.ShapeDtypeStruct`s with shardings; see `flaxckpt.load`.
            which: `"latest"`, `"best"`, or a checkpoint's path or URL. A
                `CheckpointInfo` stands for that very checkpoint.
            cast: Convert leaves that differ only in dtype, rather than raise.
            verify: Check each leaf against the digest of what was saved.
            partial: Load what the checkpoint and `like` both have; see `flaxckpt.load`.
            select: The part that is loaded; see `flaxckpt.load`.
            rename: New names for what is stored; see `flaxckpt.load`.

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
        options = Options(
            cast=cast, verify=verify, partial=partial, select=select, rename=rename
        )
        restored = self._restored(like, which, options)
        if restored is not None:
            self._saves.prepare(restored.tree, will_save=False)
        return restored

    def restore_into(
        self,
        *objects: Any,
        which: str | os.PathLike[str] = "latest",
        cast: bool = False,
        verify: bool = True,
        partial: bool = False,
        select: Select | None = None,
        rename: Rename | None = None,
    ) -> Restored | None:
        """Load a checkpoint into Flax NNX modules and optimizers, in place.

        What they share stays shared, and their RNG streams go on where they were.

        Args:
            *objects: The tree that was saved, or the entries of the tuple that was
                saved, such as `model, optimizer`.
            which: As for `restore`.
            cast: As for `restore`.
            verify: As for `restore`.
            partial: As for `restore`.
            select: As for `restore`.
            rename: As for `restore`.

        Returns:
            As `restore`, whose `tree` has the given objects.

        Raises:
            SettingError: A `ValueError`, if no object is given.
            CheckpointError: As `restore`. Nothing was changed then.
        """
        if not objects:
            raise SettingError("objects", objects, "pass what was saved.")
        tree = objects[0] if len(objects) == 1 else objects
        found = self.restore(
            tree,
            which,
            cast=cast,
            verify=verify,
            partial=partial,
            select=select,
            rename=rename,
        )
        return found and replace(found, tree=put_into(tree, found.tree))

    def _restored(
        self, like: PyTree, which: str | os.PathLike[str], options: Options
    ) -> Restored | None:
        """Load a checkpoint once all saves of the process are on disk."""
        if self._series.area.claim.is_inherited:  # `wait` does nothing then
            use_threads()
        self.wait()
        settle_saves()
        return self._restorer.restore(like, which, options)
