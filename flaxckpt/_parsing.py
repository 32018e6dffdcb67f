"""The small files of a checkpoint: from bytes to values of known types and ranges.

Anybody may have written a checkpoint, and a checksum that is right only says that its
author computed it. So each value is checked here, once, and the rooms that use it need
not. What is not as flaxckpt writes it is a `MalformedError`, whatever it is. Optional
fields that are not known here are let through.
"""

import datetime
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Never, TypeAlias

Skeleton: TypeAlias = Any

_INT32 = 2**31
_INT64 = 2**63
_RANK = 64  # numpy's limit
_ITEM_BYTES = 16  # of the largest elements
_CHUNKS = 2**24  # of one array
_LAST_YEAR = 9000  # so that a later time can be told
_SHOWN = 60
_HOST = 256
_ARRAYS = ("jax", "numpy", "numpy_scalar", "key", "bytes")
FROM_LIKE = ("static", "function")  # kinds of leaves that are not stored
_OTHERS = ("bool", "int", "float", "complex", "str", *FROM_LIKE)
_DTYPE = re.compile(r"[a-z][a-z0-9_]{0,31}(<[A-Za-z0-9_]{1,31}>)?")
_DIGEST = re.compile(r"([23]:)?[0-9a-f]{16}")
_SUM = re.compile(r"[0-9a-f]{16}")
_STORED = re.compile(r"(?!\.+$)[^/\\\x00-\x1f\x7f-\x9f\ud800-\udfff]+")
_NAME_BYTES = 255
_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MalformedError(ValueError):
    """A file that is not as flaxckpt writes it; the message says where."""


@dataclass(frozen=True)
class Zarr:
    """What a `zarr.json` says of an array.

    Attributes:
        shape: The array's shape.
        chunk: The shape of its chunks, which is positive and no larger.
        dtype: Name of its dtype.
        separator: Between the numbers in the name of a chunk.
        codecs: How a chunk is encoded, as JSON.
    """

    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: str
    separator: str
    codecs: list[dict[str, Any]]


def parse_json(data: bytes) -> Any:
    """Parse strict JSON in UTF-8.

    Raises:
        MalformedError: If it is none, or nested too deeply.
    """
    try:
        return json.loads(data.decode(), parse_constant=_no_constant)
    except MalformedError:
        raise
    except RecursionError as error:
        raise MalformedError("it is nested too deeply") from error
    except ValueError as error:
        raise MalformedError(str(error)) from error


def checksum(fields: Mapping[str, Any]) -> str:
    """Return the checksum of a record's fields."""
    return hashlib.sha256(dumped(fields)).hexdigest()


def dumped(fields: Mapping[str, Any]) -> bytes:
    """Return a record's fields as bytes."""
    return json.dumps(fields, indent=1, allow_nan=False).encode()


def parse_record(data: bytes) -> tuple[dict[str, Any], bool]:
    """Parse a record as far as its checksum.

    Returns:
        Its fields, less the checksum, and whether they are those that were written.
        `format` is a number; the others are for `check_record`.

    Raises:
        MalformedError: If it is no record.
    """
    fields = _mapping(parse_json(data), "the record")
    _int(fields, "format", 1, _INT32)
    recorded = _text(fields, "sha256")
    del fields["sha256"]
    try:
        return fields, checksum(fields) == recorded
    except (RecursionError, ValueError) as error:
        raise MalformedError(str(error)) from error


def check_record(fields: dict[str, Any]) -> dict[str, Any]:
    """Check a record's fields, and return them with numbers and times for texts."""
    _int(fields, "epoch", 0, _INT64)
    if fields.get("batch", 0) is not None:
        _int(fields, "batch", 0, _INT64)
    _int(fields, "step", 0, _INT64)
    _bool(fields, "weights_only")
    _text(fields, "series")
    _text(fields, "leaves_sha256")
    state = fields.get("state", 0)
    return {
        **fields,
        "logs": _scalars(fields, "logs"),
        "time": _time(_text(fields, "time")),
        "state": None if state is None else _state(fields),
    }


