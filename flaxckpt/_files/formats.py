"""The formats of other libraries' files: which one a file has, and who reads it."""

import contextlib
import os
import zipfile
from pathlib import Path

from flaxckpt._disk.open import NoFileError, open_file
from flaxckpt._files import keras, msgpack, npz, safetensors
from flaxckpt._files.foreign_tree import ForeignTree
from flaxckpt._files.outgoing import Outgoing
from flaxckpt._trees.ties import PyTree
from flaxckpt.errors import CheckpointPathError, SettingError

_SAFETENSORS, _NPZ, _MSGPACK, _KERAS = "safetensors", "npz", "msgpack", "keras"
_SUFFIXES = {
    safetensors.SUFFIX: _SAFETENSORS,
    safetensors.SUFFIX + safetensors.INDEX: _SAFETENSORS,
    npz.SUFFIX: _NPZ,
    msgpack.SUFFIX: _MSGPACK,
    **dict.fromkeys(keras.SUFFIXES, _KERAS),
}
_WRITTEN = safetensors.SUFFIX, npz.SUFFIX, msgpack.SUFFIX
_HEAD_BYTES = 16


def file_at(path: Path) -> Path | None:
    """Return the file of a known format that a path leads to; None if there is none.

    The path may be that of a file, of a directory with `model.safetensors` or its
    index, or of a file that is divided into shards, which has only an index.
    """
    entry = safetensors.entry_of(path)
    return entry if entry is not None and _format_of(entry) else None


def _format_of(file: Path) -> str:
    """Return the format that a file's suffix tells, or its first bytes; "" for none."""
    return by_suffix(file.name) or _by_content(file)


def by_suffix(name: str) -> str:
    """Return the format that a name's suffix tells; "" for none."""
    found = (each for suffix, each in _SUFFIXES.items() if name.endswith(suffix))
    return next(found, "")


def _by_content(path: Path) -> str:
    try:
        with open(open_file(path), "rb") as file:
            head, size = file.read(_HEAD_BYTES), os.fstat(file.fileno()).st_size
            if head.startswith(keras.HEAD):
                return _KERAS
            with contextlib.suppress(zipfile.BadZipFile):
                names = zipfile.ZipFile(file).namelist()
                if keras.WEIGHTS in names:
                    return _KERAS
                return _NPZ if npz.is_list(names) else ""
    except (NoFileError, OSError, CheckpointPathError):
        return ""
    if safetensors.is_head(head, size):
        return _SAFETENSORS
    return _MSGPACK if msgpack.is_head(head) else ""


def read(path: Path, like: PyTree) -> ForeignTree:
    """Describe the tree in a file that `file_at` has found.

    Raises:
        CheckpointCorruptError: If it cannot be read; names the file.
        CheckpointPathError: If this process may not read it.
        CheckpointError: If a library is missing, or the file holds what JAX has not.
    """
    match _format_of(path):
        case "safetensors":
            return safetensors.read(path, like)
        case "npz":
            return npz.read(path, like)
        case "keras":
            return keras.read(path, like)
        case _:
            return msgpack.read(path)


def check_writable(target: Path, max_shard_bytes: object) -> None:
    """Check that there is a format to write for a name, which can be divided if asked.

    Raises:
        SettingError: If there is none.
    """
    if by_suffix(target.name) == _KERAS:
        raise SettingError(
            "to",
            str(target),
            "only a Keras model knows the structure of this file. Put the weights into "
            "the model's variables, and call model.save_weights.",
        )
    if not target.name.endswith(_WRITTEN):
        raise SettingError(
            "to", str(target), f"the name has to end in {' or '.join(_WRITTEN)}."
        )
    if max_shard_bytes is None:
        return
    if by_suffix(target.name) != _SAFETENSORS:
        raise SettingError(
            "max_shard_bytes",
            max_shard_bytes,
            f"only {safetensors.SUFFIX} files are divided into shards. Leave it out.",
        )
    if type(max_shard_bytes) is not int or max_shard_bytes < 1:
        raise SettingError(
            "max_shard_bytes", max_shard_bytes, "pass a number of bytes, 1 or more."
        )


def write(
    outgoing: Outgoing, directory: Path, name: str, max_shard_bytes: int | None
) -> None:
    """Write a tree to a file of a name, and files that belong to it, in a directory.

    Raises:
        UnsupportedLeafError: If the format cannot hold a leaf; nothing is written.
        CheckpointError: If a library is missing.
        OSError: If a file cannot be written.
    """
    match by_suffix(name):
        case "safetensors":
            safetensors.write(outgoing, directory, name, max_shard_bytes)
        case "npz":
            npz.write(outgoing, directory / name)
        case _:
            msgpack.write(outgoing, directory / name)
