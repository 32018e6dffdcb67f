"""The record inside each checkpoint, and the listing of a directory by its records.

A checkpoint is a directory that plain Orbax can load, with two small JSON files of ours
in it: the record, read by every listing, and the table of leaves, read by a restore.
"""

import dataclasses
import datetime
import errno
import hashlib
import math
import os
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from flaxckpt._open import NoFileError, is_there, read_small, unreadable
from flaxckpt._parsing import (
    MalformedError,
    check_record,
    checksum,
    dumped,
    parse_record,
    parse_table,
)
from flaxckpt._patience import looks, pause
from flaxckpt.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointPathError,
)

FORMAT = 3  # in 1 and 2, the digests were others (see _digest.py)
RECORD_FILE = "flaxckpt.json"
LEAVES_FILE = "flaxckpt_leaves.json"
# What is ours beside the checkpoints; no listing looks into it, but for what was set
# aside where two directories cannot be exchanged, and not replaced (see _commit.py).
HIDDEN_PREFIX = ".flaxckpt-"
REPLACED_PREFIX = ".flaxckpt-replaced-"
_RECORD_BYTES = 64 * 2**20  # that a record may have


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What is known of a checkpoint without loading it.

    Attributes:
        path: Its directory, absolute.
        epoch: Zero-based epoch at which it was saved.
        batch: Zero-based batch within the epoch; None at the end of an epoch.
        step: One-based count that retention policies go by: batches seen in the run
            where `save_freq` is a number, epochs otherwise.
        logs: The scalar metrics at that time, as Python numbers.
        time: When it was saved, UTC. Never earlier than that of the one before it.
        weights_only: Whether it holds the weights alone.
        series: The part of the filepath template behind its fixed directory:
            checkpoints of one series are retained and deleted together.
        state: The decision state at that time, as plain values; None if none was given.
    """

    path: Path
    epoch: int
    batch: int | None
    step: int
    logs: Mapping[str, Any]
    time: datetime.datetime
    weights_only: bool
    series: str
    state: Mapping[str, Any] | None = dataclasses.field(default=None, repr=False)

    def __fspath__(self) -> str:
        """Return the path, so that a record can be passed for one."""
        return str(self.path)

    @property
    def metrics(self) -> Mapping[str, Any]:
        """The logs, under the name by which Orbax's preservation policies ask."""
        return self.logs


Infos: TypeAlias = tuple[CheckpointInfo, ...]
# What a listing leaves out: what is damaged, and what this process cannot read.
LeftOut: TypeAlias = CheckpointCorruptError | CheckpointPathError


def encode_record(
    info: CheckpointInfo, versions: Mapping[str, str], leaves: bytes
) -> bytes:
    """Return the record as JSON; all but the path, so that it can be moved.

    Args:
        info: What it records.
        versions: Versions of the packages that write it.
        leaves: The table of leaves that lies beside it.

    Raises:
        CheckpointError: If it would be larger than a record may be.
    """
    fields = {
        "format": FORMAT,
        "epoch": info.epoch,
        "batch": info.batch,
        "step": info.step,
        "logs": _encoded(info.logs),
        "time": info.time.isoformat(),
        "weights_only": info.weights_only,
        "series": info.series,
        "state": None if info.state is None else _encoded(info.state),
        "versions": dict(versions),
        "leaves_sha256": hashlib.sha256(leaves).hexdigest(),
    }
    record = dumped({**fields, "sha256": checksum(fields)})
    if len(record) > _RECORD_BYTES:
        raise CheckpointError(
            f"The record of {str(info.path)!r} would have {len(record)} bytes, and may "
            f"have {_RECORD_BYTES}. Leave long texts out of `logs`."
        )
    return record


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A tree that was loaded, and what is known of the checkpoint that it is from.

    Attributes:
        tree: The tree.
        info: The record of that very checkpoint; None for one of plain Orbax's.
    """

    tree: Any
    info: CheckpointInfo | None


def is_same(one: CheckpointInfo, other: CheckpointInfo) -> bool:
    """Tell whether two records are of one checkpoint, wherever it is now."""
    return encode_record(one, {}, b"") == encode_record(other, {}, b"")


def located(path: Path) -> Path:
    """Return where a checkpoint's files are: at `path`, or set aside beside it."""
    aside = path.with_name(REPLACED_PREFIX + path.name)
    return aside if not is_there(path) and is_there(aside) else path


def is_checkpoint(path: Path) -> bool:
    """Tell whether there is a checkpoint of flaxckpt's at `path`, damaged or not.

    Where directories cannot be exchanged, a writer sets the old checkpoint aside for a
    moment: one look at `path` and one aside may both miss it, so there are two of each.

    Raises:
        CheckpointPathError: If this process cannot know.
    """
    aside = path.with_name(REPLACED_PREFIX + path.name)
    for _ in range(2):
        if _holds_checkpoint(path):
            return True
        if is_there(path):  # something else, unless it has come in between
            return _holds_checkpoint(path)
        if _holds_checkpoint(aside):
            return True
    return False


