"""Reads a checkpoint's leaves, and compares them with their digests."""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from flaxckpt._direct.read import Reader
from flaxckpt._disk.record import LEAVES_FILE, located
from flaxckpt._disk.vetting import check_plain
from flaxckpt._object_store.source import Place
from flaxckpt._orbax.engine import with_key
from flaxckpt._orbax.files import data_files, is_database, leaf_files
from flaxckpt._orbax.restore import read_by_orbax
from flaxckpt._processes.messages import are_several
from flaxckpt._runtime.failures import listed
from flaxckpt._runtime.unchecked import unchecked_pool
from flaxckpt._trees.digest import agree, combined
from flaxckpt._trees.layout import Layout
from flaxckpt._trees.leaf import Leaf
from flaxckpt._trees.owned_shards import is_shared, pieces
from flaxckpt._trees.wanted import Wanted, on_host
from flaxckpt.errors import CheckpointCorruptError, CheckpointPathError

_READ_THREADS = 8
_BATCH_BYTES = 256 * 2**20
_THREAD_BYTES = 4 * 2**20
_TASK_LEAVES, _TASK_BYTES = 64, 2**20  # that a thread reads in one go, at most


def check_table(place: Place, layout: Layout, leaves: Iterable[Leaf]) -> None:
    """Check that leaves are stored with the shapes and dtypes of the table of leaves.

    Orbax would return whatever it finds.

    Raises:
        CheckpointCorruptError: If some are not; names them.
    """
    if place.source is not None:
        return  # a check alone fetches nothing from an object store
    path = place.path
    check_plain(path, layout.nbytes, layout.nbytes)
    reader = _reader(place, layout)
    if reader is None:
        return
    leaves = list(leaves)
    arrays = [leaf for leaf in leaves if leaf.in_orbax and not leaf.is_text]
    if arrays and not reader.describes_any(arrays):
        return  # Orbax is to tell what is wrong, if anything is
    wrong = [leaf for leaf in leaves if reader.contradicts(leaf)]
    if wrong:
        names = listed([leaf.name for leaf in wrong])
        files = listed(leaf_files(located(path), wrong))
        raise CheckpointCorruptError(
            str(path),
            f"the stored arrays do not match {LEAVES_FILE}: {names} (in one of the "
            f"files {files})",
        )


def _reader(place: Place, layout: Layout) -> Reader | None:
    """Return a checkpoint's `Reader`; None if Orbax is to try and to tell the error."""
    if is_database(place.path):
        check_plain(place.path, held=layout.nbytes)
    try:
        return Reader(located(place.path), place.source)
    except CheckpointPathError:
        raise
    except (OSError, ValueError):
        return None


class Sums:
    """Sums over this process's shards of leaves, which all processes have to add up.

    Attributes:
        place: The checkpoint.
        leaves: The leaves.
        totals: The sums; see `combined`.
    """

    def __init__(self) -> None:
        """Begin without leaves."""
        self.place: Place | None = None
        self.leaves: list[Leaf] = []
        self.totals: list[int] = []

    def begin(self, place: Place) -> "Sums":
        """Begin anew, with a checkpoint."""
        self.place, self.leaves, self.totals = place, [], []
        return self

    def add(self, leaf: Leaf, value: Any) -> None:
        """Add up a leaf's shards."""
        self.leaves.append(leaf)
        self.totals.append(combined(pieces(value)))


def damage(place: Place, leaves: Sequence[Leaf]) -> CheckpointCorruptError:
    """Return the error that leaves are not what was saved."""
    place.complete()
    names = listed([leaf.name for leaf in leaves])
    files = listed(data_files(located(place.path), leaves))
    return CheckpointCorruptError(
        str(place.path), f"not what was saved: {names} (in one of the files {files})"
    )


def read(
    place: Place,
    layout: Layout,
    wanted: Mapping[int, Wanted],
    sums: Sums | None = None,
    *,
    check: bool,
) -> list[Any]:
    """Read the wanted leaves of a checkpoint, each onto its wanted sharding.

    Args:
        place: The checkpoint.
        layout: Its layout.
        wanted: What each wanted leaf is to be read as, by its index in the layout.
        sums: Gets the arrays of several processes, which this process cannot check; may
            be None if none is wanted.
        check: Whether to compare the leaves with their digests.

    Returns:
        A value for each leaf of the layout; None if it is not wanted. For a value that
        each process has for itself, the rows of all; see `per_process`.

    Raises:
        CheckpointCorruptError: If leaves cannot be read, or, with `check`, differ from
            what was saved; names the leaves and their files.
    """
    if layout.as_stored is not layout:
        own = {i: leaf for i, leaf in enumerate(layout.leaves) if leaf.rows}
        layout = layout.as_stored
        rows = {i: on_host(layout.leaves[i]) for i in own.keys() & wanted.keys()}
        wanted = {**wanted, **rows}
    read = {i: layout.leaves[i] for i in wanted if layout.leaves[i].in_orbax}
    values, damaged, unchecked = _read_files(place, layout, read, wanted, check=check)
    others = {index: leaf for index, leaf in read.items() if index not in values}
    if others:
        check_table(place, layout, others.values())
        by_orbax = read_by_orbax(place, layout, {i: wanted[i] for i in others})
        values |= {index: by_orbax[index] for index in others}
    if check:
        unchecked |= others
        damaged += _differing(unchecked, values, sums)
    if damaged:
        raise damage(place, damaged)
    return [values.get(index) for index in range(len(layout.leaves))]


