"""Write directories that appear whole or not at all: stage them, then exchange them.

A series keeps these beside its checkpoints; listings do not show them:

- `.flaxckpt-TAG.lock`: held by the one process that writes the series;
- `.flaxckpt-TAG.finished`: the mark of a run that has ended;
- `.flaxckpt-TAG-*/`: directories being written or deleted; garbage if no process holds
  the lock;
- `.flaxckpt-replaced-NAME/`: the old checkpoint of NAME while a new one is put there,
  only where the file system cannot exchange two directories. If no checkpoint is at
  NAME, readers of NAME take this one.
"""

import contextlib
import errno
import os
import uuid
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flaxckpt._disk.area import Area, OccupiedError
from flaxckpt._disk.claim import Claim, SeriesLock
from flaxckpt._disk.exchange import IN_THE_WAY, replace, swap
from flaxckpt._disk.files import sync_path
from flaxckpt._disk.listing import replaced_paths
from flaxckpt._disk.lock import FileLock
from flaxckpt._disk.nested import refuse_around, refuse_inside
from flaxckpt._disk.open import is_there, real
from flaxckpt._disk.record import (
    HIDDEN_PREFIX,
    REPLACED_PREFIX,
    holds_checkpoint,
    is_of,
    located,
    read_record,
    replaced_path,
)
from flaxckpt._disk.series_names import mark_of, tag_of
from flaxckpt._disk.staging import Staging
from flaxckpt._runtime.frames import outside
from flaxckpt._runtime.patience import pause, tries
from flaxckpt.errors import CheckpointError, CheckpointPathError

_TOKEN = "token"  # beside a directory in which several processes write


