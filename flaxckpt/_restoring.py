"""`restore`: which checkpoint to load, with damaged ones passed over."""

import functools
import os
import warnings
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from etils import epath

from flaxckpt._checkpoints.load import check_like, restore, tell
from flaxckpt._checkpoints.load_tree import Options, put_states
from flaxckpt._checkpoints.series import Series
from flaxckpt._decision.scalars import LARGEST_STEP
from flaxckpt._decision.state import CheckpointState, plain_state, resumed
from flaxckpt._decision.step import tick
from flaxckpt._disk.info import CheckpointInfo, LoadReport
from flaxckpt._disk.listing import Infos, LeftOut
from flaxckpt._object_store.url import check_is_path, is_url
from flaxckpt._orbax.recognize import foreign_checkpoints
from flaxckpt._processes.messages import are_several, at_work, from_leader, joined
from flaxckpt._program.traced_update import Programs
from flaxckpt._runtime.failures import listed
from flaxckpt._runtime.frames import outside
from flaxckpt._runtime.patience import tries
from flaxckpt._runtime.traces import is_traced
from flaxckpt._runtime.unchecked import as_arguments, unchecked
from flaxckpt._saving.count import Count
from flaxckpt._settings import Settings
from flaxckpt._trees.ties import PyTree, leaves_of
from flaxckpt.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointPathError,
    SettingError,
)

