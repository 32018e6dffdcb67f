"""Loads a checkpoint's tree, or a part of it, in the form of a wanted tree."""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np

from flaxckpt._checkpoints.foreign import foreign_tree
from flaxckpt._checkpoints.read import Sums, check_table, read
from flaxckpt._disk.info import LoadReport
from flaxckpt._files.foreign_tree import ForeignTree
from flaxckpt._object_store.source import Place
from flaxckpt._orbax.engine import with_key
from flaxckpt._orbax.foreign import naming_items
from flaxckpt._processes.messages import process_count, process_index
from flaxckpt._runtime.failures import in_one_line, listed
from flaxckpt._runtime.frames import outside
from flaxckpt._trees.convert import convert, put_on_shardings
from flaxckpt._trees.layout import Layout, OverfullError
from flaxckpt._trees.leaf import Leaf, without_keys
from flaxckpt._trees.match import Match, Twin, difference_of_twins, match
from flaxckpt._trees.per_process import decoded
from flaxckpt._trees.placing import is_placement
from flaxckpt._trees.selection import Rename, Select, renamed, selected
from flaxckpt._trees.skeleton import Skeleton
from flaxckpt._trees.stateful import KIND, is_stateful, put_state
from flaxckpt._trees.ties import PyTree, flatten
from flaxckpt._trees.wanted import Wanted, completed
from flaxckpt.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    LeafDifference,
)

