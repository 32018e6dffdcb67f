"""Find the checkpoints below a directory, and the hidden ones among them."""

import dataclasses
import errno
import os
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from flaxckpt._disk.info import CheckpointInfo
from flaxckpt._disk.open import is_there, unreadable
from flaxckpt._disk.record import (
    HIDDEN_PREFIX,
    REPLACED_PREFIX,
    is_checkpoint,
    located,
    read_record,
    replaced_path,
)
from flaxckpt._runtime.patience import BusyError, pause, tries
from flaxckpt.errors import CheckpointCorruptError, CheckpointPathError

Infos: TypeAlias = tuple[CheckpointInfo, ...]
# Why a listing leaves something out: it is damaged, or this process cannot read it.
LeftOut: TypeAlias = CheckpointCorruptError | CheckpointPathError


# Records that were read, by path and `_directory_at`.
Known: TypeAlias = dict[tuple[Path, Any], CheckpointInfo]


def list_below(
    root: str, depth: int | None, known: Known | None = None
) -> tuple[Infos, list[LeftOut]]:
    """List the checkpoints exactly `depth` directories below `root`; None for any.

    A writer may delete and replace checkpoints meanwhile. If a directory is gone before
    its record is read, this looks again. It calls a checkpoint damaged, or `root`
    empty, only if two looks in a row find it so.

    Args:
        root: The directory.
        depth: How far below it they are.
        known: The records that earlier calls have read, to which this call adds.

    Returns:
        The checkpoints whose records are whole, oldest first, and an error for each
        directory that is damaged or that this process cannot read.

    Raises:
        BusyError: If each checkpoint that was seen was gone before it was read.
        CheckpointPathError: If this process cannot look at `root`.
    """
    known = {} if known is None else known
    problems, doubles, was_empty = set[str](), set[Path](), False
    infos: Infos = ()
    damaged: list[LeftOut] = []
    for _ in tries():
        look = _Look(known)
        infos, before = _sorted(_find(Path(root), depth, look))
        damaged = [error for error in before if str(error) in problems]
        # While two checkpoints exchange names, a look may see one of them twice.
        twice, had = _doubles(infos), doubles
        doubles = twice
        is_settled = (
            len(damaged) == len(before) and not look.has_missed and twice <= had
        )
        is_empty = not infos and not before
        if is_settled and (was_empty or not is_empty):
            return infos, damaged
        problems, was_empty = set(map(str, before)), is_settled and is_empty
        if problems:
            pause()
    if infos:
        return infos, damaged
    raise BusyError.of(repr(root))


@dataclasses.dataclass
class _Look:
    """One look at a directory that a writer may be changing.

    Attributes:
        known: The records that this look or an earlier one has read: another directory
            may be at the path by now.
        has_missed: Whether a directory was gone or replaced before its record was read.
    """

    known: Known
    has_missed: bool = False

    def read(self, path: Path) -> CheckpointInfo | None:
        """Read the record of a directory that this look has seen; see `read_record`."""
        key = path, _directory_at(path)
        if key[1] is None or key not in self.known:
            info = read_record(path)
            if info is None:
                self.has_missed |= not _was_seen(path) or is_checkpoint(path)
                return None
            self.known[key] = info
        return self.known[key]


def _doubles(infos: Infos) -> set[Path]:
    """Return the paths of each checkpoint that was seen at more than one path."""
    times = Counter((info.series, info.time) for info in infos)
    return {info.path for info in infos if times[info.series, info.time] > 1}


def _directory_at(path: Path) -> tuple[int, int] | None:
    """Return a directory's inode and ctime, which a rename changes; None if unknown."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns


def _was_seen(path: Path) -> bool:
    """Tell whether anything is at a path, or hidden beside it.

    Of a path that is too long nobody can tell, and no later look will.
    """
    try:
        path.lstat()
    except OSError as error:
        return error.errno == errno.ENAMETOOLONG or os.path.lexists(replaced_path(path))
    return True


def _find(
    root: Path, depth: int | None, look: _Look
) -> Iterator[CheckpointInfo | LeftOut]:
    """Yield checkpoints, and errors for what is left out, in the order of paths."""
    left: list[tuple[Path, int | None]] = [(root, depth)] if is_there(root) else []
    while left:
        directory, below = left.pop()
        if below is None or below == 0:
            try:
                info = look.read(directory)
            except (CheckpointCorruptError, CheckpointPathError) as error:
                yield error
                continue
            if info is not None:
                yield info
            if below == 0 or (info is not None and located(directory) == directory):
                continue
        try:
            with os.scandir(directory) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                yield unreadable(directory, error)
            continue
        deeper: dict[Path, int | None] = {}
        # Entries under their own names come first, because the search goes on below
        # them. It does not go on below hidden checkpoints.
        for entry in sorted(entries, key=_is_replaced):
            try:
                for path, left_below in _candidates(directory, entry, below):
                    deeper.setdefault(path, left_below)
            except OSError as error:
                yield unreadable(entry.path, error)
            except CheckpointPathError as error:
                yield error
        left += reversed(deeper.items())


def _is_replaced(entry: os.DirEntry[str]) -> bool:
    return entry.name.startswith(REPLACED_PREFIX)


def _candidates(
    directory: Path, entry: os.DirEntry[str], depth: int | None
) -> list[tuple[Path, int | None]]:
    """Return the paths to look at because of an entry, each with the depth left."""
    name = entry.name
    if _is_replaced(entry):
        name = name.removeprefix(REPLACED_PREFIX)
        # Look at that name: the new checkpoint may be there by now. If it is not,
        # `located` finds the one that is hidden.
        if name and depth in (None, 1):
            return [(directory / name, 0)]
    elif not name.startswith(HIDDEN_PREFIX):
        if depth is not None:
            return [(Path(entry.path), depth - 1)] if entry.is_dir() else []
        if not name.startswith(".") and entry.is_dir(follow_symlinks=False):
            return [(Path(entry.path), None)]
    return []


def _sorted(found: Iterable[CheckpointInfo | LeftOut]) -> tuple[Infos, list[LeftOut]]:
    infos: list[CheckpointInfo] = []
    damaged: list[LeftOut] = []
    for each in found:
        if isinstance(each, CheckpointInfo):
            infos.append(each)
        else:
            damaged.append(each)
    infos.sort(key=lambda info: (info.time, str(info.path)))
    return tuple(infos), damaged


def replaced_paths(root: Path, depth: int) -> Generator[Path]:
    """Yield the hidden checkpoints in `root`, and up to `depth` directories below."""
    for directory in _directories(root, depth):
        names = [entry.name for entry in _entries(directory)]
        for name in sorted(names):
            if name.startswith(REPLACED_PREFIX) and name != REPLACED_PREFIX:
                yield directory / name


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


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as iterator:
            return list(iterator)
    except OSError:
        return []
