"""Writes one checkpoint by several processes: process 0 leads, each writes a share."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np

from flaxckpt._checkpoints.finish import finish
from flaxckpt._checkpoints.write import Checkpoint, Commit, Way
from flaxckpt._direct.form import Form
from flaxckpt._direct.forms import Forms, held_values, placements_of
from flaxckpt._direct.shares import Share, begin_shares, joined, write_own
from flaxckpt._disk.files import Draft
from flaxckpt._orbax.engine import calls_of_orbax, ocp, orbax_context, with_key
from flaxckpt._orbax.files import OURS
from flaxckpt._processes.messages import is_leader
from flaxckpt._trees.layout import Layout
from flaxckpt._trees.owned_shards import is_shared
from flaxckpt.errors import CheckpointError

# Tells the other processes the directory, calls the function that writes this process's
# share, and returns all shares.
Together: TypeAlias = Callable[[Path, Callable[[], list[Share]]], list[list[Share]]]


def learn_form(
    forms: Forms,
    directory: Path,
    layout: Layout,
    leaves: list[Any],
    exchanged: Callable[[dict[str, str]], dict[str, str]] | None,
) -> None:
    """Have Orbax write a tree of several processes, only to learn the form.

    Every process must call this, on its main thread: Orbax makes the processes wait for
    each other.

    Args:
        forms: Remembers the form.
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
    with calls_of_orbax(context):
        ocp.save(directory, layout.fill_for_orbax(keyed))
    if exchanged is not None:
        for name, content in exchanged(_small_files(directory)).items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    if forms.learn(directory, layout, held, leads=is_leader()) is None:
        raise CheckpointError(
            "Orbax stores this tree in a way that several processes of flaxckpt do not "
            "know: with shards of unequal sizes, or as an unknown version of it. Save "
            "with Orbax here."
        )


def _small_files(directory: Path) -> dict[str, str]:
    """Read as text all that Orbax has written, less the arrays' values."""

    def holds_values(path: Path) -> bool:
        above = path.relative_to(directory).parents
        is_in_array = any((directory / name / "zarr.json").exists() for name in above)
        return is_in_array and path.name != "zarr.json"

    files = [path for path in directory.rglob("*") if path.is_file()]
    return {
        path.relative_to(directory).as_posix(): path.read_text()
        for path in files
        if not holds_values(path)
    }


def write_share(
    forms: Forms, directory: Path, layout: Layout, leaves: list[Any], *, sync: bool
) -> list[Share]:
    """Write this process's share of a checkpoint that process 0 begins and finishes.

    Args:
        forms: The known forms. The form of the tree is one of them.
        directory: Where to write the share.
        layout: The tree's layout.
        leaves: Its leaves.
        sync: Whether to wait for the disk.

    Returns:
        What was written, for `write_together` in process 0.
    """
    form, held = _known_form(forms, layout, leaves)
    with Draft(directory, sync=sync) as draft:
        share = write_own(form, draft, held, leads=False)
        draft.finish()
    return share


def write_together(
    checkpoint: Checkpoint, way: Way, together: Together, commit: Commit | None = None
) -> None:
    """Write a checkpoint as `write_checkpoint` does, with the other processes' shares.

    Only process 0 calls this.

    Args:
        checkpoint: What to write; the form of its tree is known.
        way: How to write it; the area is open.
        together: Has all processes write their shares.
        commit: As for `write_checkpoint`.

    Raises:
        CheckpointWriteError: As `write_checkpoint` does.
    """
    info, layout, area = checkpoint.info, checkpoint.layout, way.area
    form, held = _known_form(way.forms, layout, checkpoint.leaves)
    with area.staging(reuse=form.names | OURS) as directory:
        written = directory / "new"
        with Draft(written, sync=area.sync) as draft:
            begin_shares(form, draft, held)
            share = functools.partial(write_own, form, draft, held, leads=True)
            fingerprints = joined(form, together(written, share))
            table = way.tables.table(layout, checkpoint.weights, fingerprints)
            finish(draft, written, info, table)
        if not area.is_mirror:  # a store has the others' shares
            kind = "together", layout, placements_of(held)
            way.looks.check(written, area.shown(info.path), *kind)
        (commit or way.commit)(written, info.path)


def _known_form(
    forms: Forms, layout: Layout, leaves: list[Any]
) -> tuple[Form, list[Any]]:
    held = held_values(layout, leaves)
    form = forms.find(layout, held, is_database=False)
    assert form is not None
    return form, held
