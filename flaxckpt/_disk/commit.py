"""Write directories that appear whole or not at all: stage them, then exchange them.

A series keeps these beside its checkpoints; listings do not show them:

- `.flaxckpt-TAG.lock`: held by the one process that writes the series;
- `.flaxckpt-TAG-*/`: directories being written or deleted; garbage if no process holds
  the lock;
- `.flaxckpt-replaced-NAME/`: the old checkpoint of NAME while a new one is put there,
  only where the file system cannot exchange two directories. If no checkpoint is at
  NAME, readers of NAME take this one.
"""

import contextlib
import functools
import hashlib
import os
import shutil
import socket
import uuid
import warnings
import weakref
from collections.abc import Callable, Container, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flaxckpt._disk.exchange import IN_THE_WAY, replace, swap
from flaxckpt._disk.files import keep_only, sync_path
from flaxckpt._disk.lock import (
    acquire_lock,
    drop_lock,
    holds_lock,
    release_lock,
    settle_lock,
)
from flaxckpt._disk.nested import refuse_around, refuse_inside
from flaxckpt._disk.open import is_there, real
from flaxckpt._disk.record import (
    HIDDEN_PREFIX,
    REPLACED_PREFIX,
    holds_checkpoint,
    is_of,
    located,
    read_record,
    set_aside,
)
from flaxckpt._runtime.frames import outside
from flaxckpt._runtime.locks import new_lock
from flaxckpt.errors import (
    CheckpointError,
    CheckpointLockedError,
    CheckpointPathError,
    CheckpointWriteError,
)


class OccupiedError(Exception):
    """The place holds something that may not be replaced."""


class _Shared:
    """State that the areas of one series in this process share.

    Attributes:
        turn: Held while one of the areas changes the series.
        committing: Held while a checkpoint is put in its place and not yet synced.
        changes: How often the series was changed.
    """

    def __init__(self) -> None:
        self.changes = 0
        self.turn, self.committing = new_lock(), new_lock()


_OPENING, _SHARING = new_lock(), new_lock()
# Keyed by str, not by Path: Python compares str even after its modules are gone.
_SHARED: "weakref.WeakValueDictionary[str, _Shared]" = weakref.WeakValueDictionary()
# In a forked process the locks may be held by threads that only its parent has.
os.register_at_fork(after_in_child=_SHARED.clear)


