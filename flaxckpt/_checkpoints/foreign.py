"""A tree that another library than flaxckpt stored: plain Orbax, or one with files."""

from pathlib import Path

from flaxckpt._files.foreign_tree import ForeignTree
from flaxckpt._files.formats import read
from flaxckpt._orbax.engine import storable
from flaxckpt._orbax.foreign import read_foreign
from flaxckpt._trees.describe import describe
from flaxckpt._trees.ties import PyTree


def foreign_tree(path: Path, like: PyTree, *, weights_only: bool) -> ForeignTree:
    """Describe what another library stored.

    Args:
        path: The directory of a checkpoint of plain Orbax, or a file.
        like: The wanted tree.
        weights_only: Whether items of plain Orbax that hold no weights may be left out.
    """
    if path.is_file():
        return read(path, like)
    tree = read_foreign(path, like, weights_only=weights_only)
    layout, values = describe(tree, storable)
    return ForeignTree(layout, lambda index, _: values[index])
