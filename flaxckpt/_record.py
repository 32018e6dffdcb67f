"""The record inside each checkpoint, and the listing of a directory by its records.

A checkpoint is a directory that plain Orbax can load, with two small JSON files of ours
in it: the record, read by every listing, and the table of leaves, read by a restore.
"""

import dataclasses
import datetime
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from flaxckpt.errors import CheckpointCorruptError

FORMAT = 3  # in 1 and 2, the digests were others (see _digest.py)
RECORD_FILE = "flaxckpt.json"
LEAVES_FILE = "flaxckpt_leaves.json"
# What is ours beside the checkpoints; no listing looks into it, but for what was set
# aside where two directories cannot be exchanged, and not replaced (see _commit.py).
HIDDEN_PREFIX = ".flaxckpt-"
REPLACED_PREFIX = ".flaxckpt-replaced-"


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


def encode_record(
    info: CheckpointInfo, versions: Mapping[str, str], leaves: bytes
) -> bytes:
    """Return the record as JSON; all but the path, so that it can be moved.

    Args:
        info: What it records.
        versions: Versions of the packages that write it.
        leaves: The table of leaves that lies beside it.
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
    return _dumped({**fields, "sha256": _checksum(fields)})


def located(path: Path) -> Path:
    """Return where a checkpoint's files are: at `path`, or set aside beside it."""
    aside = path.with_name(REPLACED_PREFIX + path.name)
    return aside if not path.exists() and aside.exists() else path


def is_checkpoint(path: Path) -> bool:
    """Tell whether there is a checkpoint of flaxckpt's at `path`, damaged or not."""
    there = located(path)
    return (there / RECORD_FILE).exists() or (there / LEAVES_FILE).exists()


def read_leaves(path: Path) -> dict[str, Any]:
    """Read the table of leaves of the checkpoint at `path`, which has a record.

    Raises:
        CheckpointCorruptError: If it cannot be read, or is not what was written.
    """
    fields = _read_fields(path)
    try:
        table = (located(path) / LEAVES_FILE).read_bytes()
        if hashlib.sha256(table).hexdigest() != fields["leaves_sha256"]:
            raise CheckpointCorruptError(
                str(path), f"{LEAVES_FILE} is not what was written"
            )
        return json.loads(table)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, CheckpointCorruptError):
            raise
        raise CheckpointCorruptError(
            str(path), f"{LEAVES_FILE} cannot be read ({error})"
        ) from error


def read_record(path: str | os.PathLike[str]) -> CheckpointInfo | None:
    """Read the record of the checkpoint at `path`.

    Returns:
        The record, or None where there is none: no checkpoint, or plain Orbax's.

    Raises:
        CheckpointCorruptError: If there is one and it cannot be read.
    """
    path = Path(path)
    if not is_checkpoint(path):
        return None
    fields = _read_fields(path)
    try:
        return CheckpointInfo(
            path=path,
            epoch=fields["epoch"],
            batch=fields["batch"],
            step=fields["step"],
            logs=_decoded(fields["logs"]),
            time=datetime.datetime.fromisoformat(fields["time"]),
            weights_only=fields["weights_only"],
            series=fields["series"],
            state=None if fields["state"] is None else _decoded(fields["state"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unparsed(path, error) from error


def _read_fields(path: Path) -> dict[str, Any]:
    """Read the record's fields, and check that they are those that were written."""
    try:
        fields = json.loads((located(path) / RECORD_FILE).read_bytes())
        version, checksum = fields["format"], fields.pop("sha256")
        found = _checksum(fields)
    except OSError as error:
        raise CheckpointCorruptError(
            str(path), f"its record cannot be read ({error})"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unparsed(path, error) from error
    if type(version) is int and version > FORMAT:
        raise CheckpointCorruptError(
            str(path),
            f"its format is {version}, and this flaxckpt reads up to {FORMAT} "
            "(a newer flaxckpt wrote it: upgrade)",
        )
    if checksum != found:
        raise CheckpointCorruptError(str(path), "its record is not what was written")
    return fields


def _unparsed(path: Path, error: Exception) -> CheckpointCorruptError:
    return CheckpointCorruptError(
        str(path), f"its record does not parse ({type(error).__name__}: {error})"
    )


def _checksum(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(_dumped(fields)).hexdigest()


def _dumped(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, indent=1, allow_nan=False).encode()


def list_below(
    root: str, depth: int | None
) -> tuple[Infos, list[CheckpointCorruptError]]:
    """List the checkpoints exactly `depth` directories below `root`; None for any.

    Returns:
        Those whose records are whole, oldest first, and what is wrong with the others.
    """
    return _sorted(_find(Path(root), depth))


def plain_scalars(logs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what of `logs` a record can keep: numbers, booleans and text.

    Waits for values that a device is still computing.
    """
    kept: dict[str, Any] = {}
    for key, value in (logs or {}).items():
        if getattr(value, "shape", None) == ():
            value = value.item()
            if isinstance(value, complex):
                continue
            value = value if isinstance(value, int | float | bool) else float(value)
        if isinstance(value, bool | int | float | str):
            kept[str(key)] = value
    return kept


def _find(
    directory: Path, depth: int | None
) -> Iterator[CheckpointInfo | CheckpointCorruptError]:
    if depth is None or depth == 0:
        try:
            info = read_record(directory)
        except CheckpointCorruptError as error:
            yield error
            return
        if info is not None:
            yield info
            return
        if depth == 0:
            return
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        name = entry.name
        if name.startswith(REPLACED_PREFIX):
            path = directory / name.removeprefix(REPLACED_PREFIX)
            if depth in (None, 1) and not path.exists():
                yield from _find(path, 0)
        elif entry.is_dir() and not name.startswith(HIDDEN_PREFIX):
            if depth is not None:
                yield from _find(Path(entry.path), depth - 1)
            elif not entry.is_symlink() and not name.startswith("."):
                yield from _find(Path(entry.path), None)


def _sorted(
    found: Iterator[CheckpointInfo | CheckpointCorruptError],
) -> tuple[Infos, list[CheckpointCorruptError]]:
    infos: list[CheckpointInfo] = []
    damaged: list[CheckpointCorruptError] = []
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


def _decoded(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: float(value["float"]) if isinstance(value, dict) else value
        for key, value in values.items()
    }
