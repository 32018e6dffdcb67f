"""The right to change a series: one process has it, and its objects take turns."""

import contextlib
import os
import socket
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from flaxckpt._disk.open import real
from flaxckpt._runtime.locks import new_lock
from flaxckpt.errors import CheckpointLockedError, CheckpointWriteError


class SeriesLock(Protocol):
    """The lock of a series. Several objects in a process may have it.

    The argument `path` of each method is the path of a file on the disk. An object
    store has an object of the file's name instead.
    """

    def acquire(self, path: Path) -> bool:
        """Take it; return whether to clear up what an earlier writer has left."""
        ...

    def is_held(self, path: Path, at: str) -> bool:
        """Tell whether this process has it, and what is at `at` is still the lock."""
        ...

    def note_cleared(self, path: Path) -> None:
        """Note that what an earlier writer has left is cleared up."""

    def release(self, path: Path) -> None:
        """Give it back."""

    def drop(self, path: Path) -> None:
        """Give it back after its owner is collected, and wait for nothing."""


class _Shared:
    """State that the claims to one series in this process share.

    Attributes:
        turn: Held while one of the objects changes the series.
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


class Claim:
    """One object's right to change a series.

    Attributes:
        turn: Held while the series is changed; other objects in this process wait.
        committing: Held while a checkpoint is put in its place and not yet synced.
    """

    def __init__(self, root: Path, name: str, lock: SeriesLock, shown: str) -> None:
        """Describe the right; take nothing yet.

        Args:
            root: The directory of the lock's file.
            name: The file's name.
            lock: The lock.
            shown: The directory as users see it in messages.
        """
        self._root, self._path, self._lock, self._shown = root, Path(name), lock, shown
        self._owner = 0  # id of the process that has taken it
        self._process = os.getpid()
        self._find_lock()

    def _find_lock(self) -> None:
        """Point to the lock by its real path; give back the lock at an earlier one."""
        path = Path(real(self._root), self._path.name)
        if path == self._path:
            return
        if self.is_taken:
            self._lock.release(self._path)
        self._path = path
        with _SHARING:
            shared = self._shared = _SHARED.setdefault(str(path), _Shared())
        self.turn, self.committing = shared.turn, shared.committing
        weakref.finalize(self, self._lock.drop, path)

    @property
    def is_taken(self) -> bool:
        """Whether this process has taken the right, for this object."""
        return self._owner == os.getpid()

    @property
    def is_held(self) -> bool:
        """Whether this process has the lock, and nobody has deleted its file."""
        return self._lock.is_held(self._path, os.path.join(self._root, self._path.name))

    @property
    def changes(self) -> int:
        """How often this process has changed the series."""
        return self._shared.changes

    def take(self, *clear_up: Callable[[], None]) -> None:
        """Take the lock, and clear up what a crash left behind.

        Args:
            *clear_up: What clears up, in this order.

        Raises:
            CheckpointLockedError: If another process writes this series.
            CheckpointPathError: If the lock's file cannot be the lock.
        """
        self._find_lock()
        # If the lock was deleted during a save of this process, that save relies on
        # what was there before. Wait until it has failed, and then take the lock anew.
        with contextlib.nullcontext() if self.is_held else self.turn, _OPENING:
            self._owner = 0
            try:  # other objects wait at `_OPENING` until this is cleared up
                if self._lock.acquire(self._path):
                    for clear in clear_up:
                        clear()
                    self._lock.note_cleared(self._path)
                self._shared.changes += 1  # another process may have changed it
            except BaseException:
                self._lock.release(self._path)
                raise
            self._owner = os.getpid()

    def close(self, sweep: Callable[..., None]) -> None:
        """Sweep, and give the lock back; after an interrupt, call it again."""
        try:
            if self.is_taken:
                sweep(spare=False)
        except Exception:
            self.give_back()
            raise
        self.give_back()

    def give_back(self) -> None:
        """Give the lock back."""
        self._owner = 0
        self._lock.release(self._path)

    def count_change(self) -> None:
        """Note that this object is about to change the series."""
        self._shared.changes += 1

    def check(self, path: Path) -> None:
        """Check that the lock is held, before what is at a path is changed.

        Raises:
            CheckpointWriteError: If the lock's file was deleted.
        """
        if not self.is_held:
            raise CheckpointWriteError(
                str(path),
                "the lock of these checkpoints was deleted meanwhile, and another "
                "process may be writing them",
            )

    @property
    def is_inherited(self) -> bool:
        """Whether a process that this one was forked from made the object."""
        return self._process != os.getpid()

    def inherited_error(self) -> CheckpointLockedError:
        """Make the error for a call that only the object's own process can make."""
        return CheckpointLockedError(
            self._shown, socket.gethostname(), self._process, True
        )
