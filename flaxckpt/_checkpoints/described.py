"""`describe`: what a checkpoint holds, without its values."""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp

from flaxckpt._checkpoints.load import info_of
from flaxckpt._checkpoints.read_table import read_table
from flaxckpt._checkpoints.undisturbed import undisturbed
from flaxckpt._disk.info import CheckpointInfo
from flaxckpt._disk.record import versions_in
from flaxckpt._files import formats
from flaxckpt._object_store.source import Place
from flaxckpt._orbax.described import foreign_leaves, shardings_in
from flaxckpt._trees.leaf import ARRAYS, Leaf
from flaxckpt._trees.skeleton import indices_in


@dataclass(frozen=True)
class LeafInfo:
    """One leaf of a stored tree.

    Attributes:
        name: Its path, with slashes, such as `params/dense/kernel`.
        kind: `jax`, `numpy`, `numpy_scalar`, `key` (typed PRNG keys), `bool`, `int`,
            `float`, `complex`, `str`, `bytes`, or `state` (of an object). A `function`
            and a `static` leaf of Equinox are not stored. An array of plain Orbax's is
            of kind `array`.
        dtype: Name of the dtype; empty for a Python value.
        shape: The shape.
        nbytes: Bytes in memory.
        sharding: How the saved array was sharded, as a text such as
            `P('data', None) on data=8`; empty if that is not known.
        is_weight: Whether it is one of the weights; None if flaxckpt did not write it.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    sharding: str
    is_weight: bool | None

    def __str__(self) -> str:
        if self.kind not in (*ARRAYS, "key", "array"):
            return self.kind
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Description:
    """What a checkpoint holds. Its text is a table.

    Attributes:
        path: The checkpoint's path or URL.
        leaves: Its leaves, in the order of the saved tree.
        info: Its record, with the logs; None if flaxckpt did not write it.
        versions: Versions of the packages that wrote it; empty without a record.
    """

    path: Path
    leaves: tuple[LeafInfo, ...]
    info: CheckpointInfo | None
    versions: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves in memory."""
        return sum(leaf.nbytes for leaf in self.leaves)

    def __str__(self) -> str:
        rows = [
            (leaf.name, str(leaf), _size(leaf.nbytes), leaf.sharding)
            for leaf in self.leaves
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)] or [0]
        lines = [f"{self.path}: {len(rows)} leaves, {_size(self.nbytes)}"]
        if self.info is not None:
            logs = [f"{name}={value}" for name, value in self.info.logs.items()]
            lines[0] += f"; {', '.join([_moment(self.info), *logs])}"
        for row in rows:
            cells = [cell.ljust(n) for cell, n in zip(row, widths, strict=True)]
            lines.append(f"  {'  '.join(cells)}".rstrip())
        if self.versions:
            written = ", ".join(f"{name} {v}" for name, v in self.versions.items())
            lines.append(f"written by {written}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Description of {str(self.path)!r}: {len(self.leaves)} leaves>"


def describe(path: str | os.PathLike[str]) -> Description:
    """Tell what a checkpoint holds, without reading its values.

    Any process may call this by itself, at any time. It needs no accelerator.

    Args:
        path: The checkpoint's directory, or a `gs://` or `s3://` URL, written by
            flaxckpt or plain Orbax, or a file of another library that `load` reads. A
            `CheckpointInfo` stands for that very checkpoint.

    Returns:
        The description. Print it to see a table.

    Raises:
        CheckpointNotFoundError: If there is no checkpoint at `path`.
        CheckpointCorruptError: If the files that describe it are damaged. It does not
            look at the values: `verify` does.
        CheckpointPathError: If this process cannot read it.
        CheckpointError: If the object store cannot be reached.

    Example:
        >>> import flaxckpt
        >>> import numpy as np
        >>> with flaxckpt.ModelCheckpoint("runs/{epoch}") as ckpt:
        ...     path = ckpt.save({"w": np.zeros((2, 3)), "b": 1.5}, epoch=0)
        >>> [(leaf.name, str(leaf)) for leaf in flaxckpt.describe(path).leaves]
        [('b', 'float'), ('w', 'float64[2,3]')]
    """

    def read(place: Place) -> Description:
        info = info_of(path, place.path)
        layout, weights = read_table(place.path)
        shown = place.path if info is None else info.path
        if layout is None:
            place.complete()
            return Description(shown, tuple(_foreign(place.path)), None, {})
        shardings, picked = shardings_in(place), set(indices_in(weights))
        picked -= {at for at, leaf in enumerate(layout.leaves) if leaf.is_from_like}
        leaves = tuple(
            _leaf_info(leaf, shardings.get(leaf.stored_name, ""), index in picked)
            for index, leaf in enumerate(layout.leaves)
        )
        return Description(shown, leaves, info, versions_in(place.path))

    return undisturbed(path, read)


def _moment(info: CheckpointInfo) -> str:
    if info.epoch is None:
        return f"step {info.step}"
    batch = "" if info.batch is None else f", batch {info.batch}"
    return f"epoch {info.epoch}{batch}"


def _leaf_info(leaf: Leaf, sharding: str, is_weight: bool | None) -> LeafInfo:
    nbytes = 0 if leaf.is_from_like else leaf.nbytes
    return LeafInfo(
        leaf.name, leaf.kind, leaf.dtype, leaf.shape, nbytes, sharding, is_weight
    )


def _foreign(path: Path) -> Iterator[LeafInfo]:
    """Describe the leaves of what plain Orbax or another library wrote."""
    if path.is_file():
        for leaf in formats.read(path, None).layout.leaves:
            yield _leaf_info(leaf, "", None)
        return
    for name, leaf, sharding in foreign_leaves(path):
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
            dtype, shape = jnp.dtype(leaf.dtype), tuple(leaf.shape)
            nbytes = dtype.itemsize * math.prod(shape)
            name = name or Leaf((), "").name
            yield LeafInfo(name, "array", str(dtype), shape, nbytes, sharding, None)
        else:
            plain = Leaf(tuple(name.split("/")), type(leaf).__name__)
            yield _leaf_info(plain, "", None)


def _size(nbytes: float) -> str:
    """Return a number of bytes as text, with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.1f} {unit}" if unit != "B" else f"{nbytes:.0f} B"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"
