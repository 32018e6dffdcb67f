"""`ModelCheckpoint`: a thin facade over template, state, store and retention."""

import datetime
import difflib
import functools
import inspect
import itertools
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Never, Self, TypeAlias

import jax
import numpy as np
from jax.core import Tracer

from flaxckpt import _store
from flaxckpt._commit import Area
from flaxckpt._preemption import Watch
from flaxckpt._record import (
    CheckpointInfo,
    Infos,
    list_below,
    plain_scalars,
    read_record,
)
from flaxckpt._retention import (
    LatestN,
    PreservationPolicy,
    best_of,
    expired,
    monitored_value,
    ranked,
)
from flaxckpt._snapshot import snapshot
from flaxckpt._state import CheckpointState, judge, plain_state, resumed, tick
from flaxckpt._template import Template
from flaxckpt._tree import Layout, PyTree, Skeleton, describe
from flaxckpt._weights import Weights, default_weights, weights_skeleton
from flaxckpt._writer import Writer
from flaxckpt.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointWriteError,
    Preempted,
    SettingError,
)

Logs: TypeAlias = Mapping[str, Any]

# What the series of the last slot is called, behind that of the checkpoints.
_SLOT_SERIES = " (last)"

_ELSEWHERE = {
    "period": "save_freq",
    "every_n_train_steps": "save_freq",
    "every_n_epochs": "save_freq",
    "save_interval_steps": "save_freq",
    "save_top_k": "max_to_keep",
    "keep": "max_to_keep",
    "keep_period": "preserve",
    "preservation_policy": "preserve",
    "dirpath": "filepath",
    "filename": "filepath",
    "directory": "filepath",
    "best_mode": "mode",
}


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What `ModelCheckpoint.restore` found.

    Attributes:
        tree: The tree.
        state: The decision state to go on with, as if the run had never stopped.
        epoch: Zero-based epoch at which it was saved; None if plain Orbax wrote it.
        batch: Zero-based batch within it; None at the end of an epoch.
        logs: The scalar metrics at that time.
        path: The checkpoint.
    """

    tree: PyTree
    state: CheckpointState
    epoch: Any  # int, but for plain Orbax's: a loop need not check for that
    batch: int | None
    logs: Mapping[str, Any]
    path: Path


@dataclass
class _Page:
    """One directory to write, and what goes into it."""

    path: Path
    series: str
    layout: Layout
    leaves: list[Any]
    weights: Skeleton


class ModelCheckpoint:
    """Saves a training loop's checkpoints when a metric or the clock of steps says so.

    The JAX counterpart of Keras's callback of that name, with its arguments in its
    order. The object holds settings and the write in progress; what the decision
    remembers is in the `CheckpointState` that `update` takes and returns. Not for use
    by several threads at once.

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
        max_to_keep: int | None = None,
        preserve: PreservationPolicy | None = None,
        weights: Weights | None = None,
        save_last: bool | str = False,
        save_on_preemption: bool | str = False,
        sync: bool = True,
        **unknown: Never,
    ) -> None:
        """Check the settings; write nothing.

        Args:
            filepath: Where to save: a path with fields `{epoch}` and `{batch}`, shown
                one-based, and any key of `logs`, in Python's format syntax:
                `"runs/{epoch:02d}-{val_loss:.2f}"`. Each checkpoint is a directory.
                Without fields every save replaces the last. May start with `~`.
            monitor: Key in `logs` of the value to compare.
            verbose: 1 prints what is decided and saved; 0 is silent.
            save_best_only: Save at a due check only what improves on the best.
            save_weights_only: Save the weights, not the whole training state.
            mode: `"min"`, `"max"`, or `"auto"` to tell from the name of `monitor`.
            save_freq: `"epoch"`: a check is due at the end of each epoch. A number:
                every so many batches.
            initial_value_threshold: The best to improve on at first.
            min_delta: By more than how much an improvement must improve.
            max_to_keep: Keep so many of the newest checkpoints, and the best one
                beside them if it is not among them. None keeps all.
            preserve: A preservation policy, such as Orbax's, in place of
                `max_to_keep`. The newest and the best are kept whatever it says.
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
        self._monitor, self._mode = monitor, self.init().mode
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
        elif preserve is not None and not hasattr(preserve, "should_preserve"):
            raise SettingError(
                "preserve",
                preserve,
                "pass a preservation policy, such as Orbax's LatestN(3).",
            )
        if weights is not None and not callable(weights):
            raise SettingError(
                "weights", weights, "pass a function from a tree to its weights."
            )
        self._verbose = bool(verbose)
        self._weights_only = bool(save_weights_only)
        self._weights = weights or default_weights
        self._policy = preserve
        self._writer = Writer()
        self._slot = self._slot_path(save_last)
        self._save_last = bool(save_last)
        if save_on_preemption not in (False, True, "flag"):
            raise SettingError(
                "save_on_preemption", save_on_preemption, 'pass True, False or "flag".'
            )
        self._raise_preempted = save_on_preemption is True
        series = self._template.name
        self._area = Area(
            self._root,
            (series, series + _SLOT_SERIES),
            self._template.depth,
            sync=bool(sync),
        )
        _store.check_root(self._root)
        self.preempted = False
        self._watch = Watch() if save_on_preemption else None

    # ---- the loop --------------------------------------------------------------------

    def init(self) -> CheckpointState:
        """Return the decision state of a run that has seen nothing yet."""
        return CheckpointState.create(**self._settings)

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
        counters, and no device is waited for. Where one is due under `save_best_only`,
        or the filepath shows a metric, waits for that metric. A save copies `tree` on
        its devices and goes on in the background, so `tree` may be donated or changed
        at once; if the save before it is still under way, waits for that first.

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
            CheckpointLockedError: If another process writes these checkpoints.
            Preempted: If the process was told to end, after saving.
            CheckpointError: If called under a JAX trace, where there are no values
                yet to save.
        """
        self._writer.check()
        preempted = self._is_newly_preempted()
        state, due = tick(state, epoch, batch)
        if due is np.False_ and force is False and not preempted:
            return state
        _refuse_traced(due, force, epoch, batch, logs, tree, state)
        before, save = state.best, False
        news = ""
        if due:
            on_host = _monitored_on_host(logs, state.monitor)
            state, save = judge(state, on_host, due)
            news = self._news(state, before, on_host, epoch, save=bool(save))
        saves, lasts = bool(save or force), bool(due) and self._save_last
        if saves or lasts or preempted:
            # What a checkpoint of weights leaves out has a place in the slot alone.
            in_slot = (lasts or preempted) and (self._weights_only or not saves)
            path = self._save(
                tree,
                int(epoch),
                _int_or_none(batch),
                logs,
                state,
                news,
                in_series=saves,
                in_slot=in_slot,
            )
            if preempted:
                self._finish_preempted(path)
        return state

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
        self._writer.check()
        _refuse_traced(False, False, epoch, batch, logs, tree, state)
        return self._save(tree, int(epoch), _int_or_none(batch), logs, state)

    def wait(self) -> None:
        """Wait until all that was saved is on disk.

        Raises:
            CheckpointWriteError: If a save failed.
        """
        self._writer.wait()

    def close(self) -> None:
        """Wait as `wait` does, and release thread, lock and signal handlers.

        Raises:
            CheckpointWriteError: If a save failed.
        """
        try:
            self._writer.close()
        finally:
            self._area.close()
            if self._watch is not None:
                self._watch.close()

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
        try:
            self.close()
        except CheckpointError as failure:
            warnings.warn(
                f"While another error ended the loop: {failure}", stacklevel=2
            )

    # ---- what there is ---------------------------------------------------------------

    @property
    def checkpoints(self) -> tuple[CheckpointInfo, ...]:
        """The checkpoints of this filepath that are on disk, oldest first."""
        infos, damaged = self._listed()
        for error in damaged:
            warnings.warn(f"Left out of the listing: {error}", stacklevel=2)
        return infos

    @property
    def latest(self) -> CheckpointInfo | None:
        """What was saved last, of what is on disk, the last slot included, or None."""
        infos = self._by_age()
        return infos[-1] if infos else None

    @property
    def best(self) -> CheckpointInfo | None:
        """The checkpoint with the best monitored value, of those on disk.

        None where no checkpoint has one; a NaN is none.

        Raises:
            SettingError: A `ValueError`, if it is not known which way is better.
        """
        self._need_mode()
        return self._best_of(self.checkpoints)

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
            which: `"latest"`, `"best"`, or a checkpoint's path.
            cast: Convert where only dtypes differ, rather than raise.
            verify: Check each leaf against the digest of what was saved.

        Returns:
            What was found; None if there is no checkpoint (for `"best"`: none with a
            monitored value).

        Raises:
            CheckpointNotFoundError: If `which` is a path and there is none.
            CheckpointCorruptError: If `which` is a path and that one is damaged, or if
                all there are are damaged.
            CheckpointError: As `flaxckpt.load`.

        Warns:
            UserWarning: Naming each damaged checkpoint that was passed over.
        """
        self.wait()
        if which == "latest":
            candidates = self._by_age()[::-1]
        elif which == "best":
            self._need_mode()
            candidates = ranked(self._listed()[0], self._monitor, self._mode)
        else:
            path = Path(os.path.abspath(os.path.expanduser(which)))
            tree = _store.load(path, like, cast=cast, verify=verify)
            return self._restored(tree, path, read_record(path))
        errors: list[CheckpointError] = []
        for info in candidates:
            try:
                tree = _store.load(info.path, like, cast=cast, verify=verify)
            except (CheckpointCorruptError, CheckpointNotFoundError) as error:
                errors.append(error)
                warnings.warn(
                    f"PASSED OVER, and the next one tried: {error}", stacklevel=2
                )
                continue
            return self._restored(tree, info.path, info)
        errors += self._listed()[1]
        if errors:
            raise errors[0]
        self._warn_of_others()
        return None

    # ---- how -------------------------------------------------------------------------

    def _listed(self) -> tuple[Infos, list[CheckpointCorruptError]]:
        """List the checkpoints of this filepath, and what is damaged beside them."""
        template = self._template
        with self._area.committing:  # what is listed is on disk
            infos, damaged = list_below(template.root, template.depth)
        return tuple(info for info in infos if info.series == template.name), damaged

    def _need_mode(self) -> None:
        if self._mode == "auto":
            raise SettingError(
                "monitor",
                self._monitor,
                "whether this metric is better low or high is not known by its name. "
                'Pass mode="min" or mode="max".',
            )

    def _best_of(self, infos: Sequence[CheckpointInfo]) -> CheckpointInfo | None:
        if self._mode == "auto":
            return None
        return best_of(infos, self._monitor, self._mode)

    def _save(
        self,
        tree: PyTree,
        epoch: int,
        batch: int | None,
        logs: Logs | None,
        state: CheckpointState | None,
        news: str = "",
        *,
        in_series: bool = True,
        in_slot: bool = False,
    ) -> Path:
        """Check all that can be checked, copy, and start writing."""
        if jax.process_count() > 1:
            raise CheckpointError(
                f"This is one of {jax.process_count()} processes, and flaxckpt saves "
                "from one only as yet. Save with Orbax here, or decide with "
                "flaxckpt.step and save from a program of one process."
            )
        pages: list[_Page] = []
        if in_series:
            path = Path(self._template.render(epoch, batch, logs))
            described = self._described(tree, weights_only=self._weights_only)
            pages.append(_Page(path, self._template.name, *described))
        if in_slot:
            series = self._template.name + _SLOT_SERIES
            described = self._described(tree, weights_only=False)
            pages.append(_Page(self._slot, series, *described))
        for page in pages:
            _store.check_target(page.path, self._root)
        self._writer.wait()
        path = pages[-1].path
        try:
            self._area.open()
        except OSError as error:
            cause = f"{type(error).__name__}: {error}"
            raise CheckpointWriteError(str(path), cause) from error
        self._tell(f"Epoch {epoch + 1}: {news}saving model to {path}")
        copies = iter(snapshot([leaf for page in pages for leaf in page.leaves]))
        for page in pages:
            page.leaves[:] = itertools.islice(copies, len(page.leaves))
        write = functools.partial(
            self._write, pages, epoch, batch, dict(logs or {}), state
        )
        self._writer.submit(str(path), write)
        return path

    def _described(
        self, tree: PyTree, *, weights_only: bool
    ) -> tuple[Layout, list[Any], Skeleton]:
        """Describe what is to be written, and where in it the weights are."""
        if weights_only:
            layout, leaves = describe(self._weights(tree), _store.storable)
            return layout, leaves, layout.skeleton
        layout, leaves = describe(tree, _store.storable)
        return layout, leaves, weights_skeleton(tree, self._weights)

    def _write(
        self,
        pages: list["_Page"],
        epoch: int,
        batch: int | None,
        logs: Logs,
        state: CheckpointState | None,
    ) -> None:
        """Write, then delete what is no longer to be kept: the background.

        Nothing is deleted before what is new is in its place.
        """
        infos, _ = self._listed()
        for page in pages:
            in_series = page.series == self._template.name
            info = CheckpointInfo(
                path=page.path,
                epoch=epoch,
                batch=batch,
                step=self._step(epoch, state),
                logs=plain_scalars(logs),
                time=_now_after(self._by_age()),
                weights_only=self._weights_only and in_series,
                series=page.series,
                state=None if state is None else plain_state(state),
            )
            _store.write(info, self._area, page.layout, page.leaves, page.weights)
            page.leaves.clear()
            self._tell(f"Epoch {epoch + 1}: finished saving model to {page.path}")
            if not in_series:
                continue
            infos = (*(each for each in infos if each.path != page.path), info)
            gone = expired(infos, self._policy, self._best_of(infos))
            outdated = [each.path for each in gone]
            if not self._weights_only and self._slot_info() is not None:
                outdated.append(self._slot)
            for path in outdated:
                try:
                    self._area.remove(path)
                except OSError as error:
                    raise CheckpointError(
                        f"{str(page.path)!r} was saved, but {str(path)!r}, which is no "
                        f"longer to be kept, could not be deleted: {error}."
                    ) from error

    def _slot_path(self, save_last: bool | str) -> Path:
        """Return where the last state is saved if nothing else is."""
        name = save_last if isinstance(save_last, str) else "last"
        if not name or name in (".", "..") or "/" in name or "\0" in name:
            raise SettingError("save_last", save_last, "pass True, or a file's name.")
        path = self._root / name
        if save_last and self._template.text == str(path):
            raise SettingError(
                "save_last",
                save_last,
                f"the checkpoints themselves are saved at {str(path)!r}. Pass another "
                "name.",
            )
        return path

    def _slot_info(self) -> CheckpointInfo | None:
        """Return what is in the slot, if it is ours and whole."""
        try:
            info = read_record(self._slot)
        except CheckpointCorruptError:
            return None
        ours = self._template.name + _SLOT_SERIES
        return info if info is not None and info.series == ours else None

    def _by_age(self) -> tuple[CheckpointInfo, ...]:
        """Return what can be resumed from, oldest first: the slot's beside the rest."""
        infos, _ = self._listed()
        slot = self._slot_info()
        infos = infos if slot is None else (*infos, slot)
        return tuple(sorted(infos, key=lambda info: info.time))

    def _is_newly_preempted(self) -> bool:
        watch = self._watch
        return watch is not None and watch.signal is not None and not self.preempted

    def _finish_preempted(self, path: Path) -> None:
        """Make sure that what was saved is on disk, and tell the loop."""
        self.wait()
        self.preempted = True
        if self._raise_preempted and self._watch is not None:
            raise Preempted(str(self._watch.signal), str(path))

    def _step(self, epoch: int, state: CheckpointState | None) -> int:
        if state is None or state.save_freq == "epoch":
            return epoch + 1
        return int(np.asarray(state.batches))

    def _restored(
        self, tree: PyTree, path: Path, info: CheckpointInfo | None
    ) -> Restored:
        if info is None:  # plain Orbax's
            return Restored(
                tree=tree, state=self.init(), epoch=None, batch=None, logs={}, path=path
            )
        infos = (*self._listed()[0], info)
        best = self._best_of(infos)
        durable = None if best is None else monitored_value(best.logs, self._monitor)
        return Restored(
            tree=tree,
            state=resumed(self.init(), info.state, durable),
            epoch=info.epoch,
            batch=info.batch,
            logs=info.logs,
            path=path,
        )

    def _warn_of_others(self) -> None:
        """Warn if nothing was found for the reason that the filepath was changed."""
        template = self._template
        others = [
            info.path.name
            for info in list_below(template.root, template.depth)[0]
            if info.series != template.name
        ]
        if others and not self._listed()[0]:
            warnings.warn(
                f"No checkpoint of {template.root!r}/{template.name!r} to restore, but "
                f"there are checkpoints of other filepaths: {', '.join(others)}. "
                "Restore one of those by its path, as in restore(which=path).",
                stacklevel=3,
            )

    def _news(
        self, state: CheckpointState, before: Any, logs: Logs, epoch: int, *, save: bool
    ) -> str:
        """Say how a decision went, as Keras does; return what a save adds to."""
        if not (self._verbose and state.save_best_only):
            return ""
        old = "None" if np.isnan(before) else f"{np.asarray(before):.5f}"
        if save:
            best = f"{np.asarray(state.best):.5f}"
            return f"{state.monitor} improved from {old} to {best}, "
        if logs.get(state.monitor) is not None:
            self._tell(f"Epoch {epoch + 1}: {state.monitor} did not improve from {old}")
        return ""

    def _tell(self, message: str) -> None:
        if self._verbose:
            print(message, flush=True)