class DiskArea(Area):
    """Where one series of checkpoints is written on a disk; see `Area`."""

    is_mirror = False

    def __init__(
        self,
        root: Path,
        series: Sequence[str],
        depth: int,
        *,
        sync: bool,
        mirrors: tuple[SeriesLock, str] | None = None,
    ) -> None:
        """Describe the area; touch nothing.

        Args:
            root: The directory below which the series' checkpoints are.
            series: The series' name, and then the name of its slot's series.
            depth: How many directories below `root` the checkpoints lie, at most.
            sync: Whether to sync directories.
            mirrors: The lock and the URL of the object store that this mirrors; None if
                it mirrors none.
        """
        self._root, self._series, self._depth, self.sync = root, series, depth, sync
        self._mirrors = mirrors is not None
        lock, shown = mirrors or (FileLock(), str(root))
        self.prefix = f"{HIDDEN_PREFIX}{tag_of(series[0])}-"
        self.claim = Claim(root, f"{self.prefix[:-1]}.lock", lock, shown)
        self._mark = root / mark_of(series[0])
        self._staging = Staging(root, self.prefix, self.claim)
        self.staging = self._staging.directory

    def open(self, *clear_up: Callable[[], None]) -> None:
        """See `Area.open`.

        Args:
            *clear_up: What clears up after the area has.
        """
        if self.claim.is_taken and self.claim.is_held:
            return
        root = real(self._root)
        refuse_inside(root, (root, *root.parents))
        self._make(self._root)
        self.claim.take(self._finish_replacements, self._staging.clear_up, *clear_up)

    def _refuse_around(self, path: Path) -> None:
        """Check that what is at a path has no other checkpoint in it.

        A store deletes no checkpoint together with another one.
        """
        if not self._mirrors:
            refuse_around(path)

    def sweep(self, *, spare: bool = True) -> None:
        """See `Area.sweep`."""
        # Not the method of `Staging` itself: a job that holds this one keeps the claim.
        self._staging.sweep(spare=spare)

    def spare(self, directory: Path) -> None:
        """See `Area.spare`."""
        self._staging.spare(directory)

    def meeting_place(self, written: Path, target: Path) -> str:
        """See `Area.meeting_place`; a token proves that others see the directory."""
        del target
        token = uuid.uuid4().hex
        (written.parent / _TOKEN).write_text(token)
        return f"{token} {written}"

    @contextmanager
    def share(self, place: str) -> Generator[Path]:
        """Yield the directory that process 0 is writing."""
        token, _, written = place.partition(" ")
        for _ in tries():  # a network's file system may show it a little later
            with contextlib.suppress(OSError):
                if Path(written).with_name(_TOKEN).read_text() == token:
                    break
            pause()
        else:
            raise FileNotFoundError(
                errno.ENOENT,
                "what process 0 has made there is not there. Save on a file system "
                "that all processes share, or in an object store",
                str(self._root),
            )
        yield Path(written)

    def shown(self, path: Path) -> Path:
        """Return the path."""
        return path

    def commit(
        self, written: Path, target: Path, *, only_over: str | None = None
    ) -> None:
        """See `Area.commit`."""
        self.claim.check(target)
        self._refuse_around(target)
        self._make(target.parent)
        self.claim.count_change()
        with contextlib.suppress(FileNotFoundError):
            self._mark.unlink()
            self._sync_directory(self._root)
        with self.claim.committing:
            replaces = self._put(written, target, only_over)
            try:
                self._sync_directory(target.parent)
                self._sync_directory(written.parent)
            except BaseException:
                self._take_back(written, target, replaces=replaces)
                raise

    def _put(self, written: Path, target: Path, own: str | None) -> bool:
        """Give a directory its name; tell whether another directory had the name.

        With `own`, the name must be free or have a checkpoint of that series. Other
        processes may want the name, too. A rename never replaces their checkpoint, and
        only this process changes a checkpoint of `own`. Where directories cannot be
        exchanged, another series may hide its checkpoint for a moment: the name looks
        free, but is still taken.
        """
        hidden = replaced_path(target)
        try:
            os.rename(written, target)
        except OSError as error:
            if error.errno not in IN_THE_WAY:
                raise
        else:
            if own is None or not os.path.lexists(hidden) or is_of(hidden, own):
                return False
            os.rename(target, written)
            raise OccupiedError(target)
        if own is not None and not is_of(target, own):
            raise OccupiedError(target)
        try:
            replace(written, target, self._sync_directory)
        except OSError as error:
            if own is not None and error.errno in IN_THE_WAY:  # another has taken it
                raise OccupiedError(target) from error
            raise
        return True

    def _take_back(self, written: Path, target: Path, *, replaces: bool) -> None:
        """Undo `commit` after a failed sync; if that fails, spare the old directory."""
        try:
            if replaces:
                replace(written, target, lambda _: None)
            else:
                os.rename(target, written)
        except OSError:
            self.spare(written.parent)  # it holds the old directory

    def remove(self, path: Path) -> None:
        """See `Area.remove`."""
        self.claim.check(path)
        self.claim.count_change()
        if path.is_symlink():  # somebody keeps the checkpoint elsewhere
            path.unlink()
            self._sync_directory(path.parent)
            return
        path = located(path)  # if that is being replaced, what is at `path` stays
        self._refuse_around(path)
        trash = self._staging.made()
        try:
            path.rename(trash / "new")
        except OSError:
            trash.rmdir()
            raise
        try:
            # The rename must be on disk before `staging` writes over the files.
            self._sync_directory(trash)
            self._sync_directory(path.parent)
        except BaseException:
            # Otherwise a crash may bring it back, written over or half deleted.
            with contextlib.suppress(OSError):
                os.rename(trash / "new", path)
                trash.rmdir()
            raise
        self._staging.trash.append(trash)

    def finish(self) -> None:
        """See `Area.finish`."""
        self.claim.check(self._root)
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        os.close(os.open(self._mark, flags, 0o666))
        self._sync_directory(self._root)

    @property
    def is_finished(self) -> bool:
        """See `Area.is_finished`."""
        return is_there(self._mark)

    def swap(self, new: Path, path: Path) -> None:
        """See `Area.swap`."""
        self.claim.check(path)
        self.claim.count_change()
        with self.claim.committing:
            if is_there(replaced_path(path)):  # an error came between two renames
                self._finish_replacement(replaced_path(path))
            swap(new, path, self._sync_directory)
            try:
                self._sync_directory(path.parent)
            except BaseException:
                with contextlib.suppress(OSError):
                    swap(new, path, lambda _: None)
                raise

    def move(self, path: Path, target: Path) -> None:
        """See `Area.move`."""
        self.claim.check(path)
        self._refuse_around(path)
        self.claim.count_change()
        with self.claim.committing:
            path.rename(target)
            self._sync_directory(path.parent)

    def _finish_replacements(self) -> None:
        """Put back each hidden checkpoint, or delete it if its successor is there.

        If a checkpoint cannot be read or moved, warn and leave it as it is: it may
        belong to another series or another user.
        """
        for hidden in replaced_paths(self._root, self._depth - 1):
            try:
                self._finish_replacement(hidden)
            except (OSError, CheckpointError) as error:
                warnings.warn(
                    f"{str(hidden)!r} is left as it is, and may be a checkpoint "
                    f"that was being replaced: {error}",
                    stacklevel=outside(),
                )

    def _finish_replacement(self, hidden: Path) -> None:
        info = read_record(hidden)
        if info is None or info.series not in self._series:
            return
        target = hidden.with_name(hidden.name.removeprefix(REPLACED_PREFIX))
        if holds_checkpoint(target) and is_of(target, info.series):
            self.remove(hidden)
            return
        with contextlib.suppress(OSError):
            target.rmdir()  # only if it is empty: a script may have made it
        if os.path.lexists(target):
            raise CheckpointPathError(
                str(target),
                "is something else than the checkpoint that was there. Move it away, "
                "and the next save puts the checkpoint back.",
            )
        os.rename(hidden, target)
        self._sync_directory(hidden.parent)

    def _make(self, directory: Path) -> None:
        """Make a directory and its missing parents; sync each before the next."""
        missing = [directory]
        while not missing[-1].parent.is_dir():
            missing.append(missing[-1].parent)
        for absent in reversed(missing):
            if not absent.is_dir():
                absent.mkdir(exist_ok=True)
                self._sync_directory(absent.parent)

    def _sync_directory(self, directory: Path) -> None:
        if self.sync:
            sync_path(directory)
