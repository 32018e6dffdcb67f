"""The files of a checkpoint, as Orbax lays them out."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from flaxckpt._direct.zarr import DESCRIPTION, MANIFEST, STATE
from flaxckpt._disk.open import is_inside, is_there
from flaxckpt._disk.record import LEAVES_FILE, RECORD_FILE, located
from flaxckpt._trees.leaf import Leaf
from flaxckpt.errors import CheckpointCorruptError

NEEDED = ("_CHECKPOINT_METADATA", "state/_METADATA")  # plain Orbax needs them to read
# Orbax writes Zarr 3. But plain Orbax warns that there are no arrays unless it finds a
# file of this name, which belongs to Zarr 2, in some directory.
ZARR_MARK = f"{STATE}/array_metadatas/.zarray"
OURS = {LEAVES_FILE, RECORD_FILE, ZARR_MARK}  # the files that are not Orbax's


def is_database(path: Path) -> bool:
    """Tell whether a checkpoint's arrays are in a database, and not in files."""
    return is_there(located(path) / STATE / MANIFEST)


def check_names(path: Path, leaves: Sequence[Leaf]) -> None:
    """Check that no leaf's name leads Orbax to files outside of the checkpoint.

    Raises:
        CheckpointCorruptError: If a name does.
    """
    if is_database(path):
        return  # the names are keys of the database, and no paths
    for leaf in leaves:
        name = leaf.stored_name
        if not leaf.is_text and (name[:1] == "/" or ".." in name.split("/")):
            raise CheckpointCorruptError(
                str(path), f"the name of the leaf {name!r} leads out of the checkpoint"
            )


def data_files(path: Path, leaves: Sequence[Leaf]) -> list[str]:
    """Name the leaves' files, less the files that only describe the values."""
    found = leaf_files(path, leaves)
    values = [
        name for name in found if not name.endswith((f"/{DESCRIPTION}", f"/{MANIFEST}"))
    ]
    return values or found


def leaf_files(path: Path, leaves: Sequence[Leaf]) -> list[str]:
    """Name the leaves' files; the database's files if the leaves have none."""
    names = [leaf.stored_name for leaf in leaves]
    own = [path / "state" / name for name in names if is_inside(name)]
    found: list[Path] = []
    with contextlib.suppress(FileNotFoundError):  # a writer may be deleting them
        found += [file for each in own for file in each.rglob("*") if file.is_file()]
        if any(leaf.is_text for leaf in leaves):
            found += path.glob("state/_strings.json")
        found = found or [*path.glob("state/*.ocdbt"), *path.glob("state/**/d/*")]
    return [str(file.relative_to(path)) for file in sorted(found)]
