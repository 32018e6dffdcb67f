"""Finds the checkpoints that were set aside while they were being replaced."""

import os
from collections.abc import Generator
from pathlib import Path

from flaxckpt._disk.record import HIDDEN_PREFIX, REPLACED_PREFIX


def all_set_aside(root: Path, depth: int) -> Generator[Path]:
    """Yield what is set aside in `root`, and up to `depth` directories below it."""
    for directory in _directories(root, depth):
        names = [entry.name for entry in _entries(directory)]
        for name in sorted(names):
            if name.startswith(REPLACED_PREFIX) and name != REPLACED_PREFIX:
                yield directory / name


def _directories(root: Path, depth: int) -> Generator[Path]:
    """Yield `root` and the directories up to `depth` below it that are not ours.

    A directory that cannot be read is yielded, but not searched.
    """
    left = [(root, depth)]
    while left:
        directory, below = left.pop()
        yield directory
        for entry in _entries(directory) if below > 0 else []:
            try:
                is_directory = entry.is_dir()
            except OSError:  # a link that leads in a circle
                continue
            if is_directory and not entry.name.startswith(HIDDEN_PREFIX):
                left.append((Path(entry.path), below - 1))


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as iterator:
            return list(iterator)
    except OSError:
        return []