def parse_table(data: bytes, newest: int) -> dict[str, Any]:
    """Parse a table of leaves.

    Args:
        data: The file.
        newest: The newest format that can be read.

    Returns:
        Its fields: `tree`, a skeleton in which each leaf has its place; `leaves`, each
        with a path, a kind, and what goes with the kind; `weights`, a skeleton, "all"
        or None; and where the format has them, lists of `digests` and `sums`.

    Raises:
        MalformedError: If it is none.
    """
    try:
        return _table(parse_json(data), newest)
    except RecursionError as error:
        raise MalformedError("its tree is nested too deeply") from error


def parse_zarr(data: bytes) -> Zarr:
    """Parse a `zarr.json`.

    Raises:
        MalformedError: If it is none, or describes an array that cannot be.
    """
    fields = _mapping(parse_json(data), "zarr.json")
    if fields.get("zarr_format") != 3 or fields.get("node_type") != "array":
        _fail("it is no array of Zarr 3")
    shape = _shape(fields, "shape")
    grid = _mapping(fields.get("chunk_grid"), "chunk_grid")
    if grid.get("name") != "regular":
        _fail("its chunk_grid is not regular")
    setting = _mapping(grid.get("configuration"), "chunk_grid")
    chunk = _chunk_of(shape, setting)
    keys = _mapping(fields.get("chunk_key_encoding"), "chunk_key_encoding")
    if keys.get("name") != "default":
        _fail("its chunk_key_encoding is not the default")
    setting = _mapping(keys.get("configuration", {}), "chunk_key_encoding")
    separator = setting.get("separator", "/")
    if separator not in ("/", "."):
        _fail(f"its separator is {_shown(separator)}")
    codecs = _codecs(fields, chunk)
    return Zarr(shape, chunk, _text(fields, "data_type"), separator, codecs)


def parse_texts(data: bytes) -> dict[str, str]:
    """Parse the file of all leaves that are text, by their names."""
    texts = _mapping(parse_json(data), "the texts")
    for value in texts.values():
        if type(value) is not str:
            _fail(f"a text is {_shown(value)}")
    return texts


def parse_owner(data: bytes) -> tuple[str, int]:
    """Parse what a lock says of its owner.

    Returns:
        The owner's machine and the number of its process there; ("", 0) where it does
        not say.
    """
    try:
        fields = _mapping(parse_json(data), "the lock")
        host, pid = _text(fields, "host"), _int(fields, "pid", 1, _INT32)
    except MalformedError:
        return "", 0
    return (host, pid) if host.isprintable() and len(host) < _HOST else ("", 0)


def is_possible(shape: Sequence[int]) -> bool:
    """Tell whether an array can be of a shape, were its empty axes of one element."""
    size = math.prod(max(size, 1) for size in shape)
    return len(shape) <= _RANK and size <= _INT64 // _ITEM_BYTES


# ---- the record ----------------------------------------------------------------------


