"""The first checkpoint of each kind is looked at before it takes its place.

A kind is a directory, a way of writing, and what the tree is like. A bug in the writer
then shows at the save, and not at the restore.
"""

import functools
import os
import time
from collections import deque
from pathlib import Path
from typing import Any

from flaxckpt._checkpoints.read import batches, read
from flaxckpt._checkpoints.read_table import read_table
from flaxckpt._direct.read import Reader
from flaxckpt._disk.record import RECORD_FILE, read_record
from flaxckpt._object_store.source import Place
from flaxckpt._orbax.files import NEEDED
from flaxckpt._processes.messages import are_several
from flaxckpt._runtime.threads import give_way
from flaxckpt._trees.leaf import Leaf
from flaxckpt._trees.wanted import on_host
from flaxckpt.errors import CheckpointCorruptError, CheckpointWriteError

_REMEMBERED = 64


class IncompleteError(CheckpointWriteError):
    """A look has found that not all is there."""


class Looks:
    """The kinds of checkpoints that were checked, and were complete."""

    def __init__(self) -> None:
        """Begin with no kinds."""
        self._seen: deque[tuple[Any, ...]] = deque(maxlen=_REMEMBERED)

    def check(
        self, written: Path, shown: Path, *what: Any, again: bool = False
    ) -> None:
        """Check that a checkpoint is complete, unless one of its kind was checked.

        Reads values only of leaves whose files do not tell, as a restore would.

        Args:
            written: The checkpoint, in the directory in which it was written.
            shown: The checkpoint's place, for the error.
            *what: The way of writing, the tree's layout, and its leaves' placements.
                They are equal for checkpoints that must have the same files.
            again: Whether to check in any case.

        Raises:
            IncompleteError: If it is not complete.
        """
        above = written.parents[1]  # the directory that has the staging directory
        status = os.stat(above)
        # Another directory may have the inode of a deleted one, or its name.
        kind = (str(above), status.st_dev, status.st_ino, *what)
        # The tuple is a copy: another thread may append.
        if kind in tuple(self._seen) and not again:
            return
        problem = _problem_of(written)
        if problem:
            raise IncompleteError(
                str(shown), f"what was written is not all there ({problem})"
            )
        self._note(kind)

    def _note(self, kind: tuple[Any, ...]) -> None:
        """Note that a checkpoint was complete; keep each large layout only once."""
        earlier = [part for other in tuple(self._seen) for part in other]
        kept = (next((one for one in earlier if one == part), part) for part in kind)
        self._seen.appendleft(tuple(kept))


@functools.cache
def shared_looks() -> Looks:
    """Return the one `Looks` of this process, which all objects share."""
    return Looks()


def _problem_of(written: Path) -> str:
    """Say what is missing from a checkpoint; empty if nothing is."""
    missing = [name for name in NEEDED if not (written / name).is_file()]
    doubtful: dict[int, Leaf] = {}
    try:
        layout, _ = read_table(written)
        if read_record(written) is None or layout is None:
            raise CheckpointCorruptError(str(written), f"{RECORD_FILE} is missing")
        reader, turn = Reader(written), time.perf_counter()
        leaves = layout.as_stored.leaves
        held = {i: leaf for i, leaf in enumerate(leaves) if leaf.in_orbax}
        with reader.expecting(held.values(), values=False):
            for index, leaf in held.items():
                turn = give_way(turn)
                if not reader.holds(leaf):
                    doubtful[index] = leaf
        if doubtful and are_several():  # all processes would have to read
            raise CheckpointCorruptError(str(written), "files are missing")
        for batch in batches(layout.leaves) if doubtful else ():
            wanted = {i: on_host(doubtful[i]) for i in batch if i in doubtful}
            read(Place(written), layout, wanted, check=True)
    except CheckpointCorruptError as error:
        names = [leaf.name for leaf in doubtful.values()]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"{', '.join(names[:3])}{more}: {error.problem}".removeprefix(": ")
    return f"{', '.join(missing)} is missing" if missing else ""