class Area:
    """Where one series of checkpoints is written.

    Attributes:
        process: Id of the process that made the area.
        is_mirror: Whether the checkpoints are in an object store, which it mirrors.
    """

    is_mirror = False

    def __init__(
        self, root: Path, series: Sequence[str], depth: int, *, sync: bool
    ) -> None:
        """Describe the area; touch nothing.

        Args:
            root: The directory below which the series' checkpoints are.
            series: The series' name, and then the name of its slot's series.
            depth: How many directories below `root` the checkpoints lie, at most.
            sync: Whether to sync directories.
        """
        tag = hashlib.sha256(os.fsencode(series[0])).hexdigest()[:8]
        self._root, self._series, self._depth, self.sync = root, series, depth, sync
        self._staging = f"{HIDDEN_PREFIX}{tag}-"
        self._lock = Path(f"{HIDDEN_PREFIX}{tag}.lock")
        self._owner = 0  # id of the process that has opened the area
        self._trash: list[Path] = []
        self._kept_aside: list[Path] = []
        self._reuses = False
        self._sweeping = new_lock()
        self.process, self._holder = os.getpid(), object()
        self._find_lock()
        weakref.finalize(self, _discard, self._trash, self.process)

    def _find_lock(self) -> None:
        """Point to the lock by its real path; give back the lock at an earlier one."""
        lock = Path(real(self._root), self._lock.name)
        if lock == self._lock:
            return
        if self._owner == os.getpid():
            self._release()
        self._lock = lock
        with _SHARING:
            self._shared = _SHARED.setdefault(str(lock), _Shared())
        weakref.finalize(self, self._drop())

    @property
    def changes(self) -> int:
        """How often this process has changed the series."""
        return self._shared.changes

    @property
    def turn(self) -> contextlib.AbstractContextManager[Any]:
        """Held while the series is changed; its other areas in this process wait."""
        return self._shared.turn

    @property
    def committing(self) -> contextlib.AbstractContextManager[Any]:
        """Held while a checkpoint is put in its place and not yet synced."""
        return self._shared.committing

    def open(self) -> None:
        """Make the directory, take the lock, and clear up what a crash left behind.

        Raises:
            CheckpointLockedError: If another process writes this series.
            CheckpointPathError: If the directory is in a checkpoint, or the lock's file
                cannot be the lock.
        """
        if self._owner == os.getpid() and self._is_held():
            return
        root = real(self._root)
        refuse_inside(root, (root, *root.parents))
        self._make(self._root)
        self._find_lock()
        # If the lock was deleted during a save of this process, that save relies on
        # what was there before. Wait until it has failed, and then take the lock anew.
        with contextlib.nullcontext() if self._is_held() else self.turn, _OPENING:
            self._owner = 0
            try:  # other areas wait at `_OPENING` until this is cleared up
                if self._acquire():
                    self._clear_up()
                    self._note_cleared()
                self._shared.changes += 1  # another process may have changed it
            except BaseException:
                self._release()
                raise
            self._owner = os.getpid()

    def _is_held(self) -> bool:
        """Tell whether this process has the lock, and nobody has deleted its file."""
        return holds_lock(self._lock, os.path.join(self._root, self._lock.name))

    def _check_lock(self, path: Path) -> None:
        if not self._is_held():
            raise CheckpointWriteError(
                str(path),
                "the lock of these checkpoints was deleted meanwhile, and another "
                "process may be writing them",
            )

    def _spare_others(self, path: Path) -> None:
        """Check that what is at a path has no other checkpoint in it."""
        refuse_around(path)

    def _clear_up(self) -> None:
        self._finish_replacements()
        with self._sweeping:  # the last save's files may still be swept
            for entry in list(os.scandir(self._root)):
                if entry.name.startswith(self._staging):
                    # This fails on links and files.
                    shutil.rmtree(entry.path, ignore_errors=True)
                    with contextlib.suppress(OSError):
                        os.unlink(entry.path)
            self._trash.clear()

    @property
    def is_inherited(self) -> bool:
        """Whether a process that this one was forked from made the area."""
        return self.process != os.getpid()

    def inherited(self) -> CheckpointLockedError:
        """Make the error for a call that only the area's own process can make."""
        root, host = str(self.shown(self._root)), socket.gethostname()
        return CheckpointLockedError(root, host, self.process, True)

    def close(self) -> None:
        """Sweep, and give the lock back; after an interrupt, call it again."""
        try:
            if self._owner == os.getpid():
                self.sweep(spare=False)
        except Exception:
            self._owner = 0
            self._release()
            raise
        self._owner = 0
        self._release()

    def _acquire(self) -> bool:
        return acquire_lock(self._lock, self._holder)

    def _note_cleared(self) -> None:
        settle_lock(self._lock)

    def _release(self) -> None:
        release_lock(self._lock, self._holder)

    def _drop(self) -> Callable[[], None]:
        """Return the function that gives the lock back after the area is collected."""
        return functools.partial(drop_lock, self._lock, self._holder)

    def refresh(self, *paths: Path) -> None:
        """Do nothing; a mirror fetches what other processes changed in the store."""

    def meeting_place(self, written: Path, target: Path) -> str:
        """Return where other processes write their shares of a checkpoint.

        Args:
            written: The directory that process 0 is writing.
            target: Its place once it is whole.
        """
        del target
        return str(written)

    @contextmanager
    def share(self, place: str) -> Generator[Path]:
        """Yield a directory for this process's share of a checkpoint.

        Args:
            place: What `meeting_place` returned in process 0.
        """
        yield Path(place)

    def shown(self, path: Path) -> Path:
        """Return a path as users see it in messages."""
        return path

    @contextmanager
    def staging(self, *, reuse: Container[str] | None = None) -> Generator[Path]:
        """Make a directory to write in; `sweep` deletes what is left in it.

        Args:
            reuse: The files that will be written below `new`, if the directory may be
                one with an old checkpoint at `new`, to be written over. `sweep` then
                keeps one for the next save. None for an empty directory.
        """
        self._reuses = reuse is not None
        if reuse is None:
            self._sweep_disk(spare=True)  # the save may need this space
        path = self._made() if reuse is None else self._cleared(reuse)
        try:
            yield path
        except BaseException:
            if path not in self._kept_aside:
                shutil.rmtree(path, ignore_errors=True)
            raise
        self._trash += self._kept_aside  # a later save is on disk
        self._kept_aside.clear()
        self._trash.append(path)

    def _made(self) -> Path:
        path = self._root / f"{self._staging}{uuid.uuid4().hex[:12]}"
        path.mkdir()
        return path

    def _cleared(self, names: Container[str]) -> Path:
        """Return an old directory that can be written over, or make a new one."""
        while self._trash:
            path = self._trash.pop()
            try:
                keep_only(path / "new", names)
            except OSError:  # somebody has made a part of it immutable
                shutil.rmtree(path, ignore_errors=True)
            else:
                return path
        return self._made()

    def sweep(self, *, spare: bool = True) -> None:
        """Delete replaced and removed checkpoints, which may take a while.

        Args:
            spare: Whether to keep one directory to write over, if `staging` was called
                with `reuse` last.
        """
        self._sweep_disk(spare=spare)

    def _sweep_disk(self, *, spare: bool) -> None:
        kept = int(spare and self._reuses)
        with self._sweeping:
            while len(self._trash) > kept:
                shutil.rmtree(self._trash[0], ignore_errors=True)
                del self._trash[0]

    def put(self, written: Path, target: Path, *, only_over: str | None = None) -> None:
        """Move a finished directory to its place, or exchange it with the one there.

        At every moment a reader of `target` finds the whole old directory or the whole
        new one. When this returns, the name is synced. The old directory is at
        `written` then, and may be deleted.

        Args:
            written: The new directory, whose files are synced already; see `files`.
            target: Its place.
            only_over: The only series whose checkpoint may be replaced; None for any.

        Raises:
            OccupiedError: If something else is at `target`; it is unchanged.
            CheckpointWriteError: If the lock's file was deleted.
            CheckpointPathError: If the checkpoint at `target` has another one in it.
        """
        self._check_lock(target)
        self._spare_others(target)
        self._make(target.parent)
        self._shared.changes += 1
        with self.committing:
            if only_over is None:
                replaces = self._put_over(written, target)
            else:
                replaces = self._put_over_own(written, target, only_over)
            try:
                self._sync_directory(target.parent)
                self._sync_directory(written.parent)
            except BaseException:
                self._take_back(written, target, replaces=replaces)
                raise

    def _put_over(self, written: Path, target: Path) -> bool:
        """Give a directory its name; tell whether another directory had the name."""
        try:
            os.rename(written, target)
        except OSError as error:
            if error.errno not in IN_THE_WAY:
                raise
            replace(written, target, self._sync_directory)
            return True
        return False

    def _put_over_own(self, written: Path, target: Path, own: str) -> bool:
        """Give a directory its name, if the name is free or has a checkpoint of `own`.

        Other processes may want the name, too. A rename never replaces their
        checkpoint, and only this process changes a checkpoint of `own`. Where
        directories cannot be exchanged, another series may set its checkpoint aside for
        a moment: the name looks free, but is still taken.
        """
        aside = set_aside(target)
        try:
            os.rename(written, target)
        except OSError as error:
            if error.errno not in IN_THE_WAY:
                raise
        else:
            if not os.path.lexists(aside) or is_of(aside, own):
                return False
            os.rename(target, written)
            raise OccupiedError(target)
        if not is_of(target, own):
            raise OccupiedError(target)
        try:
            replace(written, target, self._sync_directory)
        except OSError as error:
            if error.errno in IN_THE_WAY:  # another series has taken the name
                raise OccupiedError(target) from error
            raise
        return True

    def _take_back(self, written: Path, target: Path, *, replaces: bool) -> None:
        """Undo `put` after a failed sync; if that fails, spare the old directory."""
        try:
            if replaces:
                replace(written, target, lambda _: None)
            else:
                os.rename(target, written)
        except OSError:
            self._kept_aside.append(written.parent)  # it holds the old directory

    def remove(self, path: Path) -> None:
        """Remove a checkpoint's name at once; `sweep` deletes its files."""
        self._check_lock(path)
        self._shared.changes += 1
        if path.is_symlink():  # somebody keeps the checkpoint elsewhere
            path.unlink()
            self._sync_directory(path.parent)
            return
        path = located(path)  # if that is aside, what is at `path` stays
        self._spare_others(path)
        aside = self._made()
        try:
            path.rename(aside / "new")
        except OSError:
            aside.rmdir()
            raise
        try:
            # The rename must be on disk before `staging` writes over the files.
            self._sync_directory(aside)
            self._sync_directory(path.parent)
        except BaseException:
            # Otherwise a crash may bring it back, written over or half deleted.
            with contextlib.suppress(OSError):
                os.rename(aside / "new", path)
                aside.rmdir()
            raise
        self._trash.append(aside)

    def swap(self, new: Path, path: Path) -> None:
        """Exchange the names of two checkpoints in one directory.

        Args:
            new: Path of the checkpoint that is to be at `path`.
            path: Path of the other checkpoint.

        Raises:
            FileNotFoundError: If there is nothing at `path`.
        """
        self._check_lock(path)
        self._shared.changes += 1
        with self.committing:
            if is_there(set_aside(path)):  # an error came between two renames
                self._finish_replacement(path.parent, set_aside(path))
            swap(new, path, self._sync_directory)
            try:
                self._sync_directory(path.parent)
            except BaseException:
                with contextlib.suppress(OSError):
                    swap(new, path, lambda _: None)
                raise

    def move(self, path: Path, target: Path) -> None:
        """Rename a checkpoint to `target`, where there must be nothing."""
        self._check_lock(path)
        self._spare_others(path)
        self._shared.changes += 1
        with self.committing:
            path.rename(target)
            self._sync_directory(path.parent)

    def _finish_replacements(self) -> None:
        """Put back each set-aside checkpoint, or delete it if its successor is there.

        If a checkpoint cannot be read or moved, warn and leave it as it is: it may
        belong to another series or another user.
        """
        for directory in _directories(self._root, self._depth - 1):
            for aside in _all_set_aside(directory):
                try:
                    self._finish_replacement(directory, aside)
                except (OSError, CheckpointError) as error:
                    warnings.warn(
                        f"{str(aside)!r} is left as it is, and may be a checkpoint "
                        f"that was being replaced: {error}",
                        stacklevel=outside(),
                    )

    def _finish_replacement(self, directory: Path, aside: Path) -> None:
        info = read_record(aside)
        if info is None or info.series not in self._series:
            return
        target = directory / aside.name.removeprefix(REPLACED_PREFIX)
        if holds_checkpoint(target) and is_of(target, info.series):
            self.remove(aside)
            return
        with contextlib.suppress(OSError):
            target.rmdir()  # only if it is empty: a script may have made it
        if os.path.lexists(target):
            raise CheckpointPathError(
                str(target),
                "is something else than the checkpoint that was there. Move it away, "
                "and the next save puts the checkpoint back.",
            )
        os.rename(aside, target)
        self._sync_directory(directory)

    def _make(self, directory: Path) -> None:
        """Make a directory and its missing parents; sync each before the next."""
        missing = [directory]
        while not missing[-1].parent.is_dir():
            missing.append(missing[-1].parent)
        for each in reversed(missing):
            if not each.is_dir():
                each.mkdir(exist_ok=True)
                self._sync_directory(each.parent)

    def _sync_directory(self, directory: Path) -> None:
        if self.sync:
            sync_path(directory)


def _discard(trash: list[Path], owner: int) -> None:
    """Delete the directories that an area left because nobody closed it."""
    if owner == os.getpid():
        for path in trash:
            shutil.rmtree(path, ignore_errors=True)


def _directories(root: Path, depth: int) -> Generator[Path]:
    """Yield `root` and the directories up to `depth` below it that are not ours.

    A directory that cannot be read is yielded, but not searched.
    """
    left = [(root, depth)]
    while left:
        directory, below = left.pop()
        yield directory
        for entry in _entries(directory) if below > 0 else []:
            try:
                is_directory = entry.is_dir()
            except OSError:  # a link that leads in a circle
                continue
            if is_directory and not entry.name.startswith(HIDDEN_PREFIX):
                left.append((Path(entry.path), below - 1))


def _all_set_aside(directory: Path) -> list[Path]:
    names = [entry.name for entry in _entries(directory)]
    return [
        directory / name
        for name in sorted(names)
        if name.startswith(REPLACED_PREFIX) and name != REPLACED_PREFIX
    ]


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as found:
            return list(found)
    except OSError:
        return []
