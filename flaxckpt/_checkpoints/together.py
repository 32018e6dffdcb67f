"""Writes one checkpoint by several processes: process 0 leads, each writes a share."""

import collections
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flaxckpt._checkpoints.finish import finish
from flaxckpt._checkpoints.looks import IncompleteError
from flaxckpt._checkpoints.share import Share, Terms, write_part
from flaxckpt._checkpoints.write import Checkpoint, Commit, Way
from flaxckpt._direct.forms import held_values, placements_of
from flaxckpt._direct.zarr import STATE
from flaxckpt._disk.files import Draft, sync_tree
from flaxckpt._processes.messages import SilenceError, process_index
from flaxckpt._trees.digest import digest_of_sum
from flaxckpt.errors import CheckpointError, CheckpointWriteError

# A network's file system may show other machines what was written a little later.
_VISIBLE_SECS = 30.0


@dataclass(frozen=True)
class Together:
    """How the other processes write their shares of a checkpoint.

    Attributes:
        begin: Tells them of the directory, and returns what waits for their shares.
        may_finish: Returns once no process can give the checkpoint up any more; raises
            if one has.
        terms: How all of them write.
    """

    begin: Callable[[Path], Callable[[], list[Share]]]
    may_finish: Callable[[], None]
    terms: Terms


def write_together(
    checkpoint: Checkpoint, way: Way, together: Together, commit: Commit | None = None
) -> Share:
    """Write a checkpoint as `write_checkpoint` does, with the other processes' shares.

    Only process 0 calls this.

    Args:
        checkpoint: What to write.
        way: How to write it; the area is open.
        together: Has the other processes write their shares.
        commit: As for `write_checkpoint`.

    Returns:
        The share of this process.

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

        try:
            own = write_part(
                written, layout, leaves, way, together.terms, wait_for_others
            )
        finally:
            with contextlib.suppress(CheckpointError):
                hear()  # if this process has failed, the others may still write
        all_shares = [own, *hear()]
        digests = _digests_of(all_shares, way, area.shown(info.path))
        with Draft(written, sync=False) as draft:
            table = way.tables.table(layout, checkpoint.weights, (digests, []))
            finish(draft, written, info, table)
        if area.sync:
            sync_tree(written)
        if not area.is_mirror:
            _look(written, checkpoint, way, all_shares)
        together.may_finish()
        (commit or way.commit)(written, info.path)
    return own


def _digests_of(shares: Sequence[Share], way: Way, shown: Path) -> list[str]:
    """Add up the sums of all processes to the digest of each leaf.

    Raises:
        CheckpointWriteError: If a process does not know what it has written. From now
            on replicas are not divided, so that each process knows it.
    """
    totals = collections.Counter[int]()
    for share in shares:
        if share.sums is None:
            way.divides_replicas = False
            raise CheckpointWriteError(
                str(shown),
                "Orbax has divided replicas between the processes in a way that is not "
                f"known here, so nobody knows what process {share.process} has "
                "written. Later saves divide none",
            )
        totals.update(share.sums)
    return [digest_of_sum(totals[index]) for index in sorted(shares[0].sums or ())]


def _look(
    written: Path, checkpoint: Checkpoint, way: Way, shares: Sequence[Share]
) -> None:
    """Look whether all is there, if it is the first of its kind.

    Raises:
        IncompleteError: If something is missing. From now on Orbax writes.
    """
    kind = ("together", *(share.is_direct for share in shares))
    placements = placements_of(held_values(checkpoint.layout, checkpoint.leaves))
    shown = way.area.shown(checkpoint.info.path)
    try:
        way.looks.check(written, shown, kind, checkpoint.layout, placements)
    except IncompleteError:
        way.writes_directly = False
        raise


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
