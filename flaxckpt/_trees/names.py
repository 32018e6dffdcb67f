"""Names of leaves as the store spells them: a directory or a key for each leaf.

Orbax joins the keys on the way to a leaf with dots. An ordinary name is stored as it
is; a slash in it makes directories, as in Haiku's `mlp/~/linear`. A name that a file
system, TensorStore or Orbax would read in another way is stored with the characters at
fault as `%` and their bytes in hexadecimal. The table of leaves records every spelling
that differs from the path, so nothing is ever parsed back.
"""

import hashlib
import operator
import re
import sys
import unicodedata
from collections.abc import Sequence
from typing import Any, TypeAlias

Path: TypeAlias = tuple[str, ...]
_LIMIT_BYTES = 200  # of 255 that file systems take; some encrypting ones take fewer
_HEAD_BYTES = 60  # that are left of a name that is too long
_FOLDS = sys.platform in ("darwin", "win32")  # file systems know no upper case there
# TensorStore takes a backslash for a separator, too. Then: control characters, and what
# UTF-8 cannot encode.
_ALWAYS = r"\\\x00-\x1f\x7f-\x9f\ud800-\udfff"
_UNSAFE_IN_PATHS = re.compile(rf"[{_ALWAYS}]|^\.+$")
_POINTER = re.compile(r"[/~]")  # what a JSON pointer reads otherwise
_UNSAFE = re.compile(rf"[/~{_ALWAYS}]|^\.+$")
_STRICT = re.compile(rf"{_UNSAFE.pattern}|[.%]")
_FOLDED = re.compile(rf"{_STRICT.pattern}|[^\x00-@\[-\x7f]")
_EMPTY = "%"  # an empty key; no escape looks like this
_SHORTENED = "%-"  # nor like this
# Files that Orbax, TensorStore and an object store's pointers have, or are looked for.
_TAKEN = frozenset(
    (
        "_METADATA",
        "_sharding",
        "_strings.json",
        "array_metadatas",
        "manifest.ocdbt",
        "ocdbt.process_0",
        "zarr.json",
        ".zarray",
        ".flaxckpt-current",
    )
)
_LOCK = ".__lock"  # TensorStore takes no file of such a name
# JSON reads these two as one character.
_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")


def spelled(
    paths: Sequence[Path], *, slashes: bool = True, folds: bool = _FOLDS
) -> dict[int, Path]:
    """Spell the names of a tree's leaves so that the store can hold each of them.

    Args:
        paths: Keys from the root to each leaf; no two are equal, none begins with
            another.
        slashes: Whether a slash may stay, where each leaf has a directory of its own
            all the same; False where the tree has a text that `is_in_pointer`.
        folds: Whether the file system may take upper case for lower case.

    Returns:
        By a leaf's index, the keys under which it is stored, where they differ from its
        path: as many keys as the path has, or one, which stands at the root. Joined
        with dots, the keys of all leaves differ, fit a file name, and are paths of
        which none is below another.
    """
    ways = [_UNSAFE, _FOLDED if folds else _STRICT]
    if slashes:
        ways.insert(0, _UNSAFE_IN_PATHS)
    found = list[Path]()
    for unsafe in ways:
        found = [_spelled(path, unsafe, folds=folds) for path in paths]
        if _are_apart(paths, found, folds=folds) and _are_paths(found, folds=folds):
            break
    pairs = zip(paths, found, strict=True)
    return {index: new for index, (path, new) in enumerate(pairs) if new != path}


def is_plain(key: str) -> bool:
    """Tell whether a key is stored as it is, whatever stands beside it."""
    is_short = len(key.encode(errors="surrogatepass")) <= _LIMIT_BYTES
    return bool(key) and "%" not in key and not _UNSAFE.search(key) and is_short


def is_in_pointer(path: Path) -> bool:
    """Tell whether a text of this path needs escapes: a JSON pointer leads to it."""
    return any(_POINTER.search(key) for key in path)


def is_recordable(key: str) -> bool:
    """Tell whether a table, which is JSON, can record a key: not a surrogate pair."""
    return not _PAIR.search(key)


def _spelled(path: Path, unsafe: re.Pattern[str], *, folds: bool) -> Path:
    parts = tuple([unsafe.sub(_escape, part) or _EMPTY for part in path])
    name = ".".join(parts)
    if _folded(name, folds=folds) in _taken(folds=folds) or name.endswith(_LOCK):
        last = parts[-1]
        parts = (*parts[:-1], last[:-1] + _escaped(last[-1]))
    if len(".".join(parts).encode()) <= _LIMIT_BYTES:
        return parts
    marks = hashlib.sha256("/".join(parts).encode()).hexdigest()[:32]
    head = name.encode()[:_HEAD_BYTES].decode(errors="ignore")
    return (f"{head}{_SHORTENED}{marks}",)


def _are_apart(paths: Sequence[Path], found: Sequence[Path], *, folds: bool) -> bool:
    """Tell whether no two leaves, and no two keys beside each other, are confused."""
    if len({_folded(".".join(path), folds=folds) for path in found}) < len(found):
        return False
    if all(map(operator.eq, paths, found)):
        return True
    origins: dict[Path, Any] = {}
    for path, new in zip(paths, found, strict=True):
        own = path if len(new) == len(path) else (path,)
        for depth in range(1, len(new) + 1):
            if origins.setdefault(new[:depth], own[:depth]) != own[:depth]:
                return False
    return True


def _are_paths(found: Sequence[Path], *, folds: bool) -> bool:
    """Tell whether each name is a path of ordinary names, and none is below another."""
    names = [_folded(".".join(path), folds=folds) for path in found]
    if not any("/" in name for name in names):
        return True
    paths = [tuple(name.split("/")) for name in names]
    above = _above(paths)
    if len(above) < len(_above([tuple(".".join(path).split("/")) for path in found])):
        return False  # directories that the file system takes for one
    parts = {part for path in paths for part in path}
    return (
        above.isdisjoint(paths)
        and parts.isdisjoint(_taken(folds=folds))
        and all(part.strip(".") for part in parts)
        and not any(part.endswith(_LOCK) or _SHORTENED in part for part in parts)
    )


def _above(paths: Sequence[Path]) -> set[Path]:
    return {path[:depth] for path in paths for depth in range(1, len(path))}


def _escape(found: re.Match[str]) -> str:
    return _escaped(found[0])


def _escaped(text: str) -> str:
    return "".join([f"%{byte:02X}" for byte in text.encode(errors="surrogatepass")])


def _folded(name: str, *, folds: bool) -> str:
    return unicodedata.normalize("NFC", name).casefold() if folds else name


def _taken(*, folds: bool) -> frozenset[str]:
    return frozenset(map(str.casefold, _TAKEN)) if folds else _TAKEN
