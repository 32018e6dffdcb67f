"""Puts written files in the place of earlier ones: whole, or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

from flaxckpt._decision.reserved import HIDDEN_PREFIX
from flaxckpt._disk.files import sync_path
from flaxckpt._files.safetensors import INDEX, SUFFIX, is_shard_of
from flaxckpt.errors import CheckpointPathError


@contextlib.contextmanager
def staging(target: Path) -> Generator[Path]:
    """Yield a new hidden directory beside a file, and delete it in the end.

    Raises:
        OSError: If it cannot be made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    made = tempfile.mkdtemp(prefix=f"{HIDDEN_PREFIX}export-", dir=target.parent)
    try:
        yield Path(made)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def check_free(target: Path) -> None:
    """Check that no file is where an export to `target` puts one.

    Raises:
        CheckpointPathError: If one is.
    """
    earlier = _files_of(target)
    if earlier:
        raise CheckpointPathError(
            str(earlier[0]),
            "is there already. Pass overwrite=True to replace it, or another name.",
        )


def commit(directory: Path, target: Path) -> Path:
    """Move all files of a directory to where `target` is, in place of earlier ones.

    One file takes the place of another at once. Shards cannot: an earlier index goes
    first, and the new index comes last, so no index ever names shards of two exports.

    Returns:
        The file to load: `target`, or the index of its shards.

    Raises:
        OSError: If a file cannot be moved.
    """
    index = target.with_name(target.name + INDEX)
    written = sorted(directory.iterdir(), key=lambda file: file.name == index.name)
    for file in written:
        sync_path(file)
    if len(written) > 1:
        index.unlink(missing_ok=True)
        sync_path(target.parent)
    moved = [target.with_name(file.name) for file in written]
    for file, place in zip(written, moved, strict=True):
        os.replace(file, place)
    sync_path(target.parent)
    for file in _files_of(target):
        if file not in moved:
            file.unlink(missing_ok=True)
    sync_path(target.parent)
    return moved[-1]


def _files_of(target: Path) -> list[Path]:
    """Return what an export to `target` may have written: the index first."""
    files = [target]
    if target.name.endswith(SUFFIX) and target.parent.is_dir():
        beside = sorted(target.parent.iterdir())
        shards = [file for file in beside if is_shard_of(file.name, target.name)]
        files = [target.with_name(target.name + INDEX), target, *shards]
    return [file for file in files if os.path.lexists(file)]
