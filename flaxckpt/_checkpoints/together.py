"""Writes one checkpoint by several processes: process 0 leads, each writes a share."""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flaxckpt._checkpoints.finish import finish
from flaxckpt._checkpoints.write import Checkpoint, Commit, Way
from flaxckpt._direct.forms import held_values, placements_of
from flaxckpt._direct.zarr import DESCRIPTION, STATE
from flaxckpt._disk.area import Area
from flaxckpt._disk.files import Draft, sync_path, sync_tree
from flaxckpt._orbax.share import write_share as write_by_orbax
from flaxckpt._processes.messages import SilenceError, process_index
from flaxckpt._trees.digest import combined, digest_of_sum
from flaxckpt._trees.layout import Layout
from flaxckpt._trees.owned_shards import is_shared, pieces
from flaxckpt.errors import CheckpointError, CheckpointWriteError

# A network's file system may show other machines what was written a little later.
_VISIBLE_SECS = 30.0


@dataclass(frozen=True)
class Share:
    """What one process has written of a checkpoint.

    Attributes:
        process: The process.
        sums: The sums over its shards, for the leaves of which it has shards: the
            leaf's place among those that Orbax stores, and the sum; see `combined`.
        files: The size of each file that it has written, by the path in the checkpoint.
    """

    process: int
    sums: dict[int, int]
    files: dict[str, int]

    def to_json(self) -> list[Any]:
        """Return it as JSON values, for `Share.of_json`."""
        return [self.process, list(self.sums.items()), self.files]

    @classmethod
    def of_json(cls, values: Sequence[Any]) -> "Share":
        """Return the share that `to_json` described."""
        process, sums, files = values
        return cls(process, dict(map(tuple, sums)), files)


@dataclass(frozen=True)
class Together:
    """How the other processes write their shares of a checkpoint.

    Attributes:
        begin: Tells them of the directory, and returns what waits for their shares.
        may_finish: Returns if no process has given the checkpoint up; from then on,
            none does.
        spreads: Whether replicas are divided between processes; see `write_by_orbax`.
    """

    begin: Callable[[Path], Callable[[], list[Share]]]
    may_finish: Callable[[], None]
    spreads: bool


def write_share(
    directory: Path, layout: Layout, leaves: list[Any], area: Area, *, spreads: bool
) -> Share:
    """Write this process's share of a checkpoint that process 0 begins and finishes.

    Args:
        directory: The checkpoint.
        layout: The tree's layout.
        leaves: Its leaves.
        area: The area, whose `share` the directory is.
        spreads: As in `Together`.

    Returns:
        What was written, for `write_together` in process 0.
    """
    (directory / STATE).mkdir(exist_ok=True)
    _write_by_orbax(directory, layout, leaves, _nothing, area, spreads=spreads)
    if area.is_mirror:
        _keep_shards(directory, layout, leaves)
    own = f"*process_{process_index()}"
    written = [*(directory / STATE).glob(own), *(directory / STATE).glob(f"*/{own}")]
    if area.sync:
        for each in written:
            sync_tree(each) if each.is_dir() else sync_path(each)
    sizes = {
        file.relative_to(directory).as_posix(): file.stat().st_size
        for each in written
        for file in (each.rglob("*") if each.is_dir() else [each])
        if file.is_file()
    }
    return Share(process_index(), _sums(layout, leaves, leads=False), sizes)


def _write_by_orbax(
    directory: Path,
    layout: Layout,
    leaves: list[Any],
    wait: Callable[[], None],
    area: Area,
    *,
    spreads: bool,
) -> None:
    """Write the files of an object store in a directory of each process's own.

    So there is no database then, which only process 0 could merge, and no file that
    several processes write a part of.
    """
    is_database = not area.is_mirror
    spreads = spreads and is_database
    write_by_orbax(
        directory, layout, leaves, wait, is_database=is_database, spreads=spreads
    )


def _keep_shards(directory: Path, layout: Layout, leaves: list[Any]) -> None:
    """Delete what process 0 has written, too: all but the files of shards."""
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


def _sums(layout: Layout, leaves: list[Any], *, leads: bool) -> dict[int, int]:
    held = held_values(layout, leaves)
    return {
        index: combined(pieces(value))
        for index, value in enumerate(held)
        if leads or is_shared(value)
    }


def write_together(
    checkpoint: Checkpoint, way: Way, together: Together, commit: Commit | None = None
) -> None:
    """Write a checkpoint as `write_checkpoint` does, with the other processes' shares.

    Only process 0 calls this.

    Args:
        checkpoint: What to write.
        way: How to write it; the area is open.
        together: Has the other processes write their shares.
        commit: As for `write_checkpoint`.

    Raises:
        CheckpointWriteError: As `write_checkpoint` does; also if this process does not
            see what another has written.
    """
    info, layout, area = checkpoint.info, checkpoint.layout, way.area
    leaves, shares = checkpoint.leaves, None
    with area.staging() as directory:
        written = directory / "new"
        (written / STATE).mkdir(parents=True)
        wait = together.begin(written)

        def hear() -> list[Share]:
            nonlocal shares
            if shares is None:
                shares = []  # the others are heard once
                try:
                    shares = wait()
                except SilenceError:
                    # A silent process may still write. If the directory were gone,
                    # TensorStore would wait for it there, for ever.
                    area.spare(directory)
                    raise
            return shares

        def wait_for_others() -> None:
            heard = hear()
            if not area.is_mirror:  # a store has the others' shares
                _see(heard, written, area.shown(info.path))

        spreads = together.spreads
        try:
            _write_by_orbax(
                written, layout, leaves, wait_for_others, area, spreads=spreads
            )
        finally:
            with contextlib.suppress(CheckpointError):
                hear()  # if this process has failed, the others may still write
        totals = _sums(layout, leaves, leads=True)
        for share in shares or []:
            for index, total in share.sums.items():
                totals[index] += total
        digests = [digest_of_sum(totals[index]) for index in range(len(totals))]
        with Draft(written, sync=False) as draft:
            table = way.tables.table(layout, checkpoint.weights, (digests, []))
            finish(draft, written, info, table)
        if area.sync:
            sync_tree(written)
        if not area.is_mirror:
            kind = "together", layout, placements_of(held_values(layout, leaves))
            way.looks.check(written, area.shown(info.path), *kind)
        together.may_finish()
        (commit or way.commit)(written, info.path)


def _see(shares: list[Share], written: Path, shown: Path) -> None:
    """Check that this process sees what the others have written.

    Raises:
        CheckpointWriteError: If a file is missing or has another size; names it and the
            process.
    """
    until = time.monotonic() + _VISIBLE_SECS
    for share in shares:
        for name, size in share.files.items():
            while (found := _size(written / name)) != size:
                if time.monotonic() > until:
                    what = "is missing" if found is None else f"has {found} bytes"
                    raise CheckpointWriteError(
                        str(shown),
                        f"process {share.process} has written {name!r} with {size} "
                        f"bytes, which {what} for process {process_index()}. Save on "
                        "a file system that all processes share",
                    )
                time.sleep(0.05)


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return None


def _nothing() -> None:
    return