_SHOWN = 8  # leaves that a warning lists


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a tree is loaded; see `load`."""

    cast: bool = False
    verify: bool = True
    partial: bool = False
    select: Select | None = None
    rename: Rename | None = None


# For each wanted leaf the index of its stored leaf, if any, and what it becomes.
Plan: TypeAlias = Sequence[tuple[int | None, Wanted]]


def load_tree(
    place: Place,
    layout: Layout | None,
    part: Skeleton | Callable[[Layout], Skeleton],
    like: PyTree,
    sums: Sums,
    options: Options,
) -> tuple[PyTree, LoadReport]:
    """Load a checkpoint's tree, or a part of it; see `load` for `like`.

    The layout is None if another library wrote the checkpoint: `foreign_tree` finds it.
    The part is a skeleton, a function that finds it in the layout, or None for the
    whole tree.
    """
    path = place.path
    foreign: ForeignTree | None = None
    if layout is None:
        foreign = foreign_tree(path, like, weights_only=callable(part))
        layout = foreign.layout
    if callable(part):
        part = part(layout)
    try:
        view, sources = _view(
            layout, layout.skeleton if part is None else part, options
        )
        if view.nbytes > layout.most_bytes:  # the weights may name a leaf many times
            raise OverfullError("its weights are its arrays too many times")
        like = completed(like, view)
    except OverfullError as error:
        raise CheckpointCorruptError(str(path), str(error)) from error
    try:
        matched = match(
            str(path), view, like, cast=options.cast, partial=options.partial
        )
    except CheckpointMismatchError as error:
        if foreign is None:
            # The difference may come from a wrong table of leaves.
            check_table(place, layout, layout.as_stored.leaves)
        raise naming_items(path, error) from None
    plan, twins = matched.plan, matched.twins
    flat = flatten(like)
    given = None if like is None else flat.leaves
    _warn_of_functions(path, view, plan, given)
    asked = [(i if i is None else sources[i], want) for i, want in plan]
    asked += [(sources[twin.index], plan[twin.position][1]) for twin in twins]
    with jax.ensure_compile_time_eval():  # within a trace, the leaves are no tracers
        if foreign is None:
            stored = read_each(place, layout, asked, sums, check=options.verify)
        else:
            stored = [None if i is None else foreign.read(i, want) for i, want in asked]
        leaves = _converted(path, view, plan, stored, given, cast=options.cast)
        _check_twins(path, view, plan, twins, stored)
    if like is not None:
        _put_states(path, plan, flat.leaves, leaves)
        return flat.rebuilt(leaves), _report(view, matched)
    try:
        return view.fill(leaves, layout.most_bytes), _report(view, matched)
    except OverfullError as error:
        raise CheckpointCorruptError(str(path), str(error)) from error


def _view(layout: Layout, part: Skeleton, options: Options) -> tuple[Layout, list[int]]:
    """Return the layout of what is to be loaded, and where in `layout` its leaves are.

    Raises:
        SettingError: If the options name what is not stored.
        OverfullError: If the tree is far larger than what is stored.
    """
    view, sources = layout.part(part)
    if options.select is not None:
        view, chosen = view.part(selected(view, options.select))
        sources = [sources[index] for index in chosen]
    if options.rename is not None:
        view, chosen = view.part(renamed(view, options.rename))
        sources = [sources[index] for index in chosen]
    return view, sources


def _report(view: Layout, matched: Match) -> LoadReport:
    """Tell what became of the leaves."""
    loaded = [want.leaf.name for index, want in matched.plan if index is not None]
    return LoadReport(
        loaded=tuple(loaded),
        kept=tuple(matched.kept),
        passed_over=tuple(view.leaves[index].name for index in matched.unused),
    )


def _converted(
    path: Path,
    view: Layout,
    plan: Plan,
    stored: Sequence[Any],
    given: Sequence[Any] | None,
    *,
    cast: bool,
) -> list[Any]:
    """Return the leaves of the loaded tree.

    Args:
        path: The checkpoint.
        view: The layout of what is loaded.
        plan: What is wanted.
        stored: The values that were read, in the order of the plan.
        given: The leaves of `like`; None without a `like`.
        cast: Whether to convert arrays of another dtype.
    """
    leaves = [None] * len(plan) if given is None else list(given)
    for position, (index, want) in enumerate(plan):
        if index is None:
            if is_placement(leaves[position]):
                leaves[position] = None
            continue
        have = view.leaves[index]
        try:
            leaves[position] = convert(stored[position], have, want, cast=cast)
        except (ValueError, TypeError, OverflowError) as error:
            if given is None or isinstance(error, UnicodeError):
                raise CheckpointCorruptError(
                    str(path), f"{have.name} is no {have} ({in_one_line(error)})"
                ) from error
            raise CheckpointMismatchError(
                str(path),
                [LeafDifference(have.name, str(have), str(want.leaf))],
                f"{error}. Pass a `like` of the stored kind.",
            ) from error
    wanted = {at: want for at, (index, want) in enumerate(plan) if index is not None}
    put_on_shardings(leaves, wanted)
    return leaves


def _put_states(
    path: Path, plan: Plan, given: Sequence[Any], leaves: list[Any]
) -> None:
    """Put loaded states into the objects of `like`, which are leaves of the result.

    Raises:
        CheckpointError: If an object does not take its state.
    """
    for position, (index, want) in enumerate(plan):
        value = given[position]
        if index is None or want.leaf.kind != KIND or not is_stateful(value):
            continue
        try:
            put_state(value, leaves[position])
        except Exception as error:
            raise CheckpointError(
                f"Checkpoint {str(path)!r}: the {type(value).__qualname__} at "
                f"{want.leaf.name} did not take the state that was saved: "
                f"{in_one_line(error)}"
            ) from error
        leaves[position] = value


def _check_twins(
    path: Path, view: Layout, plan: Plan, twins: Sequence[Twin], stored: Sequence[Any]
) -> None:
    """Check that what `like` shares was stored with equal values.

    Raises:
        CheckpointMismatchError: If it was not; names the leaves.
    """
    differing = [
        difference_of_twins(
            view.leaves[plan[twin.position][0] or 0], view.leaves[twin.index]
        )
        for twin, other in zip(twins, stored[len(plan) :], strict=True)
        if not _are_same(stored[twin.position], other)
    ]
    if differing:
        raise CheckpointMismatchError(
            str(path),
            differing,
            "What `like` shares between several places was stored as several values. "
            "Pass a `like` that shares nothing there, or none.",
        )


def read_each(
    place: Place, layout: Layout, asked: Plan, sums: Sums, *, check: bool
) -> list[Any]:
    """Read each leaf once for each place, so that each place has an array to donate."""
    rounds: list[dict[int, int]] = []
    times: Counter[int] = Counter()
    for position, (index, _) in enumerate(asked):
        if index is not None:
            if times[index] == len(rounds):
                rounds.append({})
            rounds[times[index]][index] = position
            times[index] += 1
    results: list[Any] = [None] * len(asked)
    for positions in rounds or [{}]:
        wanted = {index: asked[position][1] for index, position in positions.items()}
        values = read(place, layout, wanted, sums, check=check)
        for index, position in positions.items():
            results[position] = values[index]
    rows = {at: layout.leaves[i] for at, (i, _) in enumerate(asked) if i is not None}
    rows = {at: leaf for at, leaf in rows.items() if leaf.rows}
    if rows:
        _check_count(place.path, list(rows.values()))
    for at, leaf in rows.items():
        results[at] = _own(place.path, leaf, results[at])
    return results


def _check_count(path: Path, leaves: list[Leaf]) -> None:
    """Check that there are as many processes as have saved their own values.

    Raises:
        CheckpointError: If there are several, but another number. One process gets the
            values of process 0, with a warning.
    """
    number, names = leaves[0].rows[0], listed([leaf.name for leaf in leaves])
    if process_count() == number:
        return
    told = (
        f"Checkpoint {str(path)!r} has values that {number} processes had for "
        f"themselves: {names}."
    )
    if process_count() > 1:
        raise CheckpointError(
            f"{told} This is one of {process_count()} processes, which cannot tell "
            f"whose to take. Restore with {number} processes."
        )
    warnings.warn(
        f"{told} This one process gets those of process 0.", stacklevel=outside()
    )


def _own(path: Path, leaf: Leaf, rows: Any) -> Any:
    """Return this process's value of a leaf that each has for itself."""
    try:
        value = decoded(leaf, np.asarray(rows), process_index())
    except (ValueError, UnicodeError) as error:
        raise CheckpointCorruptError(
            str(path), f"{leaf.name} is no {leaf} ({in_one_line(error)})"
        ) from error
    if leaf.kind != "key":
        return value
    return with_key(leaf, value)


def _are_same(one: Any, other: Any) -> bool:
    """Tell whether two leaves are equal, bit for bit, in this process's shards."""

    def parts(value: Any) -> list[bytes]:
        value = without_keys(value)
        if not isinstance(value, jax.Array):
            return [np.asarray(value).tobytes()]
        return [np.asarray(shard.data).tobytes() for shard in value.addressable_shards]

    return parts(one) == parts(other)


def _warn_of_functions(
    path: Path, layout: Layout, plan: Plan, given: Sequence[Any] | None
) -> None:
    """Warn of functions that are None in the loaded tree.

    Args:
        path: The checkpoint.
        layout: What is stored.
        plan: What is wanted, in the order of `given`.
        given: The leaves of `like`, some of which may be shardings in place of values;
            None without a `like`.
    """
    names = [leaf.name for leaf in layout.leaves if leaf.kind == "function"]
    if given is not None:
        placed = {
            want.leaf.name
            for (index, want), leaf in zip(plan, given, strict=True)
            if index is None and is_placement(leaf)
        }
        names = [name for name in names if name in placed]
    if names:
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        warnings.warn(
            f"Checkpoint {str(path)!r} holds no functions, and the saved tree had "
            f"{len(names)}: {shown}. The loaded tree has None there. Pass a `like` "
            "that has the functions.",
            stacklevel=outside(),
        )
