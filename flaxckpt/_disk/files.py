"""Files of a directory being filled, in the blocks of those of before where it has any.

Fresh blocks and page cache cost three times the writing, so a directory of which nobody
has any use is written over.
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

Stamp: TypeAlias = tuple[int, int, int, int]
_SYNCS = 4  # at a time
_sync_data = getattr(os, "fdatasync", os.fsync)  # macOS has one only


def sync_tree(directory: Path) -> None:
    """Have the disk take all files and directories in a directory, and itself."""
    for path, _, files in os.walk(directory, topdown=False):
        for name in files:
            sync_path(os.path.join(path, name))
        sync_path(path)


def keep_only(directory: Path, names: Container[str]) -> None:
    """Make a directory of which nobody has any use ready to be written over.

    Of its files, those stay that have one of the names and that this process can write;
    of its directories, those with files.

    Args:
        directory: The directory; nothing happens if there is none.
        names: Paths in it.

    Raises:
        OSError: If it cannot be written over.
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
    """A directory being filled, in the blocks of the files of before where it has any.

    A file that is there is of no use to anybody who asks for it by its path, but may
    have other names, or be open: then it is left as it is, and replaced. For use by
    several threads, each with files of its own.
    """

    def __init__(self, directory: Path, *, sync: bool) -> None:
        """Make the directory, if need be.

        Args:
            directory: Where.
            sync: Whether to have the disk take each file as it is written.
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
        """Wait until nothing is done to the files any more."""
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
    def writing(self, name: str) -> Generator[Callable[[Any], None]]:
        """Write a file, part by part.

        The disk takes it while others are written: `finish` waits for that.

        Args:
            name: Its path in the directory.

        Yields:
            What writes the next of its bytes.
        """
        path = self._root / name
        self._make(path.parent)
        descriptor, is_new = _open_over(path)
        try:
            if is_new:
                self._changed.add(path.parent)
            size = 0

            def write(part: Any) -> None:
                nonlocal size
                left = memoryview(part)
                size += len(left)
                while left:
                    left = left[os.write(descriptor, left) :]

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

        self._open.acquire()  # so that not all files there are get opened
        self._syncs.append(self._disk.submit(sync))

    def stamp(self, name: str) -> Stamp:
        """Return what a file here can be known by again, under any of its names."""
        return stamp_of(self._root / name)

    def link(self, name: str, source: Path, stamp: Stamp) -> bool:
        """Give a file that is on disk already a name here too, instead of writing it.

        Args:
            name: Its path in the directory.
            source: The file.
            stamp: What it was known by when it was written.

        Returns:
            Whether that was possible. If not, nothing has changed here.
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
            if stamp_of(new) != stamp:  # somebody has put another one there
                new.unlink()
                return False
            os.replace(new, path)
        except OSError:  # deleted by hand, too many links, or none on this file system
            return False
        self._changed.add(path.parent)
        return True

    def finish(self) -> None:
        """Have the disk take all files, and then their names.

        Raises:
            OSError: If it does not take one.
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
    """Return what a file can be known by again, under any of its names."""
    found = path.lstat()
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _open_over(path: Path) -> tuple[int, bool]:
    """Open a file to write it; tell whether it is a new one."""
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
    """Tell whether a file is open nowhere else, as Linux knows: it grants a lease then.

    False where that cannot be known.
    """
    try:
        # Who opens it in between makes the kernel send a signal: one that does nothing.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except (OSError, AttributeError):
        return False
    return True


def sync_path(path: str | Path) -> None:
    """Have the disk take a file, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