def _refuse_traced(*values: PyTree) -> None:
    """Raise if any value is that of a running trace."""
    if any(isinstance(each, Tracer) for each in jax.tree.leaves(values)):
        raise CheckpointError(
            "ModelCheckpoint was called on values of a running JAX trace (jit, scan, "
            "vmap...), where there is nothing to save yet. Decide there with "
            "flaxckpt.step, which returns whether to save, and call update or save on "
            "what the traced function returns."
        )


def _monitored_on_host(logs: Logs | None, monitor: str) -> Logs:
    """Return the logs with the monitored value fetched from its device."""
    value = (logs or {}).get(monitor)
    if isinstance(value, jax.Array):
        return {**(logs or {}), monitor: np.asarray(value)}
    return logs or {}


def _int_or_none(batch: Any) -> int | None:
    return None if batch is None else int(batch)


def _now_after(infos: Sequence[CheckpointInfo]) -> datetime.datetime:
    """Return the time, but later than that of every checkpoint there is.

    So the order of saves survives a clock that was set back.
    """
    now = datetime.datetime.now(datetime.UTC)
    return max(
        [now, *(info.time + datetime.timedelta(microseconds=1) for info in infos)]
    )


def _unknown_argument(*names: str) -> str:
    known = list(inspect.signature(ModelCheckpoint).parameters)[:-1]
    name = names[0]
    meant = _ELSEWHERE.get(name) or next(
        iter(difflib.get_close_matches(name, known)), ""
    )
    hint = f"Did you mean {meant!r}?" if meant else f"It takes {', '.join(known)}."
    return f"ModelCheckpoint got an unknown argument {name!r}. {hint}"
