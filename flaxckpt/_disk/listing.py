"""The checkpoints below a directory, found by their records."""

import dataclasses
import errno
import os
from collections import Counter
from collections.abc import Iterable, Iterator
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
)
from flaxckpt._runtime.patience import looks, pause
from flaxckpt.errors import CheckpointCorruptError, CheckpointError, CheckpointPathError

Infos: TypeAlias = tuple[CheckpointInfo, ...]
# What a listing leaves out: what is damaged, and what this process cannot read.
LeftOut: TypeAlias = CheckpointCorruptError | CheckpointPathError


def list_below(root: str, depth: int | None) -> tuple[Infos, list[LeftOut]]:
    """List the checkpoints exactly `depth` directories below `root`; None for any.

    A writer may delete and replace checkpoints meanwhile. What goes between two looks
    is left out, and nothing is called damaged, and no directory empty, by one look.

    Returns:
        Those whose records are whole, oldest first, and what is wrong with the others,
        and with what cannot be read beside them.

    Raises:
        CheckpointError: If each checkpoint that was seen was gone before it was read.
    """
    known: dict[tuple[Path, Any], CheckpointInfo] = {}
    problems, doubles, was_empty = set[str](), set[Path](), False
    infos: Infos = ()
    damaged: list[LeftOut] = []
    for _ in looks():
        look = _Look(known)
        infos, damaged = _sorted(_find(Path(root), depth, look))
        damaged, before = (
            [error for error in damaged if str(error) in problems],
            damaged,
        )
        # One may have been seen at two places, while two checkpoints changed theirs.
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
    raise CheckpointError(
        f"The checkpoints in {root!r} were deleted faster than they could be read. "
        "List them again, or keep more of them (max_to_keep)."
    )


@dataclasses.dataclass
class _Look:
    """One look at a directory that a writer may be changing.

    Attributes:
        known: The records that this look has read, or one before it, by path and
            directory: what is at a path may have been replaced since.
        has_missed: Whether a directory was gone before its record was read.
    """

    known: dict[tuple[Path, Any], CheckpointInfo]
    has_missed: bool = False

    def read(self, path: Path) -> CheckpointInfo | None:
        """Read the record of a directory that was seen, as `read_record` does."""
        key = path, _directory_at(path)
        if key[1] is None or key not in self.known:
            info = read_record(path)
            if info is None:
                self.has_missed |= not _was_seen(path) or is_checkpoint(path)
                return None
            self.known[key] = info
        return self.known[key]


def _doubles(infos: Infos) -> set[Path]:
    """Return where one checkpoint seems to be at several places."""
    times = Counter((info.series, info.time) for info in infos)
    return {info.path for info in infos if times[info.series, info.time] > 1}


def _directory_at(path: Path) -> tuple[int, int] | None:
    """Return what tells a directory from others, and from itself at another place."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns


def _was_seen(path: Path) -> bool:
    """Tell whether what a listing has seen of a path is there, whatever it is."""
    aside = path.parent / f"{REPLACED_PREFIX}{path.name}"
    return os.path.lexists(path) or os.path.lexists(aside)


def _find(
    root: Path, depth: int | None, look: _Look
) -> Iterator[CheckpointInfo | LeftOut]:
    """Yield the checkpoints, and what is left out, in the order of their paths."""
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
        # Under its own name first: there may be more in it than what is set aside.
        for entry in sorted(entries, key=_is_set_aside):
            try:
                for path, left_below in _candidates(directory, entry, below):
                    deeper.setdefault(path, left_below)
            except OSError as error:
                yield unreadable(entry.path, error)
            except CheckpointPathError as error:
                yield error
        left += reversed(deeper.items())


def _is_set_aside(entry: os.DirEntry[str]) -> bool:
    return entry.name.startswith(REPLACED_PREFIX)


def _candidates(
    directory: Path, entry: os.DirEntry[str], depth: int | None
) -> list[tuple[Path, int | None]]:
    """Return where to look for checkpoints, because of an entry of a directory."""
    name = entry.name
    if _is_set_aside(entry):
        name = name.removeprefix(REPLACED_PREFIX)
        # What has that name, if it was not seen, may be there by now; or it is no
        # checkpoint.
        if name and depth in (None, 1):
            return [(directory / name, 0)]
    elif not name.startswith(HIDDEN_PREFIX):
        if depth is not None:
            return [(Path(entry.path), depth - 1)] if entry.is_dir() else []
        if not name.startswith(".") and entry.is_dir(follow_symlinks=False):
            return [(Path(entry.path), None)]
    return []


def _sorted(
    found: Iterable[CheckpointInfo | LeftOut],
) -> tuple[Infos, list[LeftOut]]:
    infos: list[CheckpointInfo] = []
    damaged: list[LeftOut] = []
    for each in found:
        if isinstance(each, CheckpointInfo):
            infos.append(each)
        else:
            damaged.append(each)
    infos.sort(key=lambda info: (info.time, str(info.path)))
    return tuple(infos), damaged
