"""A checkpoint's leaves are read, and compared with their digests."""

import functools
import itertools
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxckpt._direct.read import Reader
from flaxckpt._disk.record import LEAVES_FILE, is_checkpoint, located, read_leaves
from flaxckpt._disk.vetting import check_plain
from flaxckpt._object_store.source import source_of
from flaxckpt._orbax.engine import storable, with_key
from flaxckpt._orbax.files import complete, data_files, is_database, leaf_files
from flaxckpt._orbax.restore import naming_items, read_by_orbax, read_foreign
from flaxckpt._processes.messages import are_several, gathered
from flaxckpt._runtime.failures import in_one_line, listed
from flaxckpt._runtime.frames import outside
from flaxckpt._runtime.unchecked import unchecked_pool
from flaxckpt._trees.convert import convert
from flaxckpt._trees.describe import describe
from flaxckpt._trees.digest import agree, combined, is_sum
from flaxckpt._trees.layout import Layout, OverfullError
from flaxckpt._trees.leaf import Leaf, key_dtype, without_keys
from flaxckpt._trees.match import Wanted, difference_of_twins, match, spread
from flaxckpt._trees.owned_shards import is_shared, pieces
from flaxckpt._trees.placing import is_placement
from flaxckpt._trees.skeleton import Skeleton
from flaxckpt._trees.ties import PyTree, flatten
from flaxckpt.errors import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    CheckpointPathError,
    LeafDifference,
)

_SHOWN = 8  # leaves that a warning lists
_READ_THREADS = 8
_TASK_LEAVES, _TASK_BYTES = 64, 2**20  # that a thread reads in one go, at most


def load_tree(
    path: Path,
    layout: Layout | None,
    part: Skeleton | Callable[[Layout], Skeleton],
    like: PyTree,
    *,
    cast: bool,
    check: bool,
) -> PyTree:
    """Load a checkpoint's tree, or a part of it; see `load` for `like` and `cast`.

    The layout is None if plain Orbax wrote the checkpoint. The part is a skeleton, a
    function that finds it in the layout, or None for the whole tree.
    """
    values: list[Any] | None = None
    if layout is None:
        foreign = read_foreign(path, like, weights_only=callable(part))
        layout, values = describe(foreign, storable)
    if callable(part):
        part = part(layout)
    view, sources = layout.part(layout.skeleton if part is None else part)
    try:
        if view.nbytes > layout.most_bytes:  # the weights may name a leaf many times
            raise OverfullError("its weights are its arrays too many times")
        like = spread(like, view)
    except OverfullError as error:
        raise CheckpointCorruptError(str(path), str(error)) from error
    try:
        plan, twins = match(str(path), view, like, cast=cast)
    except CheckpointMismatchError as error:
        if values is None:
            # The difference may come from a wrong table of leaves.
            _check_table(path, layout, layout.leaves)
        raise naming_items(path, error) from None
    _warn_of_functions(path, view, plan, None if like is None else flatten(like).leaves)
    asked = [(i if i is None else sources[i], want) for i, want in plan]
    asked += [(sources[twin.index], plan[twin.position][1]) for twin in twins]
    if values is None:
        found = _read_each(path, layout, asked, check=check)
    else:
        found = [None if i is None else values[i] for i, _ in asked]
    flat = flatten(like)
    given = [None] * len(plan) if like is None else list(flat.leaves)
    for position, (index, want) in enumerate(plan):
        if index is None:
            if is_placement(given[position]):
                given[position] = None
            continue
        have = view.leaves[index]
        try:
            given[position] = convert(found[position], have, want, cast=cast)
        except (ValueError, TypeError, OverflowError) as error:
            if like is None or isinstance(error, UnicodeError):
                raise CheckpointCorruptError(
                    str(path), f"{have.name} is no {have} ({in_one_line(error)})"
                ) from error
            raise CheckpointMismatchError(
                str(path),
                [LeafDifference(have.name, str(have), str(want.leaf))],
                f"{error}. Pass a `like` of the stored kind.",
            ) from error
    differing = [
        difference_of_twins(
            view.leaves[plan[twin.position][0] or 0], view.leaves[twin.index]
        )
        for twin, other in zip(twins, found[len(plan) :], strict=True)
        if not _are_same(found[twin.position], other)
    ]
    if differing:
        raise CheckpointMismatchError(
            str(path),
            differing,
            "What `like` shares between several places was stored as several values. "
            "Pass a `like` that shares nothing there, or none.",
        )
    if like is not None:
        return flat.rebuilt(given)
    try:
        return view.fill(given, layout.most_bytes)
    except OverfullError as error:
        raise CheckpointCorruptError(str(path), str(error)) from error


