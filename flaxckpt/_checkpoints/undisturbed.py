"""Reads that begin again if a writer replaces or deletes the checkpoint meanwhile."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from flaxckpt._disk.files import stamp_of
from flaxckpt._disk.info import CheckpointInfo
from flaxckpt._disk.open import NoFileError, read_small
from flaxckpt._disk.record import (
    RECORD_FILE,
    is_checkpoint,
    is_same,
    located,
    read_record,
)
from flaxckpt._files.formats import by_suffix, file_at
from flaxckpt._object_store.source import Place, fetched
from flaxckpt._object_store.url import check_is_path, is_url
from flaxckpt._orbax.recognize import entries, foreign_checkpoints, is_ours, is_readable
from flaxckpt._runtime.forks import use_threads
from flaxckpt._runtime.patience import TRIES, pause, tries
from flaxckpt._runtime.unchecked import runs_unchecked
from flaxckpt.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointPathError,
)

T = TypeVar("T")
_DEPTH = 3  # levels below a path without a checkpoint at which an error looks for some
_DIRECTORIES = 100  # that it looks into at each level


@runs_unchecked
def undisturbed(path: str | os.PathLike[str], read: Callable[[Place], T]) -> T:
    """Read a checkpoint; read again if a writer replaces or deletes it meanwhile.

    For example, one program evaluates the checkpoints that another program writes. A
    `CheckpointInfo` is read only while the checkpoint that it describes is there.

    Raises:
        CheckpointError: If the checkpoint was replaced during each read.
    """
    use_threads()
    check_is_path("path", path, "pass the path of a checkpoint first.")
    if isinstance(path, CheckpointInfo):
        read = functools.partial(_read_listed, path, read)
    if is_url(path):
        try:
            return _from_store(os.fspath(path), read)
        except CheckpointNotFoundError as error:
            if error.replaced or not by_suffix(os.fspath(path)):
                raise
            problem = "is no checkpoint. If it is a file, copy it to a disk, and load "
            problem += "it from there: flaxckpt reads only checkpoints from a store."
            raise CheckpointPathError(os.fspath(path), problem) from error
    for _ in tries():
        found = _found(path)
        before = _stamp(found)
        try:
            result = _shallow(Place(found), read)
        except (CheckpointError, OSError):
            if _stamp(found) == before and _stays(found):
                raise
            continue
        if _stamp(found) == before:
            return result
    raise _replaced_too_often(path)


def _shallow(place: Place, read: Callable[[Place], T]) -> T:
    """Read a checkpoint; a tree that is nested too deeply for Python is an error."""
    try:
        return read(place)
    except RecursionError as error:
        raise CheckpointCorruptError(
            str(place.path), "its tree is nested more deeply than can be read"
        ) from error


def _read_listed(info: CheckpointInfo, read: Callable[[Place], T], place: Place) -> T:
    """Read a checkpoint if its record is still `info`.

    Raises:
        CheckpointNotFoundError: If another checkpoint, or none, is at `path`.
    """
    check_same(info, read_record(place.path), str(place.path))
    return read(place)


def check_same(info: CheckpointInfo, there: CheckpointInfo | None, path: str) -> None:
    """Check that the checkpoint at a path is the one that was listed.

    Args:
        info: The one that was listed.
        there: The one that is there; None if it is one of plain Orbax.
        path: The path.

    Raises:
        CheckpointNotFoundError: If it is another one.
    """
    if there is None or not is_same(info, there):
        now = "written by plain Orbax" if there is None else f"saved at {there.time}"
        problem = f"the listed checkpoint was saved at {info.time}, and the checkpoint "
        problem += f"there now was {now}"
        raise CheckpointNotFoundError(path, (), problem)


def _replaced_too_often(path: str | os.PathLike[str]) -> CheckpointError:
    return CheckpointError(
        f"Checkpoint {str(path)!r} was replaced {TRIES} times or more while it was "
        "read. Read it when it is not being written, or save less often."
    )


def _stays(path: Path) -> bool:
    """Tell whether a checkpoint keeps its files for a moment: nobody deletes it."""
    before = _files_of(path)
    pause()
    return located(path).exists() and _files_of(path) == before


def _files_of(path: Path) -> list[str]:
    found = os.walk(located(path))
    return [f"{directory}/{name}" for directory, _, names in found for name in names]


def _from_store(url: str, read: Callable[[Place], T]) -> T:
    """Read a checkpoint in an object store, as `undisturbed` does."""
    for _ in tries():
        with fetched(url) as source:
            try:
                source.begin()
                return _shallow(Place(_found(source.directory), source), read)
            except CheckpointError as error:
                if source.is_replaced():
                    continue
                if error.args[:1] != (str(source.directory),):
                    raise
                raise type(error)(url, *error.args[1:]) from error.__cause__
    raise _replaced_too_often(url)


def _stamp(path: Path) -> tuple[Any, ...]:
    """Return a value that changes if another checkpoint takes the path, or this moves.

    Empty if there is no record that can be read.
    """
    there = located(path)
    try:
        content, status = read_small(there / RECORD_FILE), there.stat()
    except (NoFileError, CheckpointPathError, OSError):
        return _stamp_of_file(path)
    return content, there, status.st_ino, status.st_ctime_ns


def _stamp_of_file(path: Path) -> tuple[Any, ...]:
    try:
        return stamp_of(path) if path.is_file() else ()
    except OSError:
        return ()


def _found(path: str | os.PathLike[str]) -> Path:
    found = Path(os.path.abspath(os.path.expanduser(path)))
    if is_checkpoint(found) or is_readable(found):
        return found
    file = file_at(found)
    if file is not None:
        return file
    raise not_found(found)


def not_found(path: Path) -> CheckpointNotFoundError:
    """Make the error for a path without a checkpoint; it names some that are near."""
    is_there = os.path.isdir(path)  # False, too, for a name that is too long
    names = _names_below(*((path, _DEPTH) if is_there else (path.parent, 1)))
    return CheckpointNotFoundError(str(path), names)


def _is_file(path: Path) -> bool:
    return bool(by_suffix(path.name)) and path.is_file()


def _names_below(directory: Path, depth: int) -> tuple[str, ...]:
    """Name the checkpoints below a directory, at the first level that has some."""
    level = [directory]
    for _ in range(depth):
        names = [
            str((each / name).relative_to(directory))
            for each in level
            for name in (
                *(one.name for one in entries(each) if is_ours(one)),
                *foreign_checkpoints(each),
                *(one.name for one in entries(each) if _is_file(one)),
            )
        ]
        if names:
            return tuple(names)
        below = (one for each in level for one in entries(each))
        level = [one for one in below if os.path.isdir(one) and not os.path.islink(one)]
        level = level[:_DIRECTORIES]
    return ()
