"""Writes one checkpoint: tree, table of leaves and record. Checks it the first time."""

import functools
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flaxckpt._checkpoints.load import batches
from flaxckpt._checkpoints.looks import Looks
from flaxckpt._checkpoints.read import read, read_table
from flaxckpt._checkpoints.versions import versions
from flaxckpt._direct.form import Form, Share, recognized
from flaxckpt._direct.forms import (
    FORMS,
    form_of,
    held_values,
    known_form,
    placements_of,
    thawed,
)
from flaxckpt._direct.frozen_files import Frozen, FrozenLeaf
from flaxckpt._direct.read import Reader
from flaxckpt._direct.threads import give_way
from flaxckpt._direct.zarr import STATE
from flaxckpt._disk.commit import Area
from flaxckpt._disk.files import Draft, sync_path, sync_tree
from flaxckpt._disk.info import CheckpointInfo
from flaxckpt._disk.record import (
    FORMAT,
    LEAVES_FILE,
    RECORD_FILE,
    encode_record,
    read_leaves,
    read_record,
)
from flaxckpt._orbax.engine import ocp, orbax_context, unpacked, with_key, write_tree
from flaxckpt._orbax.files import NEEDED, OURS, ZARR_MARK
from flaxckpt._orbax.own_number import own_number
from flaxckpt._orbax.state_handler import Marks, Task
from flaxckpt._processes.messages import are_several, is_leader
from flaxckpt._runtime.quiet import quiet
from flaxckpt._trees.digest import digests
from flaxckpt._trees.layout import Layout
from flaxckpt._trees.leaf import Leaf
from flaxckpt._trees.owned_shards import is_shared
from flaxckpt._trees.skeleton import Skeleton
from flaxckpt._trees.wanted import on_host
from flaxckpt.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointWriteError,
)

# If the leaves have this mean size in bytes, files are better than one database.
_LARGE_LEAF = 2**20


class _IncompleteError(CheckpointWriteError):
    """A look has found that not all is there."""


def write_checkpoint(
    info: CheckpointInfo,
    area: Area,
    layout: Layout,
    leaves: list[Any],
    weights: Skeleton,
    *,
    compress: bool = False,
    frozen: Frozen | None = None,
    earlier: Path | None = None,
    looks: Looks | None = None,
    put: Callable[[Path, Path], Path] | None = None,
    may_write: bool = True,
) -> Task:
    """Write a checkpoint and put it in its place, replacing one that is there.

    Blocks until the new checkpoint is there and, if `area` syncs, on disk. Until then
    the old checkpoint stays in its place.

    Args:
        info: The checkpoint's record.
        area: Where its series is written; open.
        layout: The tree's layout.
        leaves: Its leaves, in forms that Orbax stores. Frozen leaves come as
            `FrozenLeaf`.
        weights: Where in `layout` the weights are.
        compress: Whether to compress the arrays.
        frozen: Where frozen leaves are stored; None if no leaf is frozen.
        earlier: A checkpoint that may hold frozen leaves, looked into if `frozen` knows
            no stored leaf.
        looks: The ways of writing that were checked before; None for no check.
        put: Puts the written directory into its own or another place, and returns the
            place; None for its own place.
        may_write: Whether values may be written straight from memory, not by Orbax.

    Returns:
        What tells who wrote the values.

    Raises:
        CheckpointWriteError: If something is missing from what was written.
    """
    held = held_values(layout, leaves)
    is_database = sum(leaf.nbytes for leaf in layout.leaves) < _LARGE_LEAF * len(held)
    if any(isinstance(value, FrozenLeaf) for value in held):
        is_database = False  # what is linked is a file
    may_write = may_write and not compress
    form = form_of(layout, held, is_database=is_database) if may_write else None

    def attempt(form: Form | None) -> Task:
        if frozen is not None:
            frozen.begin()
        reuse = None if form is None or is_database else form.names
        with area.staging(reuse=reuse) as directory:
            written = directory / "new"
            direct = _Direct(form, held, area.sync, frozen, earlier, written)
            task = write_tree(
                written,
                layout,
                leaves,
                None if form is None else direct.write,
                is_database=is_database,
                compress=compress,
            )
            direct.drop_old()
            is_synced = task.marks is not None and not is_database
            with Draft(written, sync=area.sync and is_synced) as draft:
                marks = task.marks
                if marks is None:
                    if frozen is not None:
                        frozen.begin()
                    may_learn = may_write or frozen is not None
                    learnt = _learn(written, layout, held) if may_learn else None
                    marks = _marks(learnt, held, frozen, earlier, draft)
                _finish(draft, written, info, _table(layout, weights, *marks))
            if area.sync and is_synced:
                sync_path(written / NEEDED[0])
            elif area.sync:
                sync_tree(written)
            if looks is not None:
                linked = frozen is not None and frozen.has_links
                way = task.marks is not None, is_database, compress, linked
                shown = area.shown(info.path)
                _look(written, shown, looks, (way, layout, placements_of(held)))
            place = _put(area, written, info.path, put)
        if frozen is not None:
            frozen.settle(place)
        return task

    try:
        task = attempt(form)
    except _IncompleteError as fault:
        if form is None:
            raise
        task = attempt(None)
        task.fault = fault
    return task


