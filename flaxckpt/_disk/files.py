"""Write and sync the files of a directory, over earlier files where it has any.

Fresh blocks and page cache cost three times as much as the writing, so a directory that
nobody uses any more is written over.
"""

import contextlib
import errno
import fcntl
import os
import signal
import stat
import threading
from collections.abc import Callable, Container, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeAlias

from flaxckpt._disk.page_cache import past_cache, through_cache

Stamp: TypeAlias = tuple[int, int, int, int]
_SYNCS = 4  # at a time
_sync_data = getattr(os, "fdatasync", os.fsync)  # macOS has only fsync


def sync_tree(directory: Path) -> None:
    """Sync a directory and all files and directories in it."""
    for path, _, files in os.walk(directory, topdown=False):
        for name in files:
            sync_path(os.path.join(path, name))
        sync_path(path)


def keep_only(directory: Path, names: Container[str]) -> None:
    """Prepare a directory that nobody uses any more to be written over.

    Keep the plain files in `names` that this process can write, and the directories
    that hold files. Delete everything else.

    Args:
        directory: The directory; nothing happens if there is none.
        names: Paths of files, relative to `directory`.

    Raises:
        OSError: If the directory is a link, or cannot be written over.
    """
    if not os.path.lexists(directory):
        return
    if directory.is_symlink():
        raise NotADirectoryError(errno.ENOTDIR, "is a link", str(directory))
    for path, directories, files in os.walk(directory, topdown=False, onerror=_refuse):
        here = Path(path)
        for name in files:
            file = here / name
            if file.relative_to(directory).as_posix() not in names or not (
                stat.S_ISREG(file.lstat().st_mode) and os.access(file, os.W_OK)
            ):
                file.unlink()
        for name in directories:
            if (here / name).is_symlink():
                (here / name).unlink()
            elif not any((here / name).iterdir()):
                (here / name).rmdir()
        if not os.access(here, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)


def _refuse(error: OSError) -> None:
    raise error


class Draft:
    """A directory being filled; earlier files in it are written over.

    An earlier file that has other names, or may be open elsewhere, is not written over:
    a new file takes its name. Several threads may write, each its own files.
    """

    def __init__(self, directory: Path, *, sync: bool) -> None:
        """Make the directory, unless it exists.

        Args:
            directory: The directory to fill.
            sync: Whether to sync each file after it is written.
        """
        self._root, self._sync = directory, sync
        self._changed: set[Path] = set()
        self._made: set[Path] = set()
        self._disk = ThreadPoolExecutor(_SYNCS, "flaxckpt-sync")
        self._syncs: list[Future[None]] = []
        self._open = threading.BoundedSemaphore(2 * _SYNCS)
        self._make(directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Wait until all syncs have ended."""
        self._disk.shutdown()

    def write(self, name: str, parts: Iterable[Any]) -> None:
        """Write a file.

        Args:
            name: Its path in the directory.
            parts: Its bytes, in order.
        """
        with self.writing(name) as write:
            for part in parts:
                write(part)

    @contextlib.contextmanager
    def writing(
        self, name: str, *, is_kept_in_cache: bool = True
    ) -> Generator[Callable[[Any], None]]:
        """Write a file, part by part.

        A thread syncs it while others are written; `finish` waits for the sync.

        Args:
            name: Its path in the directory.
            is_kept_in_cache: Whether the page cache keeps the file: it should if a
                later save writes over it. If not, a new file goes past it where
                `past_cache` can.

        Yields:
            A function that writes the next bytes of the file.
        """
        path = self._root / name
        self._make(path.parent)
        descriptor, is_new = _open_over(path)
        try:
            if is_new:
                self._changed.add(path.parent)
            size = 0
            way = through_cache if is_kept_in_cache or not is_new else past_cache
            with way(descriptor) as put:

                def write(part: Any) -> None:
                    nonlocal size
                    left = memoryview(part)
                    size += len(left)
                    put(left)

                yield write
            if os.fstat(descriptor).st_size > size:
                os.ftruncate(descriptor, size)
            if self._sync:
                self._sync_later(os.dup(descriptor))
        finally:
            os.close(descriptor)

    def _sync_later(self, descriptor: int) -> None:
        def sync() -> None:
            try:
                _sync_data(descriptor)
            finally:
                os.close(descriptor)
                self._open.release()

        self._open.acquire()  # limits how many files are open
        self._syncs.append(self._disk.submit(sync))

    def stamp(self, name: str) -> Stamp:
        """Return the stamp of a file here; see `stamp_of`."""
        return stamp_of(self._root / name)

    def link(self, name: str, source: Path, stamp: Stamp) -> bool:
        """Link a file that is on disk already, instead of writing it.

        Args:
            name: The link's path in the directory.
            source: The file.
            stamp: The file's stamp when it was written.

        Returns:
            Whether `name` is that file. If not, what is at `name` is unchanged.
        """
        path = self._root / name
        new = path.with_name(f"{path.name}.link")
        try:
            self._make(path.parent)
            with contextlib.suppress(FileNotFoundError):
                if stamp_of(path) == stamp:
                    return True
            with contextlib.suppress(FileNotFoundError):
                new.unlink()
            os.link(source, new)
            if stamp_of(new) != stamp:  # another file is at `source` by now
                new.unlink()
                return False
            os.replace(new, path)
        except OSError:  # deleted by hand, too many links, or links not supported
            return False
        self._changed.add(path.parent)
        return True

    def finish(self) -> None:
        """Wait until all files are synced, and then sync their names.

        Raises:
            OSError: If a sync fails.
        """
        for each in self._syncs:
            each.result()
        if self._sync:
            for directory in sorted(self._changed, reverse=True):
                sync_path(directory)

    def _make(self, directory: Path) -> None:
        if directory in self._made:
            return
        if not directory.is_dir():
            self._make(directory.parent)
            with contextlib.suppress(FileExistsError):  # by another thread
                directory.mkdir()
            self._changed.update((directory, directory.parent))
        self._made.add(directory)


def stamp_of(path: Path) -> Stamp:
    """Identify a file under any name: device, inode, modification time in ns, size."""
    found = path.lstat()
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _open_over(path: Path) -> tuple[int, bool]:
    """Open a file for writing; tell whether it is new."""
    flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        pass
    except OSError:  # a link, a FIFO, a file that this process cannot write
        path.unlink()
    else:
        found = os.fstat(descriptor)
        is_plain = stat.S_ISREG(found.st_mode) and found.st_nlink == 1
        if is_plain and _is_only_opener(descriptor):
            return descriptor, False
        os.close(descriptor)
        path.unlink()
    return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666), True


def _is_only_opener(descriptor: int) -> bool:
    """Tell whether a file is open nowhere else; False if that cannot be known.

    Linux grants a write lease only for such a file.
    """
    try:
        # If a process opens the file meanwhile, the kernel sends SIGURG: a no-op.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except (OSError, AttributeError):
        return False
    return True


def sync_path(path: str | Path) -> None:
    """Sync a file, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
