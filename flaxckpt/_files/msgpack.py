"""Flax's msgpack files: `flax.serialization`, `flax.training.checkpoints` of old."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from flaxckpt._disk.open import read_small
from flaxckpt._files.foreign_tree import (
    ForeignTree,
    check_depth,
    is_numeric,
    kind_of,
    reading,
)
from flaxckpt._files.library import library
from flaxckpt._files.outgoing import Outgoing
from flaxckpt._trees.describe import describe
from flaxckpt._trees.layout import Layout
from flaxckpt._trees.leaf import Leaf
from flaxckpt._trees.ties import leaves_of
from flaxckpt.errors import CheckpointError, UnsupportedLeafError

SUFFIX = ".msgpack"
_ELSEWHERE = "//GDAPlaceholder:"  # in place of an array of several processes
# The first byte of a map, and of a text, which is the map's first key; see
# https://github.com/msgpack/msgpack/blob/master/spec.md.
_MAPS: Mapping[int, int] = {
    **dict.fromkeys(range(0x81, 0x90), 1),
    0xDE: 3,
    0xDF: 5,
}  # and the bytes before its first key
_TEXTS = (*range(0xA0, 0xC0), 0xD9, 0xDA, 0xDB)


def is_head(head: bytes) -> bool:
    """Tell whether a file that begins like this is a map from text, as Flax writes."""
    before = _MAPS.get(head[0], len(head)) if head else 0
    return len(head) > before and head[before] in _TEXTS


def read(path: Path) -> ForeignTree:
    """Read a file whole: the format has no table of what is where."""
    serialization = library("flax.serialization", "flax", path)
    with reading(path):
        tree = serialization.msgpack_restore(read_small(path, sys.maxsize))
        check_depth(tree)
    texts = (leaf for leaf in leaves_of(tree) if isinstance(leaf, str))
    if any(text.startswith(_ELSEWHERE) for text in texts):
        raise CheckpointError(
            f"{str(path)!r} has its arrays in the directory {path.name}_gda beside it. "
            "Load it with flax.training.checkpoints.restore_checkpoint, and save what "
            "you get."
        )
    try:
        layout, values = describe(tree, is_numeric)
    except UnsupportedLeafError as error:
        raise UnsupportedLeafError(error.leaves, "restored") from error
    leaves = tuple(
        replace(leaf, kind=kind_of(leaf.dtype)) if leaf.kind == "numpy" else leaf
        for leaf in layout.leaves
    )
    return ForeignTree(Layout(layout.skeleton, leaves), lambda index, _: values[index])


def write(outgoing: Outgoing, file: Path) -> None:
    """Write a tree as `flax.serialization.to_bytes` does; `from_bytes` reads it.

    Raises:
        UnsupportedLeafError: If the format cannot hold a leaf.
        OSError: If the file cannot be written.
    """
    serialization = library("flax.serialization", "flax", file)
    refused = [
        (leaf.name, _problem(leaf)) for leaf in outgoing.leaves if _problem(leaf)
    ]
    if refused:
        raise UnsupportedLeafError(tuple(refused), "exported")
    values = outgoing.read(range(len(outgoing.leaves)))
    tree: Any = jax.tree.map(values.__getitem__, outgoing.tree)
    state = serialization.to_state_dict(tree)
    file.write_bytes(serialization.msgpack_serialize(state, in_place=True))


def _problem(leaf: Leaf) -> str:
    if leaf.kind == "key":
        return "is a PRNG key. Save jax.random.key_data of it"
    if leaf.kind == "int" and leaf.dtype:
        return "is an integer of more than 64 bits"
    if leaf.kind == "state":
        return "is the state of an object"
    if leaf.kind == "str" and leaf.dtype:
        return "is text that UTF-8 cannot encode"
    return ""