def _holds_checkpoint(directory: Path) -> bool:
    return is_there(directory / RECORD_FILE) or is_there(directory / LEAVES_FILE)


def read_leaves(path: Path) -> dict[str, Any]:
    """Read the table of leaves of the checkpoint at `path`, which has a record.

    Returns:
        Its fields, as `parse_table` has checked them.

    Raises:
        CheckpointCorruptError: If it cannot be read, or is not what was written.
        CheckpointPathError: If this process cannot read it.
    """
    recorded = _read_fields(path)["leaves_sha256"]
    try:
        table = read_small(located(path) / LEAVES_FILE)
    except NoFileError as error:
        raise CheckpointCorruptError(
            str(path), f"{LEAVES_FILE} cannot be read ({error})"
        ) from error
    if hashlib.sha256(table).hexdigest() != recorded:
        raise CheckpointCorruptError(
            str(path), f"{LEAVES_FILE} is not what was written"
        )
    try:
        return parse_table(table, FORMAT)
    except MalformedError as error:
        raise CheckpointCorruptError(
            str(path), f"its table of leaves does not parse ({error})"
        ) from error


def read_record(path: str | os.PathLike[str]) -> CheckpointInfo | None:
    """Read the record of the checkpoint at `path`.

    Returns:
        The record, or None where there is none: no checkpoint, or plain Orbax's.

    Raises:
        CheckpointCorruptError: If there is one and it cannot be read.
        CheckpointPathError: If this process cannot read it.
    """
    path = Path(path)
    fields = _read_fields_of_one(path)
    if fields is None:
        return None
    return CheckpointInfo(
        path=path,
        epoch=fields["epoch"],
        batch=fields["batch"],
        step=fields["step"],
        logs=fields["logs"],
        time=fields["time"],
        weights_only=fields["weights_only"],
        series=fields["series"],
        state=fields["state"],
    )


def _read_fields_of_one(path: Path) -> dict[str, Any] | None:
    """Read the fields of the record of one checkpoint, the old or the new one.

    None where there is none by now: one that a writer deletes is not damaged.
    """
    for _ in range(2):
        if not is_checkpoint(path):
            return None
        try:
            return _read_fields(path)
        except CheckpointCorruptError:
            continue
    return _read_fields(path) if is_checkpoint(path) else None


def _read_fields(path: Path) -> dict[str, Any]:
    """Read the record's fields, and check that they are those that were written."""
    try:
        record = read_small(located(path) / RECORD_FILE, _RECORD_BYTES)
    except NoFileError as error:
        raise CheckpointCorruptError(
            str(path), f"its record cannot be read ({error})"
        ) from error
    try:
        fields, is_whole = parse_record(record)
        if fields["format"] > FORMAT:
            raise CheckpointCorruptError(
                str(path),
                f"its format is {fields['format']}, and this flaxckpt reads up to "
                f"{FORMAT} (a newer flaxckpt wrote it: upgrade)",
            )
        if not is_whole:
            raise CheckpointCorruptError(
                str(path), "its record is not what was written"
            )
        return check_record(fields)
    except MalformedError as error:
        raise CheckpointCorruptError(
            str(path), f"its record does not parse ({error})"
        ) from error


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
    problems, was_empty = set[str](), False
    infos: Infos = ()
    damaged: list[LeftOut] = []
    for _ in looks():
        look = _Look(known)
        infos, damaged = _sorted(_find(Path(root), depth, look))
        damaged, before = (
            [error for error in damaged if str(error) in problems],
            damaged,
        )
        is_settled = len(damaged) == len(before) and not look.has_missed
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


def _directory_at(path: Path) -> tuple[int, int] | None:
    """Return what tells a directory from others, and from itself at another place."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns


def _was_seen(path: Path) -> bool:
    """Tell whether what a listing has seen of a path is there, whatever it is."""
    aside = path.with_name(REPLACED_PREFIX + path.name)
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
                continue
            if below == 0:
                continue
        try:
            with os.scandir(directory) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                yield unreadable(directory, error)
            continue
        deeper: list[tuple[Path, int | None]] = []
        names = {entry.name for entry in entries}
        for entry in entries:
            try:
                deeper += _candidates(directory, entry, below, names)
            except OSError as error:
                yield unreadable(entry.path, error)
            except CheckpointPathError as error:
                yield error
        left += reversed(deeper)


def _candidates(
    directory: Path, entry: os.DirEntry[str], depth: int | None, names: Container[str]
) -> list[tuple[Path, int | None]]:
    """Return where to look for checkpoints, because of an entry of a directory."""
    name = entry.name
    if name.startswith(REPLACED_PREFIX):
        name = name.removeprefix(REPLACED_PREFIX)
        # What has that name, if it was not seen, may be there by now.
        if name and depth in (None, 1) and name not in names:
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


def _encoded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Strict JSON has no NaN and no infinity: write them as {"float": "nan"}."""
    return {
        key: {"float": repr(value)}
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for key, value in values.items()
    }
