"""Directories that appear whole or not at all, and stay: staging and exchanging.

What a series of checkpoints has on disk beside them, all of it hidden from listings:

- `.flaxckpt-TAG.lock`: held by the one process that writes the series;
- `.flaxckpt-TAG-…/`: work in progress, or things on their way out; garbage if nobody
  holds the lock;
- `.flaxckpt-replaced-NAME/`: only where the file system cannot exchange two
  directories: what was at NAME, while something new is put there. Where no checkpoint
  is at NAME, this is it.
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
    """Something is in a place that may not be replaced there."""


class _Shared:
    """What the areas of one series in this process have in common.

    Attributes:
        turn: Held by the one that changes the series.
        committing: Held while a checkpoint is put in its place and not yet synced.
        changes: How often it was changed.
    """

    def __init__(self) -> None:
        self.changes = 0
        self.turn, self.committing = new_lock(), new_lock()


_OPENING, _SHARING = new_lock(), new_lock()
# By names, not by paths: Python compares those even when its modules are gone.
_SHARED: "weakref.WeakValueDictionary[str, _Shared]" = weakref.WeakValueDictionary()
# A forked process does not wait for threads, which are its parent's.
os.register_at_fork(after_in_child=_SHARED.clear)


class Area:
    """Where one series of checkpoints is written.

    Attributes:
        process: The process that has made it.
        is_mirror: Whether it only mirrors where the checkpoints are.
    """

    is_mirror = False

    def __init__(
        self, root: Path, series: Sequence[str], depth: int, *, sync: bool
    ) -> None:
        """Describe the area; touch nothing.

        Args:
            root: The directory below which the series' checkpoints are.
            series: Its name, and those of what belongs to it.
            depth: How many directories below `root` its checkpoints lie, at most.
            sync: Whether to wait for the disk.
        """
        tag = hashlib.sha256(os.fsencode(series[0])).hexdigest()[:8]
        self._root, self._series, self._depth, self.sync = root, series, depth, sync
        self._staging = f"{HIDDEN_PREFIX}{tag}-"
        self._lock = Path(f"{HIDDEN_PREFIX}{tag}.lock")
        self._owner = 0  # the process that has opened it
        self._trash: list[Path] = []
        self._kept_aside: list[Path] = []
        self._reuses = False
        self._sweeping = new_lock()
        self.process, self._holder = os.getpid(), object()
        self._find_lock()
        weakref.finalize(self, _discard, self._trash, self.process)

    def _find_lock(self) -> None:
        """Find the lock in its directory, whatever path and links lead there."""
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
        """Held while the series is changed; other objects of it here wait."""
        return self._shared.turn

    @property
    def committing(self) -> contextlib.AbstractContextManager[Any]:
        """Held while a checkpoint is put in its place and not yet synced."""
        return self._shared.committing

    def open(self) -> None:
        """Make the directory, take the lock, and clear up what a crash left behind.

        Raises:
            CheckpointLockedError: If another process writes this series.
            CheckpointPathError: If the directory is in a checkpoint.
        """
        if self._owner == os.getpid() and self._is_held():
            return
        root = real(self._root)
        refuse_inside(root, (root, *root.parents))
        self._make(self._root)
        self._find_lock()
        # A save under way here whose lock was deleted goes by what was there before:
        # it ends, by an error, before the lock is taken anew.
        with contextlib.nullcontext() if self._is_held() else self.turn, _OPENING:
            self._owner = 0
            try:  # nobody writes what is cleared up here
                if self._acquire():
                    self._clear_up()
                    self._note_cleared()
                self._shared.changes += 1  # others may have changed it
            except BaseException:
                self._release()
                raise
            self._owner = os.getpid()

    def _is_held(self) -> bool:
        """Tell whether this process has the lock, and nobody has deleted it."""
        return holds_lock(self._lock, os.path.join(self._root, self._lock.name))

    def _check_lock(self, path: Path) -> None:
        if not self._is_held():
            raise CheckpointWriteError(
                str(path),
                "the lock of these checkpoints was deleted meanwhile, and another "
                "process may be writing them",
            )

    def _spare_others(self, path: Path) -> None:
        """Check that no checkpoint is moved or deleted with what is at a path."""
        refuse_around(path)

    def _clear_up(self) -> None:
        self._finish_replacements()
        for entry in list(os.scandir(self._root)):
            if entry.name.startswith(self._staging):
                shutil.rmtree(entry.path, ignore_errors=True)  # no link, no file
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)
        self._trash.clear()

    @property
    def is_inherited(self) -> bool:
        """Whether it was made by the process that this one was forked from."""
        return self.process != os.getpid()

    def inherited(self) -> CheckpointLockedError:
        """Make the error for what only the process that has made it can do."""
        root, host = str(self.shown(self._root)), socket.gethostname()
        return CheckpointLockedError(root, host, self.process, True)

    def close(self) -> None:
        """Give the lock back. Where that is interrupted, the next call goes on."""
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
        """Return what gives the lock back when the area is collected as garbage."""
        return functools.partial(drop_lock, self._lock, self._holder)

    def refresh(self, *paths: Path) -> None:
        """Have on the disk what others have changed elsewhere: nothing, here."""

    def meeting_place(self, written: Path, target: Path) -> str:
        """Say where other processes put their shares of a directory.

        Args:
            written: The directory.
            target: Its place, once all of it is there.
        """
        del target
        return str(written)

    @contextmanager
    def share(self, place: str) -> Generator[Path]:
        """Have a directory for a share of one that another process has begun.

        Args:
            place: What `meeting_place` has returned there.
        """
        yield Path(place)

    def shown(self, path: Path) -> Path:
        """Return a path as its users know it."""
        return path

    @contextmanager
    def staging(self, *, reuse: Container[str] | None = None) -> Generator[Path]:
        """Make a directory to write in; what is left in it is for `sweep`.

        Args:
            reuse: The files to be written at `new`, if the directory may be one with an
                old checkpoint there, to be written over. Then one is kept for the next
                time.
        """
        self._reuses = reuse is not None
        if reuse is None:
            self._sweep_disk(spare=True)  # it may be the room that is needed
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
            except OSError:  # somebody has made it, or something in it, immutable
                shutil.rmtree(path, ignore_errors=True)
            else:
                return path
        return self._made()

    def sweep(self, *, spare: bool = True) -> None:
        """Delete what was replaced or removed, which may take a while.

        Args:
            spare: Whether to keep one to write over, if the last save could have.
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

        `target` is at every moment the old directory, whole, or the new one, whole. Its
        name is on disk when this returns: whoever deletes the old one, which is at
        `written` then, may do so now.

        Args:
            written: The new directory, which is on disk already; see `_draft`.
            target: Its place.
            only_over: The series of which a checkpoint may be replaced there; None if
                all may.

        Raises:
            OccupiedError: If something else is there, which was not touched.
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
        """Give a directory its name; tell whether another one had it."""
        try:
            os.rename(written, target)
        except OSError as error:
            if error.errno not in IN_THE_WAY:
                raise
            replace(written, target, self._sync_directory)
            return True
        return False

    def _put_over_own(self, written: Path, target: Path, own: str) -> bool:
        """Give a directory its name, if that is free or a series' own.

        Other processes may want the name, too. What the own series has there, only this
        one changes, and a rename replaces nothing. Where directories cannot be
        exchanged, a name is missing for a moment that is another series' all the same.
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
            if error.errno in IN_THE_WAY:  # taken while the name was missing
                raise OccupiedError(target) from error
            raise
        return True

    def _take_back(self, written: Path, target: Path, *, replaces: bool) -> None:
        """Undo what the disk may not have taken: who fails leaves what was there."""
        try:
            if replaces:
                replace(written, target, lambda _: None)
            else:
                os.rename(target, written)
        except OSError:
            self._kept_aside.append(written.parent)  # it holds what was there

    def remove(self, path: Path) -> None:
        """Delete a checkpoint: it is gone at once, however long its files take."""
        self._check_lock(path)
        self._shared.changes += 1
        if path.is_symlink():  # to where somebody else keeps it
            path.unlink()
            self._sync_directory(path.parent)
            return
        path = located(path)  # what is at `path`, and no checkpoint, stays
        self._spare_others(path)
        aside = self._made()
        try:
            path.rename(aside / "new")
        except OSError:
            aside.rmdir()
            raise
        try:
            # Before its files are written over, it must be gone for good.
            self._sync_directory(aside)
            self._sync_directory(path.parent)
        except BaseException:
            # Else it may come back after a crash, written over or half deleted.
            with contextlib.suppress(OSError):
                os.rename(aside / "new", path)
                aside.rmdir()
            raise
        self._trash.append(aside)

    def swap(self, new: Path, path: Path) -> None:
        """Exchange the names of two checkpoints in one directory.

        Args:
            new: The one that is to be at `path`.
            path: The other one.

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
        """Give a checkpoint another name, at which there is nothing."""
        self._check_lock(path)
        self._spare_others(path)
        self._shared.changes += 1
        with self.committing:
            path.rename(target)
            self._sync_directory(path.parent)

    def _finish_replacements(self) -> None:
        """Put back what was set aside and not replaced; delete what was.

        What cannot be read, or moved, is left as it is, with a warning: it may be
        another series', or another user's.
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
            target.rmdir()  # only if nothing is in it, as where a script has made it
        if os.path.lexists(target):
            raise CheckpointPathError(
                str(target),
                "is something else than the checkpoint that was there. Move it away, "
                "and the next save puts the checkpoint back.",
            )
        os.rename(aside, target)
        self._sync_directory(directory)

    def _make(self, directory: Path) -> None:
        """Make a directory and those above it, each on disk before the next."""
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
    """Delete what an area that nobody closed has left."""
    if owner == os.getpid():
        for path in trash:
            shutil.rmtree(path, ignore_errors=True)


def _directories(root: Path, depth: int) -> Generator[Path]:
    """Yield `root` and the directories up to `depth` below it that are not hidden.

    Those that cannot be read are left out.
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
