"""The public function that writes a checkpoint's tree to a file of another library."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flaxckpt._checkpoints.foreign import foreign_tree
from flaxckpt._checkpoints.load import part_of_weights
from flaxckpt._checkpoints.load_tree import read_each
from flaxckpt._checkpoints.read import Sums
from flaxckpt._checkpoints.read_table import read_table
from flaxckpt._checkpoints.undisturbed import undisturbed
from flaxckpt._files import formats
from flaxckpt._files.outgoing import Outgoing
from flaxckpt._files.staging import check_free, commit, staging
from flaxckpt._object_store.source import Place
from flaxckpt._object_store.url import check_is_path, is_url
from flaxckpt._runtime.failures import in_one_line
from flaxckpt._trees.convert import convert
from flaxckpt._trees.wanted import on_host
from flaxckpt.errors import CheckpointPathError, CheckpointWriteError


def export(
    path: str | os.PathLike[str],
    to: str | os.PathLike[str],
    *,
    weights_only: bool = True,
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint's tree to a file of another library, which `load` reads, too.

    The suffix of `to` chooses the format: `.safetensors`, `.npz` of numpy, or
    `.msgpack`, which `flax.serialization.from_bytes` reads. Each leaf is checked
    against its digest. An array takes the keys that lead to it as its name, joined by
    `.` in safetensors and by `/` in `.npz`. A Python number becomes a scalar array
    there; `.msgpack` keeps it, and text. A part that two NNX modules share is written
    for each of them. Functions are left out.

    No half-written file ever has the final name. Any process may call this, also for a
    checkpoint that several processes wrote. Of several processes, one should.

    Args:
        path: As for `load`. It may be a file, too, which changes the format.
        to: The file to write. Missing directories are made.
        weights_only: Write only the weights, as `load_weights` finds them. False
            writes the whole tree.
        max_shard_bytes: If the arrays have more bytes, divide a `.safetensors` file
            into files of at most this size, as `m-00001-of-00003.safetensors`, with an
            index, `m.safetensors.index.json`, as Hugging Face does. An array that is
            larger has a file of its own. The process needs memory for one such file.
        overwrite: Whether files that are already there may be replaced.

    Returns:
        The file to load, `to` or the index. `load(to)` finds the index by itself.

    Raises:
        CheckpointPathError: If there is a file already, or `to` is in an object store.
        UnsupportedLeafError: If the format cannot hold some leaves: it names them, and
            nothing is written.
        SettingError: If there is no such format to write, or it cannot be divided.
        CheckpointWriteError: If the file cannot be written.
        CheckpointError: If a library is missing, which the message says how to install;
            and as `load_weights`.

    Example:
        >>> import flaxckpt
        >>> import numpy as np
        >>> with flaxckpt.ModelCheckpoint("runs/{epoch}") as ckpt:
        ...     path = ckpt.save({"dense": {"w": np.arange(3)}}, epoch=0)
        >>> file = flaxckpt.export(path, "model.npz")
        >>> np.load(file)["dense/w"]
        array([0, 1, 2])
    """
    check_is_path("to", to, "pass the path of the file to write.")
    if is_url(to):
        advice = "is in an object store. Export to a disk, and copy the file."
        raise CheckpointPathError(os.fspath(to), advice)
    target = Path(os.path.abspath(os.path.expanduser(to)))
    formats.check_writable(target, max_shard_bytes)
    if not overwrite:
        check_free(target)
    try:
        with staging(target) as stage:

            def write(place: Place) -> Path:
                directory = Path(tempfile.mkdtemp(dir=stage))
                outgoing = _outgoing(path, place, weights_only=weights_only)
                formats.write(outgoing, directory, target.name, max_shard_bytes)
                return directory

            written = undisturbed(path, write)
            if not overwrite:
                check_free(target)
            return commit(written, target)
    except OSError as error:
        raise CheckpointWriteError(str(target), in_one_line(error)) from error


def _outgoing(
    path: str | os.PathLike[str], place: Place, *, weights_only: bool
) -> Outgoing:
    """Describe a checkpoint's tree, or its weights, for a writer."""
    layout, weights = read_table(place.path)
    part = part_of_weights(path, layout, weights) if weights_only else None
    foreign = None
    if layout is None:
        foreign = foreign_tree(place.path, None, weights_only=weights_only)
        layout = foreign.layout
    if callable(part):
        part = part(layout)
    view, sources = layout.part(layout.skeleton if part is None else part)

    def read(indices: Sequence[int]) -> list[Any]:
        wanted = [on_host(view.leaves[index]) for index in indices]
        asked = [(sources[i], want) for i, want in zip(indices, wanted, strict=True)]
        if foreign is None:
            stored = read_each(place, layout, asked, Sums(), check=True)
        else:
            stored = [foreign.read(index, want) for index, want in asked]
        return [
            convert(value, view.leaves[index], want, cast=False)
            for index, value, want in zip(indices, stored, wanted, strict=True)
        ]

    tree = view.fill(range(len(view.leaves)))
    return Outgoing(tree, view.leaves, read)
