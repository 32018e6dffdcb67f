"""One process's share of a checkpoint that several processes write."""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flaxckpt._checkpoints.write import Way
from flaxckpt._direct.form import Form, database_of
from flaxckpt._direct.forms import held_values
from flaxckpt._direct.write import sum_of_share, write_values_of_share
from flaxckpt._direct.zarr import ARRAYS_METADATA, DESCRIPTION, STATE
from flaxckpt._disk.files import Draft, sync_path, sync_tree
from flaxckpt._orbax.share import finish_shares, have_orbax_write_share
from flaxckpt._processes.messages import LEADER, process_index
from flaxckpt._runtime.failures import is_of_the_machine
from flaxckpt._trees.layout import Layout
from flaxckpt._trees.owned_shards import is_shared


@dataclass(frozen=True)
class Share:
    """What one process has written of a checkpoint.

    Attributes:
        process: The process.
        sums: The sums over its shards, for the leaves of which it has shards: the
            leaf's place among those that Orbax stores, and the sum; see `combined`.
            None if it is not known which replicas it has written.
        files: The size of each file that it has written, by the path in the checkpoint,
            for process 0 to look at. In a store, only Orbax's small file.
        is_direct: Whether the values were written straight from memory, not by Orbax.
        fault: What failed if Orbax had to write after all; only the process itself
            knows it.
    """

    process: int
    sums: dict[int, int] | None
    files: dict[str, int]
    is_direct: bool
    fault: Exception | None = None

    def to_json(self) -> list[Any]:
        """Return it as JSON values, for `Share.of_json`."""
        sums = None if self.sums is None else list(self.sums.items())
        return [self.process, sums, self.files, self.is_direct]

    @classmethod
    def of_json(cls, values: Sequence[Any]) -> "Share":
        """Return the share that `to_json` described."""
        process, sums, *others = values
        return cls(process, None if sums is None else dict(map(tuple, sums)), *others)


@dataclass(frozen=True)
class Terms:
    """The terms on which all processes write.

    Attributes:
        spreads: Whether replicas are divided between processes; see
            `have_orbax_write_share`.
        directly: Whether a process that knows the form of its share writes it straight
            from memory.
    """

    spreads: bool
    directly: bool


def write_share(
    directory: Path, layout: Layout, leaves: list[Any], way: Way, terms: Terms
) -> Share:
    """Write this process's share of a checkpoint that process 0 begins and finishes.

    Args:
        directory: The checkpoint.
        layout: The tree's layout.
        leaves: Its leaves.
        way: How to write it; the directory is a `share` of the area.
        terms: The terms on which all processes write.

    Returns:
        What was written, for `write_together` in process 0.
    """
    (directory / STATE).mkdir(exist_ok=True)
    share = write_part(directory, layout, leaves, way, terms, lambda: None)
    if way.area.is_mirror:
        _keep_shards(directory, layout, leaves)
    written = _written_by(share.process, directory)
    if way.area.sync:
        for each in written:
            sync_tree(each) if each.is_dir() else sync_path(each)
    files = dict[str, int]()
    for each in written:
        for file in each.rglob("*") if each.is_dir() else [each]:
            if file.is_file():
                files[file.relative_to(directory).as_posix()] = file.stat().st_size
    return replace(share, files=files)


def _written_by(process: int, directory: Path) -> list[Path]:
    """Return what a process alone has written: its database and its small files."""
    small = f"{ARRAYS_METADATA}/process_{process}"
    written = (directory / STATE / name for name in (database_of(process), small))
    return [path for path in written if path.exists()]


def write_part(
    directory: Path,
    layout: Layout,
    leaves: list[Any],
    way: Way,
    terms: Terms,
    wait: Callable[[], None],
) -> Share:
    """Write what this process has of a tree, and process 0 the rest, too.

    If Orbax has written such a share before, the values go straight from memory into
    this process's database. A fault of that costs time, and no checkpoint: Orbax writes
    then. If the databases cannot be merged, this save fails, and Orbax writes the next.

    The files of an object store are written in a directory of each process's own. So
    there is no database, which only process 0 could merge, and no file that several
    processes write a part of.

    Args:
        directory: The checkpoint.
        layout: The tree's layout.
        leaves: Its leaves.
        way: How to write it.
        terms: The terms on which all processes write.
        wait: Returns once the other processes have written, for process 0.
    """
    process, held = process_index(), held_values(layout, leaves)
    is_database, spreads = not way.area.is_mirror, terms.spreads
    may_be_direct = is_database and way.writes_directly and not way.compress
    sums: list[int] | None = None
    fault: Exception | None = None
    form, begun = None, time.time_ns()
    if may_be_direct and terms.directly:
        form = way.forms.find(layout, held, is_database=True, spreads=spreads)
    if form is not None:
        sums, fault = _write_directly(form, directory, held)
    if sums is not None:
        wait()
        if process == LEADER:
            try:
                finish_shares(directory, begun)
            except Exception:
                way.writes_directly = False  # the handler merges in its own way
                raise
    else:
        have_orbax_write_share(
            directory,
            layout,
            leaves,
            wait,
            is_database=is_database,
            spreads=spreads,
            compress=way.compress,
        )
        if spreads or (may_be_direct and fault is None):
            what = directory, layout, held, process
            sums = way.forms.learn_share(*what, spreads=spreads)
        if sums is None and not spreads:
            sums = [sum_of_share(value, process) for value in held]
    if sums is None:
        return Share(process, None, {}, is_direct=False, fault=fault)
    # Process 0 counts every leaf, another process those of which it wrote chunks. Where
    # replicas are divided, all write chunks of PRNG keys.
    found = {i: each for i, each in enumerate(sums) if each or process == LEADER}
    return Share(process, found, {}, fault is None and form is not None, fault)


def _write_directly(
    form: Form, directory: Path, held: list[Any]
) -> tuple[list[int] | None, Exception | None]:
    """Write a share straight from memory; return the sums, or what has failed."""
    process = process_index()
    try:
        with Draft(directory, sync=False) as draft:
            sums = write_values_of_share(form, draft, directory, held, process)
            draft.finish()
    except Exception as fault:
        if is_of_the_machine(fault):
            raise  # Orbax would meet with it as well
        for each in _written_by(process, directory):
            shutil.rmtree(each) if each.is_dir() else each.unlink()
        return None, fault.with_traceback(None)  # the frames hold the tree
    return sums, None


def _keep_shards(directory: Path, layout: Layout, leaves: list[Any]) -> None:
    """Delete all but the files of shards, and this process's own small file."""
    held = [leaf for leaf in layout.leaves if leaf.in_orbax]
    pairs = zip(held, held_values(layout, leaves), strict=True)
    shared = {
        (directory / STATE / leaf.stored_name).as_posix()
        for leaf, value in pairs
        if is_shared(value)
    }
    for file in filter(Path.is_file, directory.rglob("*")):
        of_shard = file.name != DESCRIPTION and any(
            parent.as_posix() in shared for parent in file.parents
        )
        if not of_shard and file.name != f"process_{process_index()}":
            file.unlink()
