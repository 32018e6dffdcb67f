"""Writes one checkpoint: tree, table of leaves and record. Checks it the first time."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from flaxckpt._checkpoints.finish import Tables, finish
from flaxckpt._checkpoints.looks import IncompleteError, Looks, shared_looks
from flaxckpt._direct.form import Fingerprints, Form
from flaxckpt._direct.forms import (
    Forms,
    held_values,
    placements_of,
    shared_forms,
    thawed,
)
from flaxckpt._direct.frozen_files import Frozen, FrozenLeaf, adopt_frozen, link_frozen
from flaxckpt._direct.write import fingerprints_of, write_values
from flaxckpt._direct.zarr import STATE
from flaxckpt._disk.area import Area
from flaxckpt._disk.files import Draft, sync_path, sync_tree
from flaxckpt._disk.info import CheckpointInfo
from flaxckpt._orbax.engine import unpacked, write_tree
from flaxckpt._orbax.files import OURS
from flaxckpt._orbax.state_handler import Task
from flaxckpt._trees.digest import digests
from flaxckpt._trees.layout import Layout
from flaxckpt._trees.skeleton import Skeleton

# If the leaves have this mean size in bytes, files are better than one database.
_LARGE_LEAF = 2**20

# Puts a written directory into its own or another place, and returns the place.
Commit: TypeAlias = Callable[[Path, Path], Path]


@dataclass(frozen=True)
class Checkpoint:
    """What is written.

    Attributes:
        info: The record.
        layout: The tree's layout.
        leaves: Its leaves, in forms that Orbax stores. Frozen leaves come as
            `FrozenLeaf`.
        weights: Where in `layout` the weights are.
    """

    info: CheckpointInfo
    layout: Layout
    leaves: list[Any]
    weights: Skeleton


@dataclass
class Way:
    """How the checkpoints of a series are written, and what is remembered of that.

    Attributes:
        area: Where the series is written.
        compress: Whether to compress the arrays.
        frozen: Where frozen leaves are stored; None if no leaf is frozen.
        writes_directly: Whether flaxckpt may write values straight from memory.
        divides_replicas: Whether several processes may write parts of replicas each.
        forms: The forms in which Orbax has written trees.
        tables: The tables of leaves.
        looks: The kinds of checkpoints that were checked before.
    """

    area: Area
    compress: bool = False
    frozen: Frozen | None = None
    writes_directly: bool = True
    divides_replicas: bool = True
    forms: Forms = field(default_factory=shared_forms)
    tables: Tables = field(default_factory=Tables)
    looks: Looks = field(default_factory=shared_looks)

    def commit(self, written: Path, path: Path) -> Path:
        """Put a written directory in its place, and return the place."""
        self.area.commit(written, path)
        return path


def write_checkpoint(
    checkpoint: Checkpoint,
    way: Way,
    *,
    earlier: Path | None = None,
    commit: Commit | None = None,
) -> Task:
    """Write a checkpoint and put it in its place, replacing one that is there.

    Blocks until the new checkpoint is there and, if the area syncs, on disk. Until then
    the old checkpoint stays in its place.

    Args:
        checkpoint: What to write.
        way: How to write it; the area is open.
        earlier: A checkpoint that may hold frozen leaves, looked into if `way.frozen`
            knows no stored leaf.
        commit: Puts the written directory in its place; None for `way.commit`.

    Returns:
        The task, which tells whether flaxckpt or Orbax wrote the values.

    Raises:
        CheckpointWriteError: If something is missing from what was written.
    """
    layout, held = checkpoint.layout, held_values(checkpoint.layout, checkpoint.leaves)
    is_database = sum(leaf.nbytes for leaf in layout.leaves) < _LARGE_LEAF * len(held)
    if any(isinstance(value, FrozenLeaf) for value in held):
        is_database = False  # what is linked is a file
    form = None
    if way.writes_directly and not way.compress:
        form = way.forms.find(layout, held, is_database=is_database)
    save = _Save(checkpoint, way, held, is_database, earlier, commit or way.commit)
    try:
        return save.write(form)
    except IncompleteError as fault:
        if form is None:
            raise
        task = save.write(None, again=True)
        task.fault = fault.with_traceback(None)  # the frames hold the tree
    return task


@dataclass(frozen=True)
class _Save:
    """One save, with what `write_checkpoint` describes.

    Attributes:
        held: The leaves that Orbax stores.
        is_database: Whether the arrays go into a database.
    """

    checkpoint: Checkpoint
    way: Way
    held: list[Any]
    is_database: bool
    earlier: Path | None
    commit: Commit

    def write(self, form: Form | None, *, again: bool = False) -> Task:
        """Write the checkpoint; in a form, if there is one, and else by Orbax.

        Args:
            form: The form.
            again: Whether a first try was incomplete; this one is looked at, too.
        """
        path, frozen = self.checkpoint.info.path, self.way.frozen
        if frozen is not None:
            frozen.begin()
        reuse = None if form is None or self.is_database else form.names
        with self.way.area.staging(reuse=reuse) as directory:
            written = directory / "new"
            task = self._write_tree(written, form)
            self._finish(written, task)
            self._look(written, task, again=again)
            place = self.commit(written, path)
        if frozen is not None:
            frozen.settle(place)
        return task

    def _write_tree(self, written: Path, form: Form | None) -> Task:
        """Have Orbax write the tree, over an old checkpoint's files if need be."""
        old = written.with_name("old")
        if written.is_dir():  # an old checkpoint, where the new one is to be
            shutil.rmtree(old, ignore_errors=True)
            if old.exists():  # somebody reads it, on a network's file system
                shutil.rmtree(written)
            else:
                written.rename(old)

        def write(state: Path) -> Fingerprints:
            """Write into the directory of the tree, which is empty."""
            assert form is not None
            if (old / STATE).is_dir():
                (old / STATE).rename(state)
            return self._write_values(form, state.parent)

        task = write_tree(
            written,
            self.checkpoint.layout,
            self.checkpoint.leaves,
            None if form is None else write,
            is_database=self.is_database,
            compress=self.way.compress,
        )
        shutil.rmtree(old, ignore_errors=True)
        return task

    def _write_values(self, form: Form, whole: Path) -> Fingerprints:
        frozen = self.way.frozen
        with Draft(whole, sync=self.way.area.sync and not form.is_database) as draft:
            if frozen is not None and self.earlier is not None:
                adopt_frozen(form, self.earlier, frozen)
            fingerprints = write_values(form, draft, whole, self.held, frozen)
            draft.finish()
        return fingerprints

    def _finish(self, written: Path, task: Task) -> None:
        """Write the table of leaves and the record, and sync what is not synced."""
        way, what = self.way, self.checkpoint
        is_synced = task.is_direct and not self.is_database
        with Draft(written, sync=way.area.sync and is_synced) as draft:
            fingerprints = task.fingerprints or self._fingerprinted(written, draft)
            table = way.tables.table(what.layout, what.weights, fingerprints)
            finish(draft, written, what.info, table)
        if way.area.sync and is_synced:
            for file in written.iterdir():  # Orbax's own files
                if file.is_file() and file.name not in OURS:
                    sync_path(file)
        elif way.area.sync:
            sync_tree(written)

    def _fingerprinted(self, written: Path, draft: Draft) -> Fingerprints:
        """Return the fingerprints of what Orbax has written; link what is frozen."""
        way, frozen, values = self.way, self.way.frozen, thawed(self.held)
        form = None
        if frozen is not None:
            frozen.begin()
        if frozen is not None or (way.writes_directly and not way.compress):
            form = way.forms.learn(written, self.checkpoint.layout, unpacked(self.held))
        if form is None:
            return digests(values), []
        prints = fingerprints_of(form, values)
        if frozen is not None:
            if self.earlier is not None:
                adopt_frozen(form, self.earlier, frozen)
            link_frozen(form, draft, self.held, prints, frozen)
        return prints

    def _look(self, written: Path, task: Task, *, again: bool) -> None:
        way, frozen = self.way, self.way.frozen
        linked = frozen is not None and frozen.has_links
        kind = task.is_direct, self.is_database, way.compress, linked
        shown = way.area.shown(self.checkpoint.info.path)
        what = kind, self.checkpoint.layout, placements_of(self.held)
        way.looks.check(written, shown, *what, again=again)
