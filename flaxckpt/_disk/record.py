"""Encode and read the record inside each checkpoint, and read its table of leaves.

A checkpoint is a directory that plain Orbax can load. It also holds two small JSON
files of ours: every listing reads the record, and a restore reads the table of leaves.
"""

import dataclasses
import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flaxckpt._decision.reserved import HIDDEN_PREFIX, LEAVES_FILE, RECORD_FILE
from flaxckpt._disk.fields import MalformedError, signed
from flaxckpt._disk.info import CheckpointInfo
from flaxckpt._disk.open import NoFileError, is_there, read_small
from flaxckpt._disk.record_fields import check_record, parse_record
from flaxckpt._disk.table import parse_table
from flaxckpt.errors import CheckpointCorruptError, CheckpointError, CheckpointPathError

FORMAT = 1
REPLACED_PREFIX = f"{HIDDEN_PREFIX}replaced-"
ORBAX_FILE = "_CHECKPOINT_METADATA"  # in each checkpoint of Orbax
_RECORD_BYTES = 64 * 2**20  # the most that a record may have
# What a record has of it.
_OF_INFO = {
    each.name
    for each in dataclasses.fields(CheckpointInfo)
    if each.compare and each.name != "path"
}


def encode_record(
    info: CheckpointInfo, versions: Mapping[str, str], leaves: bytes
) -> bytes:
    """Return the record as JSON, without the path, so that a checkpoint can be moved.

    Args:
        info: What to record.
        versions: Versions of the packages that write the checkpoint.
        leaves: The table of leaves, whose checksum is recorded.

    Raises:
        CheckpointError: If the record would be too large.
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
        **({} if info.saved_as is None else {"saved_as": info.saved_as}),
        "versions": dict(versions),
        "leaves_sha256": hashlib.sha256(leaves).hexdigest(),
    }
    record = signed(fields)
    if len(record) > _RECORD_BYTES:
        raise CheckpointError(
            f"The record of {str(info.path)!r} would have {len(record)} bytes, and may "
            f"have {_RECORD_BYTES}. Leave long texts out of `logs`."
        )
    return record


def is_same(one: CheckpointInfo, other: CheckpointInfo) -> bool:
    """Tell whether two records are of the same checkpoint, wherever it is."""
    return encode_record(one, {}, b"") == encode_record(other, {}, b"")


def replaced_path(path: Path) -> Path:
    """Return where a checkpoint is hidden while renames put another one at `path`."""
    return path.parent / f"{REPLACED_PREFIX}{path.name}"  # the root has no name


def located(path: Path) -> Path:
    """Return where a checkpoint's files are: at `path`, or hidden beside it.

    If what is at `path` is no checkpoint, such as a directory that a script made, the
    hidden checkpoint counts.
    """
    hidden = replaced_path(path)
    return hidden if not _is_taken(path) and holds_checkpoint(hidden) else path


def is_checkpoint(path: Path) -> bool:
    """Tell whether there is a checkpoint of flaxckpt at `path`, damaged or not.

    Where directories cannot be exchanged, a writer hides the old checkpoint for a
    moment. One look at `path` and one beside it may both miss it, so this looks twice.

    Raises:
        CheckpointPathError: If this process cannot tell.
    """
    hidden = replaced_path(path)
    for _ in range(2):
        if holds_checkpoint(path):
            return True
        if _is_taken(path):  # by one of plain Orbax, or by a new one of ours
            return holds_checkpoint(path)
        if holds_checkpoint(hidden):
            return True
    return False


def is_of(path: Path, series: str) -> bool:
    """Tell whether there is a checkpoint at `path` whose record names this series."""
    try:
        info = read_record(path)
    except (CheckpointCorruptError, CheckpointPathError):
        return False
    return info is not None and info.series == series


def series_in(record: str) -> str | None:
    """Return the series that a record names; None if the record is damaged."""
    try:
        fields, is_whole = parse_record(record.encode())
        return check_record(fields)["series"] if is_whole else None
    except (MalformedError, UnicodeEncodeError):
        return None


def holds_checkpoint(directory: Path) -> bool:
    """Tell whether a checkpoint of flaxckpt is in this very directory."""
    here = os.fspath(directory)  # this is called often, and pathlib is slow
    return any(is_there(f"{here}/{name}") for name in (RECORD_FILE, LEAVES_FILE))


def _is_taken(path: Path) -> bool:
    """Tell whether a checkpoint, also one of plain Orbax, is in this very directory."""
    return holds_checkpoint(path) or is_there(path / ORBAX_FILE)


def read_leaves(path: Path) -> dict[str, Any]:
    """Read the table of leaves of the checkpoint at `path`, which has a record.

    Returns:
        Its fields, as `parse_table` has checked them.

    Raises:
        CheckpointCorruptError: If the table or the record is missing or damaged.
        CheckpointPathError: If this process cannot read them.
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
        The record; None if there is no checkpoint, or one of plain Orbax.

    Raises:
        CheckpointCorruptError: If the checkpoint's record is missing or damaged.
        CheckpointPathError: If this process cannot read it.
    """
    path = Path(path)
    fields = _read_fields_of_one(path)
    if fields is None:
        return None
    return CheckpointInfo(path=path, **{n: fields[n] for n in _OF_INFO & fields.keys()})


def versions_in(path: Path) -> dict[str, str]:
    """Read the versions of the packages that wrote the checkpoint at `path`.

    Raises:
        CheckpointCorruptError: If the checkpoint's record is missing or damaged.
        CheckpointPathError: If this process cannot read it.
    """
    versions = _read_fields(path).get("versions")
    if not isinstance(versions, dict):
        return {}
    return {str(name): str(version) for name, version in versions.items()}


def _read_fields_of_one(path: Path) -> dict[str, Any] | None:
    """Read a record's fields; while a writer replaces the record, the old or new ones.

    None if the checkpoint is gone by now: one that a writer deletes is not damaged.
    """
    for _ in range(2):
        try:
            return _read_fields(path)
        except CheckpointCorruptError:
            if not is_checkpoint(path):
                return None
    return _read_fields(path)


def _read_fields(path: Path) -> dict[str, Any]:
    """Read the record's fields, and check them and their checksum."""
    try:
        fields, is_whole = parse_record(_read_at(path))
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
    except NoFileError as error:
        raise CheckpointCorruptError(
            str(path), f"its record cannot be read ({error})"
        ) from error
    except MalformedError as error:
        raise CheckpointCorruptError(
            str(path), f"its record does not parse ({error})"
        ) from error


def _read_at(path: Path) -> bytes:
    """Read the record of the checkpoint at `path`, or of the one hidden beside it."""
    try:  # first, since there it nearly always is
        return read_small(f"{path}/{RECORD_FILE}", _RECORD_BYTES)
    except NoFileError:
        return read_small(located(path) / RECORD_FILE, _RECORD_BYTES)


def _encoded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Write NaN and infinity as {"float": "nan"}: strict JSON has neither."""
    return {
        key: {"float": repr(value)}
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for key, value in values.items()
    }