_ADVICE = 'pass "latest", "best" or the path of a checkpoint.'
# The time of each checkpoint, which identifies it, and its path; and messages about
# checkpoints that cannot be listed.
_Candidates: TypeAlias = tuple[list[tuple[str, str]], list[str]]


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A checkpoint that `ModelCheckpoint.restore` has loaded.

    Attributes:
        tree: The tree.
        state: The decision state to pass to `update`, as if the run had never stopped.
        epoch: Zero-based epoch of the save; None if it had a global step instead, or if
            plain Orbax wrote the checkpoint.
        batch: Zero-based batch within the epoch; None at the end of an epoch.
        step: The global step, if the save had one; or else the number of batches, or of
            epochs, that the run had seen. None if plain Orbax wrote the checkpoint.
        logs: The scalar metrics of the save.
        path: The checkpoint's path or URL.
        report: What was loaded, and what `partial` kept and passed over.
    """

    tree: PyTree
    state: CheckpointState
    epoch: Any  # not `int | None`: type checkers would have each loop check for None
    batch: int | None
    step: Any
    logs: Mapping[str, Any]
    path: Path
    report: LoadReport


class Restorer:
    """Restores the checkpoints of one series, and warns of those that it leaves out."""

    def __init__(
        self, settings: Settings, series: Series, programs: Programs, count: Count
    ) -> None:
        """Take what to restore from; nothing is read yet.

        Args:
            settings: The settings.
            series: The series.
            programs: The programs, which learn how a restored tree is sharded.
            count: The count of batches, which goes on from what is restored.
        """
        self._settings, self._series, self._programs = settings, series, programs
        self._count = count

    def shown(self, infos: Infos, left_out: list[LeftOut]) -> Infos:
        """Return checkpoints with the paths that users know; warn of those left out."""
        for error in left_out:
            warnings.warn(f"Left out of the listing: {error}", stacklevel=outside())
        shown = self._series.area.shown
        return tuple(replace(info, path=shown(info.path)) for info in infos)

    def latest(self) -> CheckpointInfo | None:
        """Return the newest checkpoint, the slot included, or None."""
        return next(reversed(self.shown(*self._series.by_age())), None)

    def restore(self, like: PyTree, which: Any, options: Options) -> Restored | None:
        """Load a checkpoint as `ModelCheckpoint.restore` does, after it has waited."""
        check_like(like)
        if is_traced(leaves_of(like)):
            raise CheckpointError(
                "restore and resume were called in a running JAX trace (jit, scan...). "
                "Call them outside, with like=jax.eval_shape(make_tree), and pass what "
                "they return to the program."
            )
        self._programs.note_shardings(like)
        check_is_path("which", which, _ADVICE)
        load = functools.partial(self._load, like=like, options=options)
        if is_url(which) or isinstance(which, CheckpointInfo):
            return load(which)
        if which not in ("latest", "best"):
            return load(_path_of(which))
        if which == "best":
            self._settings.need_mode()
        restored = self._first_whole(which, load)
        if restored is None:
            if which == "best":
                self._warn_of_no_value()
            self._warn_of_others()
        return restored

    def with_best_on_disk(self, state: CheckpointState) -> CheckpointState:
        """Return a state whose best is the best on disk, after a save has failed."""
        stored = {**plain_state(state), "best": None}
        fresh = self._settings.new_state()
        return resumed(fresh, stored, self._series.durable_best(None))

    def _first_whole(
        self, which: str, load: Callable[..., Restored]
    ) -> Restored | None:
        """Load the first checkpoint that is not damaged; warn of each that is.

        Raises:
            CheckpointCorruptError: If all are damaged.
        """
        candidates, told = self._candidates(which), set[str]()
        errors: dict[str, CheckpointCorruptError] = {}
        lost: list[tuple[Any, CheckpointNotFoundError]] = []
        while True:
            # All processes of a run go by what process 0 lists.
            listed, problems = from_leader(
                "restore", lambda: next(candidates, (None, ()))
            )
            if listed is None:
                raise self._never_there(lost)
            for problem in sorted(set(problems) - told):
                warnings.warn(problem, stacklevel=outside())
            told.update(problems)
            try:
                for mark, path in listed:
                    if mark not in errors:
                        try:
                            return load(path, mark=mark, damaged=errors)
                        except CheckpointCorruptError as error:
                            errors[mark] = error
                            _warn_of_damage(error)
            except CheckpointNotFoundError as error:
                lost.append((listed, error))
                continue  # a writer has deleted it, and has saved a newer one
            if errors:
                raise next(iter(errors.values()))
            return None

    def _candidates(self, which: str) -> Iterator[_Candidates]:
        """List the checkpoints to try to restore, in order; each step lists anew.

        Raises:
            CheckpointCorruptError: If none can be listed, and some are damaged.
            CheckpointPathError: If one that may be of this filepath cannot be read.
        """
        for _ in tries():
            if which == "best":
                infos, left_out = self._series.listed()
                infos = self._series.ranked(infos)
            else:
                infos, left_out = self._series.by_age()
                infos = infos[::-1]
            ours = [e for e in left_out if self._series.may_be_ours(e.path)]
            for error in ours:
                if isinstance(error, CheckpointPathError):
                    raise error
            damaged = [e for e in left_out if isinstance(e, CheckpointCorruptError)]
            if not infos and damaged:
                raise damaged[0]
            shown = self._series.area.shown
            places = [(str(info.time), str(shown(info.path))) for info in infos]
            told = [f"PASSED OVER: {e}" for e in damaged if e in ours]
            others = [e for e in left_out if isinstance(e, CheckpointPathError)]
            yield places, told + [f"Left out: {e}" for e in others]

    def _never_there(
        self, lost: list[tuple[Any, CheckpointNotFoundError]]
    ) -> CheckpointError:
        """Make the error for checkpoints that were listed, and not there to be loaded.

        Args:
            lost: What was listed at each try, and the error of a process.
        """
        listed, error = lost[-1]
        if are_several() and all(listed == each for each, _ in lost):
            return CheckpointError(
                f"{error} Process 0 sees it. All processes must see one directory: "
                "save on a file system that they share."
            )
        root = str(self._series.area.shown(self._series.root))
        return CheckpointError(
            f"The checkpoints in {root!r} were deleted faster than they could be "
            "loaded. Restore again, or keep more of them (max_to_keep)."
        )

    def _load(
        self,
        path: str | os.PathLike[str],
        like: PyTree,
        options: Options,
        *,
        mark: str | None = None,
        damaged: Container[str] = (),
    ) -> Restored:
        """Load a checkpoint, in all processes or in none.

        `mark` is the time of the checkpoint that was listed at the path. If the record
        there has another time, or there is none, it raises `CheckpointNotFoundError`;
        without a `mark`, one without a record loads as plain Orbax's. `damaged` are the
        times of checkpoints whose values do not count for the best.
        """
        shown = os.fspath(path)
        where: Any = epath.Path(shown) if is_url(shown) else Path(shown)
        found, problem = None, None
        try:
            with at_work("restored"):
                found = restore(path, like, options)
            time = found.info and str(found.info.time)
            if mark is not None and mark != time:
                raise CheckpointNotFoundError(shown, (), "it was replaced meanwhile")
        except Exception as error:
            problem = error
        if are_several():  # this raises the error of any process
            joined("restored", problem, lambda each: None)
        elif problem is not None:
            raise problem
        assert found is not None
        put_states(path, found)
        tell(path, found.report)
        tree, info = found.tree, found.info
        if like is not None:
            # Again: a sharding in `like` may place a subtree.
            self._programs.note_shardings(tree)
        durable = from_leader("best", lambda: self._series.durable_best(info, damaged))
        with unchecked():
            state = resumed(self._settings.new_state(), info and info.state, durable)
            if info is not None and info.epoch is None and info.state is None:
                state, _ = tick(state, None, None, min(info.step, LARGEST_STEP))
        state = as_arguments(state, lambda: leaves_of(tree))
        if info is not None:
            self._count.go_on(info)
        return Restored(
            tree=tree,
            state=state,
            epoch=info and info.epoch,  # there is none if plain Orbax wrote it
            batch=info and info.batch,
            step=info and info.step,
            logs=info.logs if info else {},
            path=where,
            report=found.report,
        )

    def _warn_of_no_value(self) -> None:
        """Warn if there are checkpoints, but none has a number for `monitor`."""
        infos = self._series.listed()[0]
        if not infos:
            return
        names = sorted({name for info in infos for name in info.logs})
        advice = 'Their logs are empty. Pass logs, or restore(which="latest").'
        if names:
            advice = (
                f"Their logs have: {', '.join(map(repr, names))}. Pass one of these as "
                '`monitor`, or restore(which="latest").'
            )
        warnings.warn(
            "No best checkpoint to restore: no checkpoint has a number for "
            f"{self._settings.monitor!r}. {advice}",
            stacklevel=outside(),
        )

    def _warn_of_others(self) -> None:
        """Warn if there are only checkpoints of other filepaths or of plain Orbax."""
        template, others = self._settings.template, self._series.others()
        foreign = foreign_checkpoints(self._series.root)
        if (others or foreign) and not self._series.listed()[0]:
            kinds = {"other filepaths": others, "plain Orbax": foreign}
            parts = [
                f"checkpoints of {kind}: {listed(names)}"
                for kind, names in kinds.items()
                if names
            ]
            path = os.path.join(template.root, template.name)
            warnings.warn(
                f"No checkpoint of {path!r} to restore, but there are "
                f"{' and '.join(parts)}. Restore one of those by its path, as in "
                "restore(which=path).",
                stacklevel=outside(),
            )


def _warn_of_damage(error: CheckpointCorruptError) -> None:
    warnings.warn(
        f"PASSED OVER: checkpoint {error.path!r} is damaged ({error.problem}). "
        "restore tries the next one.",
        stacklevel=outside(),
    )


def _path_of(which: Any) -> Path:
    """Return the path that `which` names; refuse a word that is none.

    Raises:
        SettingError: If it is a name without a separator, and nothing of it is there.
    """
    path = Path(os.path.abspath(os.path.expanduser(which)))
    if (
        isinstance(which, str)
        and os.sep not in which
        and not os.path.exists(path)  # False for a name that is too long, too
    ):
        raise SettingError("which", which, _ADVICE)
    return path