def _scalars(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Check names and their scalars; NaN and infinity are written as mappings."""
    found: dict[str, Any] = {}
    for key, value in _mapping(fields.get(name), name).items():
        if type(value) is dict:
            text = value.get("float") if len(value) == 1 else None
            if type(text) is not str or text not in _SPECIAL:
                _fail(f"{name}[{_shown(key)}] is {_shown(value)}")
            value = _SPECIAL[text]
        elif value is not None and type(value) not in (bool, int, float, str):
            _fail(f"{name}[{_shown(key)}] is {_shown(value)}")
        elif type(value) is float and not math.isfinite(value):
            _fail(f"{name}[{_shown(key)}] is too large")
        found[key] = value
    return found


def _state(fields: Mapping[str, Any]) -> dict[str, Any]:
    state = _scalars(fields, "state")
    for name in ("seen", "batches", "last_epoch", "last_batch"):
        _int(state, name, -_INT32, _INT32)
    for name in ("monitor", "mode"):
        _text(state, name)
    _bool(state, "save_best_only")
    if state.get("best", "") is not None and type(state.get("best")) is not float:
        _fail(f"best is {_shown(state.get('best'))}")
    return state


def _time(text: str) -> datetime.datetime:
    try:
        time = datetime.datetime.fromisoformat(text)
        if time.tzinfo is not None and time.astimezone(datetime.UTC).year < _LAST_YEAR:
            return time
    except (ValueError, OverflowError):
        pass
    _fail(f"time is {_shown(text)}")


# ---- the table of leaves -------------------------------------------------------------


def _table(fields: Any, newest: int) -> dict[str, Any]:
    _mapping(fields, "the table of leaves")
    version = _int(fields, "format", 1, newest + 1)
    leaves = _list(fields, "leaves")
    for leaf in leaves:
        _check_leaf(leaf, has_digest=version == 1)
    paths = [leaf["path"] for leaf in leaves]
    seen = [False] * len(leaves)

    def place(index: int, path: list[str]) -> None:
        if not seen[index] and paths[index] != path:
            _fail(f"leaf {_shown(paths[index])} is at {_shown(path)}")
        seen[index] = True

    _Skeleton(len(leaves), place).visit(fields.get("tree"), [], ())
    if not all(seen):
        _fail(f"leaf {_shown(paths[seen.index(False)])} has no place in the tree")
    weights = fields.get("weights", "")
    if weights not in ("all", None):
        _Skeleton(len(leaves), lambda index, path: None).visit(weights, [], ())
    if version > 1:
        for digest in _list(fields, "digests"):
            _match(_DIGEST, digest, "a digest")
    if "sums" in fields:
        for sums in _list(fields, "sums"):
            for each in _items(sums, "sums"):
                _match(_SUM, each, "a checksum")
    return fields


class _Skeleton:
    """A walk through a skeleton, see `_tree.Skeleton`, that checks it."""

    def __init__(self, count: int, place: Callable[[int, list[str]], None]) -> None:
        """Begin at the root.

        Args:
            count: How many leaves there are.
            place: Is told of each leaf's index where it is.
        """
        self._count, self._place = count, place
        self._shared: set[tuple[int, ...]] = set()

    def visit(self, node: Any, path: list[str], spot: tuple[int, ...]) -> None:
        """Check a node.

        Args:
            node: The node.
            path: The names from the root to it.
            spot: The positions from the root to it, as `same` gives them.
        """
        if node is None:
            return
        if type(node) is int:
            if not 0 <= node < self._count:
                _fail(f"leaf {_shown(node)} of {self._count} is at {_shown(path)}")
            self._place(node, path)
            return
        if type(node) is not dict or len(node) != 1:
            _fail(f"there is no structure at {_shown(path)}")
        ((kind, children),) = node.items()
        if kind == "same":
            # Of what comes earlier in the walk: then no walk is endless.
            target = _items(children, kind)
            if any(type(each) is not int for each in target) or (
                tuple(target) not in self._shared
            ):
                _fail(f"{_shown(path)} is the same as nothing that is before it")
            return
        if kind in ("module", "variable"):
            self._shared.add(spot)
        if kind == "variable":
            self.visit(children, [*path, "value"], (*spot, 0))
        elif kind in ("list", "tuple"):
            for index, child in enumerate(_items(children, kind)):
                self.visit(child, [*path, str(index)], (*spot, index))
        elif kind in ("dict", "module"):
            for index, (key, child) in enumerate(self._pairs(children, kind, path)):
                self.visit(child, [*path, str(key)], (*spot, index))
        else:
            _fail(f"there is a structure of kind {_shown(kind)}")

    def _pairs(self, children: Any, kind: str, path: list[str]) -> list[Any]:
        keys: set[str] = set()
        pairs = [_items(pair, "a pair", 2) for pair in _items(children, kind)]
        for key, _ in pairs:
            if type(key) not in (str, int) or str(key) in keys:
                _fail(f"a key at {_shown(path)} is {_shown(key)}")
            keys.add(str(key))
        return pairs


def _check_leaf(leaf: Any, *, has_digest: bool) -> None:
    _mapping(leaf, "a leaf")
    path, kind = _list(leaf, "path"), leaf.get("kind")
    for each in path:
        if type(each) is not str:
            _fail(f"a leaf's path is {_shown(path)}")
    if "stored" in leaf:
        _check_stored(leaf, len(path))
    is_held = kind not in FROM_LIKE
    if kind in _ARRAYS:
        shape = _shape(leaf, "shape")
        _match(_DTYPE, leaf.get("dtype"), "a dtype")
        is_held = 0 not in shape
        if kind == "key":
            _text(leaf, "impl")
        if kind == "bytes" and len(shape) != 1:
            _fail(f"bytes are of shape {shape}")
        if kind == "numpy_scalar" and shape:
            _fail(f"a numpy scalar is of shape {shape}")
    elif kind == "str" and leaf.get("dtype") == "uint8":
        if len(_shape(leaf, "shape")) != 1:
            _fail(f"text is of shape {_shown(leaf['shape'])}")
    elif kind not in _OTHERS:
        _fail(f"a leaf is of kind {_shown(kind)}")
    elif leaf.get("dtype", "") != "" or leaf.get("shape", []) != []:
        _fail(f"a leaf of kind {kind} has a dtype or a shape")
    if has_digest and is_held:
        _match(_DIGEST, leaf.get("digest"), "a digest")


def _check_stored(leaf: Mapping[str, Any], depth: int) -> None:
    """Check the keys under which a leaf is stored, which make a path below `state`."""
    keys = _list(leaf, "stored")
    if len(keys) not in (1, depth) or any(type(key) is not str for key in keys):
        _fail(f"a leaf is stored as {_shown(keys)}")
    name = ".".join(keys)
    if not all(map(_STORED.fullmatch, name.split("/"))) or len(name) > _NAME_BYTES:
        _fail(f"a leaf is stored as {_shown(name)}")


# ---- zarr.json -----------------------------------------------------------------------


def _chunk_of(shape: tuple[int, ...], setting: Mapping[str, Any]) -> tuple[int, ...]:
    """Check the shape of the chunks of an array, or of the parts of a chunk."""
    chunk = _shape(setting, "chunk_shape")
    if len(chunk) != len(shape) or any(
        not 0 < part <= max(size, 1) for part, size in zip(chunk, shape, strict=True)
    ):
        _fail(f"an array of shape {_shown(shape)} has chunks of {_shown(chunk)}")
    pairs = zip(shape, chunk, strict=True)
    if math.prod(-(-size // part) for size, part in pairs) > _CHUNKS:
        _fail(f"an array of shape {_shown(shape)} has chunks of {_shown(chunk)}")
    return chunk


def _codecs(fields: Mapping[str, Any], chunk: tuple[int, ...]) -> list[dict[str, Any]]:
    found = _list(fields, "codecs")
    for codec in found:
        _mapping(codec, "a codec")
        setting = _mapping(codec.get("configuration", {}), "a codec")
        if _text(codec, "name") == "sharding_indexed":
            _codecs(setting, _chunk_of(chunk, setting))
            for each in _list(setting, "index_codecs"):
                _mapping(each, "a codec")
    return found


# ---- values --------------------------------------------------------------------------


def _shape(fields: Mapping[str, Any], name: str) -> tuple[int, ...]:
    shape = _list(fields, name)
    for size in shape:
        if type(size) is not int or size < 0:
            _fail(f"{name} is {_shown(shape)}")
    if not is_possible(shape):
        _fail(f"{name} is {_shown(shape)}, which is too large")
    return tuple(shape)


def _int(fields: Mapping[str, Any], name: str, low: int, high: int) -> int:
    value = fields.get(name)
    if type(value) is not int or not low <= value < high:
        _fail(f"{name} is {_shown(value)}")
    return value


def _bool(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if type(value) is not bool:
        _fail(f"{name} is {_shown(value)}")
    return value


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if type(value) is not str:
        _fail(f"{name} is {_shown(value)}")
    return value


def _list(fields: Mapping[str, Any], name: str) -> list[Any]:
    return _items(fields.get(name), name)


def _items(value: Any, name: str, length: int | None = None) -> list[Any]:
    if type(value) is not list or (length is not None and len(value) != length):
        _fail(f"{name} is {_shown(value)}")
    return value


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if type(value) is not dict:
        _fail(f"{name} is {_shown(value)}")
    return value


def _match(pattern: re.Pattern[str], value: Any, name: str) -> None:
    if type(value) is not str or not pattern.fullmatch(value):
        _fail(f"{name} is {_shown(value)}")


def _no_constant(name: str) -> Never:
    raise MalformedError(f"it has {name}, which is no JSON")


def _fail(problem: str) -> Never:
    raise MalformedError(problem)


def _shown(value: Any) -> str:
    """Show a value in one short line, however large it is."""
    match value:
        case None:
            return "missing or null"
        case str():
            shown = repr(value[:_SHOWN])
        case dict() | list() if len(value) > 8:
            return f"a {type(value).__name__} of {len(value)}"
        case int() if abs(value) >= _INT64:
            return "a number of more than 64 bits"
        case _:
            try:
                shown = repr(value)
            except (RecursionError, ValueError):
                return f"a {type(value).__name__}"
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
