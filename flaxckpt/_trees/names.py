"""Names of leaves as the store spells them: a directory or a key for each leaf.

Orbax joins the keys on the path to a leaf with dots. An ordinary name is stored as it
is, and a slash in it makes directories, as in Haiku's `mlp/~/linear`. A file system,
TensorStore or Orbax would misread some characters: each of their bytes is stored as `%`
and two hexadecimal digits. The table of leaves records every spelling that differs from
the path, so no reader ever parses a spelling.
"""

import hashlib
import operator
import re
import sys
import unicodedata
from collections.abc import Sequence
from typing import Any, TypeAlias

Path: TypeAlias = tuple[str, ...]
_LIMIT_BYTES = 200  # most file systems take 255, and some encrypting ones fewer
_HEAD_BYTES = 60  # a name that is too long keeps these, before a hash
_FOLDS = sys.platform in ("darwin", "win32")  # file systems there ignore case
# Backslashes, which TensorStore takes for separators; control characters; surrogates,
# which UTF-8 cannot encode.
_ALWAYS = r"\\\x00-\x1f\x7f-\x9f\ud800-\udfff"
_UNSAFE_IN_PATHS = re.compile(rf"[{_ALWAYS}]|^\.+$")
_POINTER = re.compile(r"[/~]")  # special in a JSON pointer
_UNSAFE = re.compile(rf"[/~{_ALWAYS}]|^\.+$")
_STRICT = re.compile(rf"{_UNSAFE.pattern}|[.%]")
_FOLDED = re.compile(rf"{_STRICT.pattern}|[^\x00-@\[-\x7f]")
_EMPTY = "%"  # an empty key; no escape looks like this
_SHORTENED = "%-"  # nor like this
# Names of files that Orbax, TensorStore or an object store's pointers use or look for.
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
_LOCK = ".__lock"  # TensorStore takes no file with this ending
# JSON reads such a pair of surrogates as one character.
_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")


def spelled(
    paths: Sequence[Path], *, slashes: bool = True, folds: bool = _FOLDS
) -> dict[int, Path]:
    """Spell the names of a tree's leaves so that the store can hold each of them.

    Args:
        paths: Keys from the root to each leaf. No two paths are equal, and no path
            begins with another one.
        slashes: Whether slashes may stay, if each leaf has a directory of its own even
            so. False if the tree has a text whose path `is_in_pointer`.
        folds: Whether the file system may take upper case for lower case.

    Returns:
        The stored keys of each leaf whose stored keys differ from its path, by the
        leaf's index. They are as many keys as the path has, or a single key at the
        root. Joined with dots, the keys of a leaf fit a file name, differ from the keys
        of all other leaves, and are a path that is not below another leaf's.
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
    """Tell whether a key by itself needs no escapes, and is not too long."""
    is_short = len(key.encode(errors="surrogatepass")) <= _LIMIT_BYTES
    return bool(key) and "%" not in key and not _UNSAFE.search(key) and is_short


def is_in_pointer(path: Path) -> bool:
    """Tell whether a text at this path needs escapes: a JSON pointer leads to it."""
    return any(_POINTER.search(key) for key in path)


def is_recordable(key: str) -> bool:
    """Tell whether the table of leaves, which is JSON, can record a key."""
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
    """Tell whether all leaves, and all keys beside each other, are still distinct."""
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
    """Tell whether each name is a path of ordinary names, and not below another one."""
    names = [_folded(".".join(path), folds=folds) for path in found]
    if not any("/" in name for name in names):
        return True
    paths = [tuple(name.split("/")) for name in names]
    above = _above(paths)
    if len(above) < len(_above([tuple(".".join(path).split("/")) for path in found])):
        return False  # the file system takes two directories for one
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