def _read_files(
    place: Place,
    layout: Layout,
    leaves: Mapping[int, Leaf],
    wanted: Mapping[int, Wanted],
    *,
    check: bool,
) -> tuple[dict[int, Any], list[Leaf], dict[int, Leaf]]:
    """Read leaves that are stored in a known way, without Orbax or other processes.

    Returns:
        The values that could be read, the leaves that are damaged, and the leaves that
        are still to be checked.
    """
    reader = _reader(place, layout)
    if reader is None:
        return {}, [], {}
    known = dict(leaves)
    if are_several():  # all processes must leave the same leaves to Orbax
        known = {index: leaf for index, leaf in leaves.items() if reader.knows(leaf)}

    def read(index: int) -> tuple[Any, bool | None]:
        leaf, want = known[index], wanted[index]
        sharding = want.sharding
        is_placed = leaf.kind == "key" or (
            leaf.kind in ("jax", "numpy") and leaf.dtype == want.leaf.dtype
        )
        if sharding is None or want.is_in_one_piece or not is_placed:
            return reader.read(leaf, check=check)
        return reader.read_onto(leaf, sharding, check=check)

    def read_all(indices: list[int]) -> list[tuple[Any, bool | None]]:
        with reader.expecting(known[index] for index in indices):
            return list(map(read, indices))

    # More threads than cores compete for the cache, and are no faster. For small values
    # in a database, they compete for the interpreter's lock.
    threads = min(_READ_THREADS, os.cpu_count() or 1)
    if reader.is_database:
        nbytes = sum(leaf.nbytes for leaf in known.values())
        threads = min(threads, 1 + nbytes // _THREAD_BYTES)
    ahead = reader.most_at_once or _TASK_LEAVES
    tasks = _tasks(known, min(_TASK_LEAVES, ahead))
    with unchecked_pool(threads, "flaxckpt-read") as pool:
        read_in_tasks = itertools.chain.from_iterable(pool.map(read_all, tasks))
        pairs = dict(zip(itertools.chain(*tasks), read_in_tasks, strict=True))
    damaged = [known[index] for index, (_, same) in pairs.items() if same is False]
    values = {index: value for index, (value, _) in pairs.items() if value is not None}
    if are_several():  # Orbax would wait for the processes that could read these
        damaged += [leaf for index, leaf in known.items() if index not in values]
        values = dict.fromkeys(known) | values
    unchecked = {i: known[i] for i, (_, same) in pairs.items() if same is None}
    for index in values:
        if known[index].kind == "key" and values[index] is not None:
            values[index] = _as_key(known[index], values[index], wanted[index])
    return values, damaged, unchecked


def _tasks(leaves: Mapping[int, Leaf], most: int) -> list[list[int]]:
    """Group leaves for threads: to hand a thread one small leaf costs as much again.

    Args:
        leaves: The leaves.
        most: How many leaves a group has at most.
    """
    tasks: list[list[int]] = []
    room = 0
    for index, leaf in leaves.items():
        if not tasks or room < leaf.nbytes or len(tasks[-1]) == most:
            tasks.append([])
            room = _TASK_BYTES
        tasks[-1].append(index)
        room -= leaf.nbytes
    return tasks


def _as_key(leaf: Leaf, data: Any, want: Wanted) -> Any:
    """Wrap data as typed PRNG keys, on the wanted sharding."""
    if not isinstance(data, jax.Array):
        data = jax.device_put(data, want.sharding or jax.local_devices()[0])
    return with_key(leaf, data)


def _differing(
    leaves: Mapping[int, Leaf], values: Mapping[int, Any], sums: Sums | None
) -> list[Leaf]:
    """Return the leaves whose values do not have their recorded digests.

    Arrays of several processes are left to `sums`.
    """
    recorded = {index: leaf for index, leaf in leaves.items() if leaf.digest}
    whole = {i: leaf for i, leaf in recorded.items() if not is_shared(values[i])}
    same = agree([values[i] for i in whole], [leaf.digest for leaf in whole.values()])
    damaged = [
        leaf for leaf, is_same in zip(whole.values(), same, strict=True) if not is_same
    ]
    for index, leaf in recorded.items():
        if index not in whole:
            assert sums is not None
            sums.add(leaf, values[index])
    return damaged


def batches(leaves: Sequence[Leaf]) -> Iterator[list[int]]:
    """Group the leaves that Orbax stores into batches of 256 MiB, or of one leaf."""
    batch: list[int] = []
    size = 0
    for index, leaf in enumerate(leaves):
        if not leaf.in_orbax:
            continue
        if batch and size + leaf.nbytes > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(index)
        size += leaf.nbytes
    if batch:
        yield batch