class _Direct:
    """Writes the tree of one save straight from memory, over old files if need be."""

    def __init__(
        self,
        form: Form | None,
        held: list[Any],
        sync: bool,
        frozen: Frozen | None,
        earlier: Path | None,
        written: Path,
    ) -> None:
        self._form, self._held, self._sync = form, held, sync
        self._frozen, self._earlier = frozen, earlier
        self._old = written.with_name("old")
        if written.is_dir():  # an old checkpoint, where the new one is to be
            written.rename(self._old)

    def drop_old(self) -> None:
        shutil.rmtree(self._old, ignore_errors=True)

    def write(self, directory: Path) -> Marks:
        """Write into the directory of the tree, which is empty."""
        form, whole = self._form, directory.parent
        assert form is not None
        if self._old.is_dir():
            (self._old / STATE).rename(directory)
        with Draft(whole, sync=self._sync and not form.is_database) as draft:
            _adopt(form, self._frozen, self._earlier)
            marks = form.write(draft, whole, self._held, self._frozen)
            draft.finish()
        return marks


def _learn(written: Path, layout: Layout, held: list[Any]) -> Form | None:
    values = unpacked(held)
    form = recognized(written, layout, values)
    if form is not None:
        FORMS.appendleft((layout, placements_of(values), form))
    return form


def _marks(
    form: Form | None,
    held: list[Any],
    frozen: Frozen | None,
    earlier: Path | None,
    draft: Draft,
) -> Marks:
    """Return digests and checksums of what Orbax has written; link what is frozen."""
    values = thawed(held)
    if form is None:
        return digests(values), []
    marks = form.marks(values)
    if frozen is not None:
        _adopt(form, frozen, earlier)
        form.link(draft, held, *marks, frozen)
    return marks


def _put(
    area: Area, written: Path, path: Path, put: Callable[[Path, Path], Path] | None
) -> Path:
    if put is not None:
        return put(written, path)
    area.put(written, path)
    return path


def learn_form(
    directory: Path,
    layout: Layout,
    leaves: list[Any],
    exchanged: Callable[[dict[str, str]], dict[str, str]] | None,
) -> None:
    """Have Orbax write a tree of several processes, only to learn the form.

    Every process must call this, on its main thread: Orbax makes the processes wait for
    each other.

    Args:
        directory: The directory to write to; empty, with one name in all processes.
        layout: The tree's layout.
        leaves: Its leaves; PRNG keys as their data.
        exchanged: Takes the texts of this process's small files by their names, and
            returns the small files of all processes. None if all processes share
            `directory`.

    Raises:
        CheckpointError: If Orbax writes in a way that is not known here.
    """
    # Orbax takes an array that is whole in every process only from the host.
    values = [
        np.asarray(leaf)
        if isinstance(leaf, jax.Array) and not is_shared(leaf)
        else leaf
        for leaf in leaves
    ]
    keyed = list(map(with_key, layout.leaves, values))
    held = held_values(layout, leaves)
    context = orbax_context(is_database=False)
    if exchanged is not None:
        context.multiprocessing.primary_host = None
        context.array.saving.use_replica_parallel = False  # it needs one directory
    with own_number(), quiet(), context:
        ocp.save(directory, layout.fill_for_orbax(keyed))
    if exchanged is not None:
        for name, content in exchanged(_small_files(directory)).items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    form = recognized(directory, layout, held, leads=is_leader())
    if form is None:
        raise CheckpointError(
            "Orbax stores this tree in a way that several processes of flaxckpt do not "
            "know: with shards of unequal sizes, or as an unknown version of it. Save "
            "with Orbax here."
        )
    FORMS.appendleft((layout, placements_of(held), form))


def _small_files(directory: Path) -> dict[str, str]:
    """Read as text all that Orbax has written, less the arrays' values."""

    def holds_values(path: Path) -> bool:
        above = path.relative_to(directory).parents
        is_in_array = any((directory / each / "zarr.json").exists() for each in above)
        return is_in_array and path.name != "zarr.json"

    files = [path for path in directory.rglob("*") if path.is_file()]
    return {
        path.relative_to(directory).as_posix(): path.read_text()
        for path in files
        if not holds_values(path)
    }


def write_share(
    directory: Path, layout: Layout, leaves: list[Any], *, sync: bool
) -> list[Share]:
    """Write this process's share of a checkpoint that process 0 begins and finishes.

    Args:
        directory: Where to write the share.
        layout: The tree's layout, whose form is known.
        leaves: Its leaves.
        sync: Whether to wait for the disk.

    Returns:
        What was written, for `write_together` in process 0.
    """
    form, held = known_form(layout, leaves)
    with Draft(directory, sync=sync) as draft:
        share = form.write_share(draft, held, leads=False)
        draft.finish()
    return share


