"""Check JSON that anybody may have written: its types, ranges and sizes.

A right checksum shows only that the author computed it. So the parsers check each value
once, and raise `MalformedError` for anything unexpected.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, Never

from flaxckpt._trees.skeleton import INT64, is_possible

INT32 = 2**31
_SHOWN = 60
_END = b"\n}"  # of a record


class MalformedError(ValueError):
    """A file that is not as flaxckpt writes it; the message says where."""


def parse_json(data: bytes) -> Any:
    """Parse strict JSON in UTF-8.

    Raises:
        MalformedError: If `data` is not such JSON, or is nested too deeply.
    """
    try:
        return json.loads(data.decode(), parse_constant=_no_constant)
    except MalformedError:
        raise
    except RecursionError as error:
        raise MalformedError("it is nested too deeply") from error
    except ValueError as error:
        raise MalformedError(str(error)) from error


def signed(fields: Mapping[str, Any]) -> bytes:
    """Return a record as JSON whose last field is the checksum of the others."""
    text = _dumped(fields)
    return text.removesuffix(_END) + _last(_sum(text))


def is_signed(record: bytes, fields: Mapping[str, Any], checksum: str) -> bool:
    """Tell whether a record's fields have this checksum.

    Args:
        record: The record as it was read. If it ends as `signed` wrote it, what is
            before the checksum need not be encoded anew.
        fields: Its fields without the checksum.
        checksum: The checksum that it holds.
    """
    text = record.removesuffix(_last(checksum)) + _END
    return checksum == _sum(text) or checksum == _sum(_dumped(fields))


def _last(checksum: str) -> bytes:
    """Return the end of a record, from the comma before its last field."""
    # It may have a lone surrogate, where somebody else wrote it.
    return f',\n "sha256": "{checksum}"'.encode(errors="surrogatepass") + _END


def _sum(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def _dumped(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, indent=1, allow_nan=False).encode()


def shape_in(fields: Mapping[str, Any], name: str) -> tuple[int, ...]:
    shape = list_in(fields, name)
    for size in shape:
        if type(size) is not int or size < 0:
            fail(f"{name} is {shown(shape)}")
    if not is_possible(shape):
        fail(f"{name} is {shown(shape)}, which is too large")
    return tuple(shape)


def int_in(fields: Mapping[str, Any], name: str, low: int, high: int) -> int:
    value = fields.get(name)
    if type(value) is not int or not low <= value < high:
        fail(f"{name} is {shown(value)}")
    return value


def bool_in(fields: Mapping[str, Any], name: str) -> bool:
    return _typed(bool, fields.get(name), name)


def text_in(fields: Mapping[str, Any], name: str) -> str:
    return _typed(str, fields.get(name), name)


def list_in(fields: Mapping[str, Any], name: str) -> list[Any]:
    return items_in(fields.get(name), name)


def items_in(value: Any, name: str, length: int | None = None) -> list[Any]:
    if type(value) is not list or (length is not None and len(value) != length):
        fail(f"{name} is {shown(value)}")
    return value


def mapping_in(value: Any, name: str) -> dict[str, Any]:
    return _typed(dict, value, name)


def _typed(kind: type, value: Any, name: str) -> Any:
    if type(value) is not kind:
        fail(f"{name} is {shown(value)}")
    return value


def match_in(pattern: re.Pattern[str], value: Any, name: str) -> None:
    if type(value) is not str or not pattern.fullmatch(value):
        fail(f"{name} is {shown(value)}")


def _no_constant(name: str) -> Never:
    raise MalformedError(f"it has {name}, which is no JSON")


def fail(problem: str) -> Never:
    raise MalformedError(problem)


def shown(value: Any) -> str:
    """Show a value in one short line, however large it is."""
    match value:
        case None:
            return "missing or null"
        case str():
            shown = repr(value[:_SHOWN])
        case dict() | list() if len(value) > 8:
            return f"a {type(value).__name__} of {len(value)}"
        case int() if abs(value) >= INT64:
            return "a number of more than 64 bits"
        case _:
            try:
                shown = repr(value)
            except (RecursionError, ValueError):
                return f"a {type(value).__name__}"
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
