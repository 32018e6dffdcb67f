"""What the rest of the package asks of the place where a series is written."""

import contextlib
from collections.abc import Container
from pathlib import Path
from typing import Protocol

from flaxckpt._disk.claim import Claim


class OccupiedError(Exception):
    """The place holds something that may not be replaced."""


class Area(Protocol):
    """Where one series of checkpoints is written: a directory, or an object store.

    Attributes:
        claim: The right to change the series.
        sync: Whether to sync what is written.
        is_mirror: Whether the checkpoints are in an object store. The paths then lead
            to a directory that mirrors the store.
    """

    claim: Claim
    sync: bool
    is_mirror: bool

    def open(self) -> None:
        """Make the directory, take the lock, and clear up what a crash left behind.

        Raises:
            CheckpointLockedError: If another process writes this series.
            CheckpointPathError: If the directory is in a checkpoint, or the lock's file
                cannot be the lock.
        """

    def close(self) -> None:
        """Sweep, and give the lock back; after an interrupt, call it again."""
        self.claim.close(self.sweep)

    def refresh(self, *paths: Path) -> None:
        """Fetch what other processes changed in a store; a listing reads a disk.

        Args:
            *paths: The checkpoints to fetch; all if none are given.

        Raises:
            CheckpointLockedError: If this process was forked from the one that made the
                area of a store: TensorStore's threads exist only there.
        """

    def shown(self, path: Path) -> Path:
        """Return a path as users see it in messages."""
        ...

    def staging(
        self, *, reuse: Container[str] | None = None
    ) -> contextlib.AbstractContextManager[Path]:
        """Make a directory to write in; `sweep` deletes what is left in it.

        Args:
            reuse: The files that will be written below `new`, if the directory may be
                one with an old checkpoint at `new`, to be written over. `sweep` then
                keeps one for the next save. None for an empty directory.
        """
        ...

    def spare(self, directory: Path) -> None:
        """Keep a directory of `staging`, whatever happens, until a later save."""

    def meeting_place(self, written: Path, target: Path) -> str:
        """Return where other processes write their shares of a checkpoint, for `share`.

        Args:
            written: The directory that process 0 is writing.
            target: Its place once it is whole.
        """
        ...

    def share(self, place: str) -> contextlib.AbstractContextManager[Path]:
        """Return a directory for this process's share of a checkpoint.

        Args:
            place: What `meeting_place` returned in process 0.

        Raises:
            FileNotFoundError: If this process does not see the directory of process 0.
        """
        ...

    def commit(
        self, written: Path, target: Path, *, only_over: str | None = None
    ) -> None:
        """Move a finished directory to its place, or exchange it with the one there.

        First the mark of `finish` goes. At every moment a reader of `target` finds the
        whole old checkpoint or the whole new one. When this returns, the name is
        durable. The old directory is at `written` then, and may be deleted.

        Args:
            written: The new directory, whose files are synced already; see `files`.
            target: Its place.
            only_over: The only series whose checkpoint may be replaced; None for any.

        Raises:
            OccupiedError: If something else is at `target`; it is unchanged.
            CheckpointWriteError: If the lock's file was deleted.
            CheckpointPathError: If the checkpoint at `target` has another one in it.
        """

    def remove(self, path: Path) -> None:
        """Remove a checkpoint's name at once; `sweep` deletes its files."""

    def finish(self) -> None:
        """Mark the run as ended; the next `commit` takes the mark away.

        The area must be open. When this returns, the mark is durable.
        """

    @property
    def is_finished(self) -> bool:
        """Whether the mark is there."""
        ...

    def swap(self, new: Path, path: Path) -> None:
        """Exchange the names of two checkpoints in one directory; not in a store.

        Args:
            new: Path of the checkpoint that is to be at `path`.
            path: Path of the other checkpoint.

        Raises:
            FileNotFoundError: If there is nothing at `path`.
        """

    def move(self, path: Path, target: Path) -> None:
        """Rename a checkpoint to `target`, where there must be nothing.

        A store has no renames, so there the checkpoint stays at `path`, too, until
        another one is put there.

        Raises:
            FileNotFoundError: If no checkpoint is at `path`.
        """

    def sweep(self, *, spare: bool = True) -> None:
        """Delete replaced and removed checkpoints, which may take a while.

        Args:
            spare: Whether to keep one directory to write over, if `staging` was called
                with `reuse` last.
        """
