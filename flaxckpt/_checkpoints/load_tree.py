"""Loads a checkpoint's tree, or a part of it, in the form of a wanted tree."""

import contextlib
import os
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
from flaxckpt._disk.info import CheckpointInfo, LoadReport
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
from flaxckpt._trees.renaming import Rename, renamed
from flaxckpt._trees.selection import Select, selected
from flaxckpt._trees.skeleton import Skeleton
from flaxckpt._trees.stateful import STATEFUL, is_stateful, kept_state, put_state
from flaxckpt._trees.ties import PyTree, flatten
from flaxckpt._trees.wanted import Wanted, completed
from flaxckpt.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    LeafDifference,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a tree is loaded; see `load`."""

    cast: bool = False
    verify: bool = True
    partial: bool = False
    select: Select | None = None
    rename: Rename | None = None

    @property
    def in_part(self) -> bool:
        """Whether leaves may be stored that are not loaded."""
        return self.partial or self.select is not None


# For each wanted leaf the index of its stored leaf, if any, and what it becomes.
Plan: TypeAlias = Sequence[tuple[int | None, Wanted]]


@dataclass(frozen=True)
class Read:
    """What was read, in the form of a wanted tree.

    Attributes:
        tree: The tree.
        report: What became of the leaves.
        states: The name and the object of each leaf of the tree that has a state, and
            the state to put into it; see `put_states`.
        info: The checkpoint's record; None if flaxckpt did not write it.
    """

    tree: PyTree
    report: LoadReport
    states: Sequence[tuple[str, Any, Any]]
    info: CheckpointInfo | None = None


def load_tree(
    place: Place,
    layout: Layout | None,
    part: Skeleton | Callable[[Layout], Skeleton],
    likes: Sequence[PyTree],
    sums: Sums,
    options: Options,
) -> Read:
    """Load a checkpoint's tree, or a part of it; see `load` for the wanted tree.

    Args:
        place: The checkpoint.
        layout: Its layout; None if another library wrote it: `foreign_tree` finds it.
        part: A skeleton, a function that finds it in the layout, or None for the whole
            tree.
        likes: Wanted trees: the first one counts that what is stored fits; or for a
            partial load the one with the most stored leaves, and of several the last.
        sums: Gets the arrays of several processes.
        options: How to load.
    """
    path = place.path
    foreign: ForeignTree | None = None
    if layout is None:
        foreign = foreign_tree(
            path, likes[0], weights_only=callable(part), in_part=options.in_part
        )
        layout = foreign.layout
    if callable(part):
        part = part(layout)
    try:
        view, sources = _view(
            layout, layout.skeleton if part is None else part, options
        )
        if likes[0] is None and view.nbytes > layout.most_bytes:
            raise OverfullError("its tree has its arrays in too many places")
        wanted = [completed(like, view) for like in likes]
    except OverfullError as error:
        raise CheckpointCorruptError(str(path), str(error)) from error
    try:
        like, matched = _matched(path, view, wanted, options)
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
            foreign.expect({i for i, _ in asked if i is not None})
            stored = [None if i is None else foreign.read(i, want) for i, want in asked]
        leaves = _converted(path, view, plan, stored, given, cast=options.cast)
        _check_twins(path, view, plan, twins, stored)
    report = _report(view, matched)
    if like is not None:
        states = _states_of(plan, flat.leaves, leaves)
        return Read(flat.rebuilt(leaves), report, states)
    try:
        return Read(view.fill(leaves, layout.most_bytes), report, ())
    except OverfullError as error:
        raise CheckpointCorruptError(str(path), str(error)) from error


def _matched(
    path: Path, view: Layout, likes: Sequence[PyTree], options: Options
) -> tuple[PyTree, Match]:
    """Match what is stored with the wanted tree that it fits; see `load_tree`.

    Raises:
        CheckpointMismatchError: If it fits none: the error of the last.
    """
    found: list[tuple[PyTree, Match]] = []
    for number, like in enumerate(likes, 1):
        try:
            matched = match(
                str(path), view, like, cast=options.cast, partial=options.partial
            )
        except CheckpointMismatchError:
            if number == len(likes) and not found:
                raise
            continue
        if not options.partial:
            return like, matched
        found.append((like, matched))

    def number_loaded(each: tuple[PyTree, Match]) -> int:
        return sum(index is not None for index, _ in each[1].plan)

    return max(reversed(found), key=number_loaded)


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
            is_damage = isinstance(error, UnicodeError) or have.kind == STATEFUL
            if given is None or is_damage:
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


def _states_of(
    plan: Plan, given: Sequence[Any], leaves: list[Any]
) -> list[tuple[str, Any, Any]]:
    """Return what to put into the objects of `like`, which become the leaves."""
    states: list[tuple[str, Any, Any]] = []
    for position, (index, want) in enumerate(plan):
        value = given[position]
        if index is not None and want.leaf.kind == STATEFUL and is_stateful(value):
            states.append((want.leaf.name, value, leaves[position]))
            leaves[position] = value
    return states


def put_states(path: str | os.PathLike[str], read: Read) -> None:
    """Put the states that were read into their objects: into all of them, or none.

    Raises:
        CheckpointError: If an object does not take its state.
    """
    before: list[tuple[Any, Any]] = []
    for name, value, state in read.states:
        try:
            before.append((value, kept_state(value)))
            put_state(value, state)
        except Exception as error:
            for other, old in before:
                with contextlib.suppress(Exception):
                    put_state(other, old)
            raise CheckpointError(
                f"Checkpoint {os.fspath(path)!r}: the {type(value).__qualname__} at "
                f"{name} did not take the state that was saved: {in_one_line(error)}"
            ) from error


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
            f"whose to take. Restore with {number} processes, or leave these values "
            "out of like and pass partial=True."
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
        warnings.warn(
            f"Checkpoint {str(path)!r} holds no functions, and the saved tree had "
            f"{len(names)}: {listed(names)}. The loaded tree has None there. Pass a "
            "`like` that has the functions.",
            stacklevel=outside(),
        )
