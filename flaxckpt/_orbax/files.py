"""The files of a checkpoint as Orbax has laid them out, and whether all are there."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from flaxckpt._direct.zarr import STATE
from flaxckpt._disk.open import is_inside, is_there
from flaxckpt._disk.record import located
from flaxckpt._object_store.source import source_of
from flaxckpt._trees.leaf import Leaf
from flaxckpt.errors import CheckpointCorruptError

NEEDED = ("_CHECKPOINT_METADATA", "state/_METADATA")  # for plain Orbax to read it
# Plain Orbax warns that there are no arrays where no directory has a file of this name,
# as Zarr 2 has; it writes Zarr 3 itself.
ZARR_MARK = f"{STATE}/array_metadatas/.zarray"


def is_database(path: Path) -> bool:
    """Tell whether a checkpoint's arrays are in a database, and not in files."""
    return is_there(located(path) / STATE / "manifest.ocdbt")


def check_names(path: Path, leaves: Sequence[Leaf]) -> None:
    """Check that no leaf's name leads Orbax to files outside of the checkpoint."""
    if is_database(path):
        return  # a database has keys, and no files
    for leaf in leaves:
        name = leaf.stored_name
        if not leaf.is_text and (name[:1] == "/" or ".." in name.split("/")):
            raise CheckpointCorruptError(
                str(path), f"the name of the leaf {name!r} leads out of the checkpoint"
            )


def data_files(path: Path, leaves: Sequence[Leaf]) -> list[str]:
    """Name the files that hold the values of leaves, and not what describes them."""
    found = leaf_files(path, leaves)
    values = [
        name for name in found if not name.endswith(("/zarr.json", "/manifest.ocdbt"))
    ]
    return values or found


def leaf_files(path: Path, leaves: Sequence[Leaf]) -> list[str]:
    """Name the files of leaves; those of the database, where one holds them all."""
    names = [leaf.stored_name for leaf in leaves]
    own = [path / "state" / name for name in names if is_inside(name)]
    found: list[Path] = []
    with contextlib.suppress(FileNotFoundError):  # they may be on their way out
        found += [file for each in own for file in each.rglob("*") if file.is_file()]
        if any(leaf.is_text for leaf in leaves):
            found += path.glob("state/_strings.json")
        found = found or [*path.glob("state/*.ocdbt"), *path.glob("state/**/d/*")]
    return [str(file.relative_to(path)) for file in sorted(found)]


def complete(path: Path) -> None:
    """Have all of a checkpoint on the disk, for what reads there only."""
    source = source_of(path)
    if source is not None:
        source.complete()
