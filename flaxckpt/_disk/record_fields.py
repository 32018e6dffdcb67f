"""Parse and check the fields of a record; see `fields`."""

import datetime
import math
from collections.abc import Mapping
from typing import Any

from flaxckpt._disk.fields import (
    INT32,
    MalformedError,
    bool_in,
    fail,
    int_in,
    is_signed,
    mapping_in,
    parse_json,
    shown,
    text_in,
)
from flaxckpt._trees.skeleton import INT64

_YEAR = datetime.datetime(9000, 1, 1, tzinfo=datetime.UTC)
LAST_TIME = _YEAR - datetime.datetime.resolution  # leaves room for later times
_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def parse_record(data: bytes) -> tuple[dict[str, Any], bool]:
    """Parse a record and compare its checksum.

    Returns:
        Its fields without the checksum, and whether the checksum is right. `format` is
        checked; `check_record` checks the others.

    Raises:
        MalformedError: If it is no record.
    """
    fields = mapping_in(parse_json(data), "the record")
    int_in(fields, "format", 1, INT32)
    recorded = text_in(fields, "sha256")
    del fields["sha256"]
    try:
        return fields, is_signed(data, fields, recorded)
    except (RecursionError, ValueError) as error:
        raise MalformedError(str(error)) from error


def check_record(fields: dict[str, Any]) -> dict[str, Any]:
    """Check a record's fields, and return them with NaN, infinity and time parsed.

    Raises:
        MalformedError: If a field is missing, or not of its type and range.
    """
    if fields.get("batch", 0) is not None:
        int_in(fields, "batch", 0, INT64)
    if fields.get("epoch", 0) is not None or fields["batch"] is not None:
        int_in(fields, "epoch", 0, INT64)  # there is none where a step was given
    int_in(fields, "step", 0, INT64)
    bool_in(fields, "weights_only")
    text_in(fields, "series")
    text_in(fields, "leaves_sha256")
    if "saved_as" in fields:
        text_in(fields, "saved_as")
    state = fields.get("state", 0)
    return {
        **fields,
        "logs": _scalars(fields, "logs"),
        "time": _time(text_in(fields, "time")),
        "state": None if state is None else _state(fields),
    }


def _scalars(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Check names and their scalars; parse {"float": "nan"} as `_encoded` wrote it."""
    found: dict[str, Any] = {}
    for key, value in mapping_in(fields.get(name), name).items():
        if type(value) is dict:
            text = value.get("float") if len(value) == 1 else None
            if type(text) is not str or text not in _SPECIAL:
                fail(f"{name}[{shown(key)}] is {shown(value)}")
            value = _SPECIAL[text]
        elif value is not None and type(value) not in (bool, int, float, str):
            fail(f"{name}[{shown(key)}] is {shown(value)}")
        elif type(value) is float and not math.isfinite(value):
            fail(f"{name}[{shown(key)}] is too large")
        found[key] = value
    return found


def _state(fields: Mapping[str, Any]) -> dict[str, Any]:
    state = _scalars(fields, "state")
    state.setdefault("stale", 0)  # the first records had neither of the two
    state.setdefault("met", None)
    for name in ("seen", "batches", "last_epoch", "last_batch"):
        int_in(state, name, -INT32, INT32)
    for name in ("monitor", "mode"):
        text_in(state, name)
    bool_in(state, "save_best_only")
    int_in(state, "stale", 0, INT32)
    for name in ("best", "met"):
        if state.get(name, "") is not None and type(state.get(name)) is not float:
            fail(f"{name} is {shown(state.get(name))}")
    return state


def _time(text: str) -> datetime.datetime:
    try:
        time = datetime.datetime.fromisoformat(text)
        if time.tzinfo is not None and time.astimezone(datetime.UTC) <= LAST_TIME:
            return time
    except (ValueError, OverflowError):
        pass
    fail(f"time is {shown(text)}")