def write_together(
    info: CheckpointInfo,
    area: Area,
    layout: Layout,
    leaves: list[Any],
    weights: Skeleton,
    meet: Callable[[Path, Callable[[], list[Share]]], list[list[Share]]],
    looks: Looks | None = None,
    put: Callable[[Path, Path], Path] | None = None,
) -> None:
    """Write a checkpoint as `write_checkpoint` does, with the other processes' shares.

    Only process 0 calls this.

    Args:
        info: The checkpoint's record.
        area: Where its series is written; open.
        layout: The tree's layout, whose form is known.
        leaves: Its leaves.
        weights: Where in `layout` the weights are.
        meet: Tells the other processes the directory, calls the function that writes
            this process's share, and returns all shares.
        looks: As for `write_checkpoint`.
        put: As for `write_checkpoint`.

    Raises:
        CheckpointWriteError: As `write_checkpoint` does.
    """
    form, held = known_form(layout, leaves)
    with area.staging(reuse=form.names | OURS) as directory:
        written = directory / "new"
        with Draft(written, sync=area.sync) as draft:
            form.begin(draft, held)
            share = functools.partial(form.write_share, draft, held, leads=True)
            found, sums = form.joined(meet(written, share))
            _finish(draft, written, info, _table(layout, weights, found, sums))
        if looks is not None and not area.is_mirror:  # a store has the others' shares
            shown = area.shown(info.path)
            _look(written, shown, looks, ("together", layout, placements_of(held)))
        _put(area, written, info.path, put)


def _look(written: Path, shown: Path, looks: Looks, what: tuple[Any, ...]) -> None:
    """Check that a checkpoint is complete, unless one written alike was checked before.

    Reads values only of leaves whose files do not tell, as a restore would.

    Raises:
        CheckpointWriteError: If it is not.
    """
    above = written.parents[1]  # the directory that has the staging directory
    there = os.stat(above)
    # Another directory may have the inode of a deleted one, or its name.
    what = (str(above), there.st_dev, there.st_ino, *what)
    if not looks.is_new(*what):
        return
    missing = [name for name in NEEDED if not (written / name).is_file()]
    doubtful: dict[int, Leaf] = {}
    try:
        layout, _ = read_table(written)
        if read_record(written) is None or layout is None:
            raise CheckpointCorruptError(str(written), f"{RECORD_FILE} is missing")
        reader, turn = Reader(written), time.perf_counter()
        reader.expect(leaf for leaf in layout.leaves if leaf.in_orbax)
        for index, leaf in enumerate(layout.leaves):
            turn = give_way(turn)
            if leaf.in_orbax and not reader.holds(leaf):
                doubtful[index] = leaf
        if doubtful and are_several():  # all processes would have to read
            raise CheckpointCorruptError(str(written), "files are missing")
        for batch in batches(layout.leaves) if doubtful else ():
            wanted = {i: on_host(doubtful[i]) for i in batch if i in doubtful}
            read(written, layout, wanted, check=True)
        problem = f"{', '.join(missing)} is missing" if missing else ""
    except CheckpointCorruptError as error:
        names = [leaf.name for leaf in doubtful.values()]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        problem = f"{', '.join(names[:3])}{more}: {error.problem}".removeprefix(": ")
    if problem:
        raise _IncompleteError(
            str(shown), f"what was written is not all there ({problem})"
        )
    looks.note(*what)


def _finish(draft: Draft, written: Path, info: CheckpointInfo, table: bytes) -> None:
    """Write the table of leaves and the record, and finish the draft."""
    if not (written / STATE / "manifest.ocdbt").exists():
        draft.write(ZARR_MARK, [])
    draft.write(LEAVES_FILE, [table])
    draft.write(RECORD_FILE, [encode_record(info, versions(), table)])
    draft.finish()


def _table(
    layout: Layout,
    weights: Skeleton,
    found: list[str],
    sums: Sequence[Sequence[str]],
) -> bytes:
    """Return the table of leaves as JSON; cache all but digests and checksums."""
    texts = [text for k, w, text in tuple(_TABLES) if k == layout and w == weights]
    if not texts:
        fields = {"format": FORMAT, **layout.to_json()}
        fields["weights"] = "all" if weights == layout.skeleton else weights
        texts.append(json.dumps(fields))
        _TABLES.appendleft((layout, weights, texts[0]))
    new = json.dumps({"digests": found, "sums": sums} if sums else {"digests": found})
    return f"{texts[0][:-1]}, {new[1:]}".encode()


_TABLES: deque[tuple[Layout, Skeleton, str]] = deque(maxlen=8)


def _adopt(form: Form, frozen: Frozen | None, earlier: Path | None) -> None:
    """Find leaves of an earlier checkpoint to link, if no stored leaf is known yet."""
    if frozen is None or earlier is None or not frozen.is_new:
        return
    try:
        form.adopt(earlier, Layout.from_json(read_leaves(earlier)).leaves, frozen)
    except (CheckpointError, OSError, ValueError, KeyError, TypeError):
        pass  # nothing is linked, and the leaves are written again