def _read_each(
    path: Path,
    layout: Layout,
    asked: Sequence[tuple[int | None, Wanted]],
    *,
    check: bool,
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
    found: list[Any] = [None] * len(asked)
    for each in rounds or [{}]:
        wanted = {index: asked[position][1] for index, position in each.items()}
        values = read(path, layout, wanted, check=check)
        for index, position in each.items():
            found[position] = values[index]
    return found


def _are_same(one: Any, other: Any) -> bool:
    """Tell whether two leaves are equal, bit for bit, in this process's shards."""

    def parts(value: Any) -> list[bytes]:
        value = without_keys(value)
        if not isinstance(value, jax.Array):
            return [np.asarray(value).tobytes()]
        return [np.asarray(each.data).tobytes() for each in value.addressable_shards]

    return parts(one) == parts(other)


def _warn_of_functions(
    path: Path,
    layout: Layout,
    plan: Sequence[tuple[int | None, Wanted]],
    given: Sequence[Any] | None,
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


def _check_table(path: Path, layout: Layout, leaves: Iterable[Leaf]) -> None:
    """Check that leaves are stored with the shapes and dtypes of the table of leaves.

    Orbax would return whatever it finds.

    Raises:
        CheckpointCorruptError: If some are not; names them.
    """
    if source_of(path) is not None:
        return  # a check alone fetches nothing from an object store
    check_plain(path, layout.nbytes, layout.nbytes)
    reader = _reader(path, layout)
    if reader is None:
        return
    wrong = [leaf for leaf in leaves if reader.contradicts(leaf)]
    if wrong:
        names = listed([leaf.name for leaf in wrong])
        files = listed(leaf_files(located(path), wrong))
        raise CheckpointCorruptError(
            str(path),
            f"the stored arrays do not match {LEAVES_FILE}: {names} (in one of the "
            f"files {files})",
        )


def _reader(path: Path, layout: Layout) -> Reader | None:
    """Return a checkpoint's `Reader`; None if Orbax is to try and to tell the error."""
    if is_database(path):
        check_plain(path, held=layout.nbytes)
    try:
        return Reader(located(path), source_of(path))
    except CheckpointPathError:
        raise
    except (OSError, ValueError):
        return None


def read(
    path: Path, layout: Layout, wanted: Mapping[int, Wanted], *, check: bool
) -> list[Any]:
    """Read the wanted leaves of a checkpoint, each onto its wanted sharding.

    Returns:
        A value for each leaf of the layout; None if it is not wanted.

    Raises:
        CheckpointCorruptError: If leaves cannot be read, or, with `check`, differ from
            what was saved; names the leaves and their files.
    """
    read = {i: layout.leaves[i] for i in wanted if layout.leaves[i].in_orbax}
    values, damaged, unchecked = _read_files(path, layout, read, wanted, check=check)
    others = {index: leaf for index, leaf in read.items() if index not in values}
    if others:
        _check_table(path, layout, others.values())
        by_orbax = read_by_orbax(path, layout, {i: wanted[i] for i in others})
        values |= {index: by_orbax[index] for index in others}
    if check:
        unchecked |= others
        damaged += _differing(unchecked, values)
    if damaged:
        complete(path)
        names = listed([leaf.name for leaf in damaged])
        files = listed(data_files(located(path), damaged))
        raise CheckpointCorruptError(
            str(path), f"not what was saved: {names} (in one of the files {files})"
        )
    return [values.get(index) for index in range(len(layout.leaves))]


def _read_files(
    path: Path,
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
    reader = _reader(path, layout)
    if reader is None:
        return {}, [], {}
    known = dict(leaves)
    if are_several():  # all processes must leave the same leaves to Orbax
        known = {index: leaf for index, leaf in leaves.items() if reader.knows(leaf)}

    def read(index: int) -> tuple[Any, bool | None]:
        leaf, want = known[index], wanted[index]
        place = want.sharding
        is_placed = leaf.kind == "key" or (
            leaf.kind in ("jax", "numpy") and leaf.dtype == want.leaf.dtype
        )
        if place is None or want.is_in_one_piece or not is_placed:
            return reader.read(leaf, check=check)
        return reader.read_onto(leaf, place, check=check)

    def read_all(indices: list[int]) -> list[tuple[Any, bool | None]]:
        reader.expect(known[index] for index in indices)
        return list(map(read, indices))

    # More threads than cores compete for the cache, and are no faster.
    threads = min(_READ_THREADS, os.cpu_count() or 1)
    tasks = _tasks(known)
    with unchecked_pool(threads, "flaxckpt-read") as pool:
        read_in_tasks = itertools.chain.from_iterable(pool.map(read_all, tasks))
        found = dict(zip(itertools.chain(*tasks), read_in_tasks, strict=True))
    damaged = [known[index] for index, (_, same) in found.items() if same is False]
    values = {index: value for index, (value, _) in found.items() if value is not None}
    if are_several():  # Orbax would wait for the processes that could read these
        damaged += [leaf for index, leaf in known.items() if index not in values]
        values = dict.fromkeys(known) | values
    unchecked = {i: known[i] for i, (_, same) in found.items() if same is None}
    for index in values:
        if known[index].kind == "key" and values[index] is not None:
            values[index] = _as_key(known[index], values[index], wanted[index])
    return values, damaged, unchecked


def _tasks(leaves: Mapping[int, Leaf]) -> list[list[int]]:
    """Group leaves for threads: to hand a thread one small leaf costs as much again."""
    tasks: list[list[int]] = []
    room = 0
    for index, leaf in leaves.items():
        if not tasks or room < leaf.nbytes or len(tasks[-1]) == _TASK_LEAVES:
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


def _differing(leaves: Mapping[int, Leaf], values: Mapping[int, Any]) -> list[Leaf]:
    """Return the leaves whose values do not have their recorded digests."""
    recorded = {index: leaf for index, leaf in leaves.items() if leaf.digest}
    there = {i: leaf for i, leaf in recorded.items() if not is_shared(values[i])}
    same = agree([values[i] for i in there], [leaf.digest for leaf in there.values()])
    damaged = [
        leaf for leaf, is_same in zip(there.values(), same, strict=True) if not is_same
    ]
    shared = {i: leaf for i, leaf in recorded.items() if i not in there}
    if shared:  # each process has a part of them
        parts = [combined(pieces(values[i])) for i in shared]
        totals = map(sum, zip(*gathered("digests", parts), strict=True))
        pairs = zip(shared.values(), totals, strict=True)
        damaged += [leaf for leaf, total in pairs if not is_sum(total, leaf.digest)]
    return damaged


def read_table(path: Path) -> tuple[Layout | None, Skeleton]:
    """Read a checkpoint's table of leaves: the layout, and where in it the weights are.

    Both are None if plain Orbax wrote the checkpoint.
    """
    if not is_checkpoint(path):
        return None, None
    fields = read_leaves(path)
    try:
        layout, weights = Layout.from_json(fields), fields["weights"]
        for leaf in layout.leaves:
            _check_known(leaf)
        if weights == "all":
            weights = layout.skeleton
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointCorruptError(
            str(path), f"its table of leaves does not parse ({in_one_line(error)})"
        ) from error
    return layout, weights


def _check_known(leaf: Leaf) -> None:
    """Check that a leaf's dtype is one that can be stored.

    Raises:
        ValueError: If it is not.
    """
    if leaf.kind == "key":
        if str(key_dtype(leaf.impl)) != leaf.dtype:
            raise ValueError(f"keys of {leaf.impl} are of dtype {leaf.dtype}")
    elif leaf.dtype and not (storable(leaf.dtype) and _is_name(leaf.dtype)):
        raise ValueError(f"{leaf.name} is of dtype {leaf.dtype}, which is not known")


@functools.cache
def _is_name(dtype: str) -> bool:
    """Tell whether this is the name by which a dtype is recorded, and no alias."""
    return str(jnp.dtype(dtype)) == dtype
