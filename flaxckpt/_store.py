"""The one room that knows Orbax: writes a checkpoint directory, and reads one.

Sits on the free functions of Orbax's v1 API, on one directory each, and on neither of
its managers: listing, retention and replacement are ours. Orbax's exceptions do not
leave this room.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import stat
import sys
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from etils import epath

from flaxckpt import _tree
from flaxckpt._alias import plainly
from flaxckpt._background import give_way
from flaxckpt._commit import Area
from flaxckpt._digest import agree, digests, is_sum, part_of
from flaxckpt._draft import Draft, sync_tree
from flaxckpt._failures import in_one_line, listed
from flaxckpt._forks import use_threads
from flaxckpt._form import STATE, Form, Reader, Share, recognized
from flaxckpt._frames import outside
from flaxckpt._frozen import Frozen, FrozenLeaf
from flaxckpt._locks import new_lock
from flaxckpt._looks import Looks
from flaxckpt._mirror import fetched, source_of
from flaxckpt._open import (
    NoFileError,
    is_damage,
    is_inside,
    is_there,
    read_small,
    unreadable,
)
from flaxckpt._patience import LOOKS, looks, pause
from flaxckpt._pieces import is_shared
from flaxckpt._processes import are_several, gathered, is_leader
from flaxckpt._quiet import quiet
from flaxckpt._record import (
    FORMAT,
    LEAVES_FILE,
    RECORD_FILE,
    CheckpointInfo,
    Loaded,
    encode_record,
    is_checkpoint,
    is_same,
    located,
    read_leaves,
    read_record,
)
from flaxckpt._snapshot import HostCopy
from flaxckpt._template import is_url
from flaxckpt._ties import flatten
from flaxckpt._tree import Layout, Leaf, PyTree, Skeleton, Wanted, on_host
from flaxckpt._unchecked import runs_unchecked, unchecked_pool
from flaxckpt._vetting import check_plain, check_readable
from flaxckpt._weights import is_weights_name, plain_weights
from flaxckpt.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointPathError,
    CheckpointWriteError,
    LeafDifference,
    SettingError,
)

with quiet():  # it logs when it is imported
    from orbax.checkpoint import v1

T = TypeVar("T")
# Orbax types its paths as a class of its own, and takes any.
ocp: Any = v1
# Several objects save from threads of their own, and Orbax counts its saves globally.
_SAVING = new_lock()
_BATCH_BYTES = 256 * 2**20
_SHOWN = 8  # leaves that a warning lists
_NEEDED = ("_CHECKPOINT_METADATA", "state/_METADATA")  # for plain Orbax to read it
_ORBAX_FILES = ("_CHECKPOINT_METADATA", "orbax.checkpoint", "_METADATA")
_READ_THREADS = 8
_NAME_BYTES = 255  # of each name in a path; Linux and macOS take no more
_PATH_BYTES = (4096 if sys.platform == "linux" else 1024) - 300  # less what is below
_ELSEWHERE = "Choose another filepath."
# Plain Orbax warns that there are no arrays where no directory has a file of this name,
# as Zarr 2 has; it writes Zarr 3 itself.
_ZARR_MARK = f"{STATE}/array_metadatas/.zarray"
_OURS = {LEAVES_FILE, RECORD_FILE, _ZARR_MARK}
# The classes that write what Orbax's v1 functions read.
_HANDLERS = frozenset(
    "PyTreeHandler PyTreeCheckpointHandler StandardCheckpointHandler JsonHandler "
    "JsonCheckpointHandler ProtoHandler ProtoCheckpointHandler MetricsHandler "
    "StatefulCheckpointableHandler".split()
)
_DEFAULT_ITEMS = ("state", "pytree", "default")
# From this mean size of leaves on, a file for each is better than a database of all.
_LARGE_LEAF = 2**20


@functools.cache
def storable(dtype: str) -> bool:
    """Tell whether arrays of a dtype of this name can be stored."""
    try:
        tensorstore.dtype(dtype)
    except (TypeError, ValueError):
        return False
    return dtype not in ("object", "string", "ustring", "json", "char", "byte")


def check_target(path: Path, root: Path) -> None:
    """Check that a checkpoint can be written at `path`, and write nothing.

    Raises:
        CheckpointPathError: If something else is there, or the directory cannot be
            written to.
    """
    check_root(root)
    there, is_directory = _nearest(path)
    if not is_directory:
        raise CheckpointPathError(
            str(there),
            "is a file, and a checkpoint is a directory. Remove the file, or choose "
            "another filepath.",
        )
    if there == path:
        if _holds_other_things(path):
            raise CheckpointPathError(
                str(path),
                "is there and is no checkpoint: it would be replaced. Give the "
                'checkpoints names in it, as in filepath="directory/{epoch:02d}".',
            )
        there = path.parent
    if not os.access(there, os.W_OK | os.X_OK):
        raise CheckpointPathError(
            str(there),
            "cannot be written to. Make it writable, or choose another filepath.",
        )


def _holds_other_things(path: Path) -> bool:
    if is_checkpoint(path):
        return False
    try:
        has_any = any(path.iterdir())
    except FileNotFoundError:  # the thread that writes has deleted it by now
        return False
    return has_any and not is_checkpoint(path)  # which that thread has put there by now


def check_root(root: Path) -> None:
    """Check that `root` is a directory, or can be made.

    Raises:
        CheckpointPathError: If it, or what should be a directory above it, is a file.
    """
    there, is_directory = _nearest(root)
    if not is_directory:
        raise CheckpointPathError(
            str(there),
            "is a file, and checkpoints need a directory there. Remove the file, or "
            "choose another filepath.",
        )


def _nearest(path: Path) -> tuple[Path, bool]:
    """Find what exists of a path: the nearest, and whether it is a directory.

    One look at each, for other threads make directories meanwhile.

    Raises:
        CheckpointPathError: If no file system takes the path.
    """
    try:
        names = os.fsencode(path).split(b"/")
    except UnicodeEncodeError as error:
        problem = f"is no path in this file system's encoding ({error})"
        raise CheckpointPathError(str(path), f"{problem}. {_ELSEWHERE}") from error
    longest = max(map(len, names))
    if longest > _NAME_BYTES or sum(map(len, names)) + len(names) > _PATH_BYTES:
        problem = f"is too long for a checkpoint, or has a name of {longest} bytes"
        limits = f"the limits are {_PATH_BYTES} bytes and {_NAME_BYTES}"
        raise CheckpointPathError(str(path), f"{problem}: {limits}. {_ELSEWHERE}")
    for each in (path, *path.parents):
        try:
            return each, stat.S_ISDIR(each.stat().st_mode)
        except OSError as error:
            if not is_damage(error):
                raise unreadable(each, error) from error
            if each.is_symlink():  # to nothing
                return each, False
    raise AssertionError(f"{path} has no root")


def write(
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
) -> None:
    """Write a checkpoint and put it in its place, replacing one that is there.

    Blocks until it is there, and on disk. Until then, what was there is; nothing is
    deleted before.

    Args:
        info: Its record.
        area: Where its series is written; open.
        layout: The tree's layout.
        leaves: Its leaves, in forms that Orbax stores; those that are frozen as
            `FrozenLeaf`.
        weights: Where in `layout` the weights are.
        compress: Whether to compress the arrays.
        frozen: Where frozen leaves are stored.
        earlier: A checkpoint of the series that may hold them, if it is not known.
        looks: What the writer has looked at before; None for no look.

    Raises:
        CheckpointWriteError: If not all is there that was to be written.
    """
    held = _held(layout, leaves)
    is_database = sum(leaf.nbytes for leaf in layout.leaves) < _LARGE_LEAF * len(held)
    if any(isinstance(value, FrozenLeaf) for value in held):
        is_database = False  # what is linked is a file
    form = None if compress else _form_of(layout, held, is_database=is_database)
    if frozen is not None:
        frozen.begin()
    with area.staging(reuse=form is not None and not is_database) as directory:
        written = directory / "new"
        by_orbax = None
        if form is None:
            settings = {"is_database": is_database, "compress": compress}
            by_orbax = _write_by_orbax(written, layout, leaves, held, **settings)
        # What the draft has not written itself is synced with all the rest, behind it.
        is_ours = form is not None and not form.is_database
        with Draft(written, sync=area.sync and is_ours) as draft:
            if by_orbax is not None:
                found, sums, learned = by_orbax
                if frozen is not None and learned is not None:
                    _adopt(learned, frozen, earlier)
                    learned.link(draft, held, found, sums, frozen)
            else:
                assert form is not None
                _adopt(form, frozen, earlier)
                draft.keep_only(form.names | _OURS)
                found, sums = form.write(draft, written, held, frozen)
            _finish(draft, written, info, _table(layout, weights, found, sums))
        if area.sync and not is_ours:
            sync_tree(written)
        if looks is not None:
            linked = frozen is not None and frozen.has_links
            way = by_orbax is None, is_database, compress, linked
            _look(
                written, area.shown(info.path), looks, (way, layout, _placements(held))
            )
        area.put(written, info.path)
    if frozen is not None:
        frozen.settle(info.path)


def learn(
    directory: Path,
    layout: Layout,
    leaves: list[Any],
    exchanged: Callable[[dict[str, str]], dict[str, str]] | None,
) -> None:
    """Have Orbax write a tree of several processes, only to see how it does.

    Every process must call this, on its main thread: Orbax has them wait for each
    other.

    Args:
        directory: Where to, a directory in which nothing is; of the same name in all.
        layout: The tree's layout.
        leaves: Its leaves; of keys, their data.
        exchanged: Where each process has a directory of its own, takes the small files
            in it, by their names, and returns those of all; None if all have the same.

    Raises:
        CheckpointError: If it writes in a way that is not known here.
    """
    # What is in each process by itself Orbax takes from the host only.
    values = [
        np.asarray(leaf)
        if isinstance(leaf, jax.Array) and not is_shared(leaf)
        else leaf
        for leaf in leaves
    ]
    keyed = list(map(_with_key, layout.leaves, values))
    held = _held(layout, leaves)
    context = _context(is_database=False)
    if exchanged is not None:
        context.multiprocessing.primary_host = None
        context.array.saving.use_replica_parallel = False  # which needs one directory
    with _SAVING, quiet(), context:
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
    _FORMS.appendleft((layout, _placements(held), form))


def _small_files(directory: Path) -> dict[str, str]:
    """Read what Orbax has written beside arrays' values."""

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
    """Write what is this process's of a checkpoint that another one begins and ends.

    Args:
        directory: Where that one has begun it.
        layout: The tree's layout, the form of which is learnt.
        leaves: Its leaves.
        sync: Whether to wait for the disk.

    Returns:
        For the other one, what was written.
    """
    form, held = _known_form(layout, leaves)
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
) -> None:
    """Write a checkpoint as `write` does, but that other processes write parts of it.

    Args:
        info: Its record.
        area: Where its series is written; open.
        layout: The tree's layout, the form of which is learnt.
        leaves: Its leaves.
        weights: Where in `layout` the weights are.
        meet: Tells the others where, calls what writes this one's share, and returns
            all shares.
        looks: As for `write`.

    Raises:
        CheckpointWriteError: As `write` does.
    """
    form, held = _known_form(layout, leaves)
    with area.staging(reuse=True) as directory:
        written = directory / "new"
        with Draft(written, sync=area.sync) as draft:
            draft.keep_only(form.names | _OURS)
            form.begin(draft, held)
            share = functools.partial(form.write_share, draft, held, leads=True)
            found, sums = form.joined(meet(written, share))
            _finish(draft, written, info, _table(layout, weights, found, sums))
        if looks is not None and not area.is_mirror:  # where all shares are here
            shown = area.shown(info.path)
            _look(written, shown, looks, ("together", layout, _placements(held)))
        area.put(written, info.path)


def _look(written: Path, shown: Path, looks: Looks, what: tuple[Any, ...]) -> None:
    """Look whether all of a checkpoint is there, unless its like was looked at before.

    Reads no values, but where the files do not tell: then what a restore would read.

    Raises:
        CheckpointWriteError: If it is not.
    """
    if not looks.is_new(*what):
        return
    missing = [name for name in _NEEDED if not (written / name).is_file()]
    doubtful: dict[int, Leaf] = {}
    try:
        layout, _ = _read_table(written)
        if read_record(written) is None or layout is None:
            raise CheckpointCorruptError(str(written), f"{RECORD_FILE} is missing")
        reader, turn = Reader(written), time.perf_counter()
        for index, leaf in enumerate(layout.leaves):
            turn = give_way(turn)
            if leaf.in_orbax and not reader.holds(leaf):
                doubtful[index] = leaf
        if doubtful and are_several():  # the others would have to read, too
            raise CheckpointCorruptError(str(written), "files are missing")
        for batch in _batches(layout.leaves) if doubtful else ():
            wanted = {i: on_host(doubtful[i]) for i in batch if i in doubtful}
            _read(written, layout, wanted, check=True)
        problem = f"{', '.join(missing)} is missing" if missing else ""
    except CheckpointCorruptError as error:
        names = [leaf.name for leaf in doubtful.values()]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        problem = f"{', '.join(names[:3])}{more}: {error.problem}".removeprefix(": ")
    if problem:
        raise CheckpointWriteError(
            str(shown), f"what was written is not all there ({problem})"
        )
    looks.note(*what)


def _finish(draft: Draft, written: Path, info: CheckpointInfo, table: bytes) -> None:
    """Add the table of leaves and the record, and have all of it on disk."""
    if not (written / STATE / "manifest.ocdbt").exists():
        draft.write(_ZARR_MARK, [])
    draft.write(LEAVES_FILE, [table])
    draft.write(RECORD_FILE, [encode_record(info, versions(), table)])
    draft.finish()


def _held(layout: Layout, leaves: list[Any]) -> list[Any]:
    """Return those of a tree's leaves that Orbax holds."""
    pairs = zip(layout.leaves, leaves, strict=True)
    return [value for leaf, value in pairs if leaf.in_orbax]


def _known_form(layout: Layout, leaves: list[Any]) -> tuple[Form, list[Any]]:
    held = _held(layout, leaves)
    form = _form_of(layout, held, is_database=False)
    assert form is not None
    return form, held


def _table(
    layout: Layout,
    weights: Skeleton,
    found: list[str],
    sums: Sequence[Sequence[str]],
) -> bytes:
    """Return the table of leaves as JSON; only digests and checksums are ever new."""
    texts = [text for k, w, text in tuple(_TABLES) if k == layout and w == weights]
    if not texts:
        fields = {"format": FORMAT, **layout.to_json()}
        fields["weights"] = "all" if weights == layout.skeleton else weights
        texts.append(json.dumps(fields))
        _TABLES.appendleft((layout, weights, texts[0]))
    new = json.dumps({"digests": found, "sums": sums} if sums else {"digests": found})
    return f"{texts[0][:-1]}, {new[1:]}".encode()


_TABLES: deque[tuple[Layout, Skeleton, str]] = deque(maxlen=8)


def _write_by_orbax(
    written: Path,
    layout: Layout,
    leaves: list[Any],
    held: list[Any],
    *,
    is_database: bool,
    compress: bool,
) -> tuple[list[str], Sequence[Sequence[str]], Form | None]:
    """Have Orbax write a tree, and learn from it how; return digests and checksums."""
    leaves, values, handed_over = _unpacked(leaves), _unpacked(held), _thawed(held)
    keyed = list(map(_with_key, layout.leaves, leaves))
    context = _context(is_database=is_database, compress=compress)
    with _SAVING, quiet(), context, plainly(written) as plain:
        ocp.save(plain, layout.fill_for_orbax(keyed))
    form = None if compress else recognized(written, layout, values)
    if form is None:
        return digests(handed_over), [], None
    _FORMS.appendleft((layout, _placements(values), form))
    return *form.marks(handed_over), form


def _with_key(leaf: Leaf, value: Any) -> Any:
    """Return typed PRNG keys of which only the data is here."""
    if leaf.kind != "key":
        return value
    if isinstance(value, jax.Array):
        is_data = not jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        return jax.random.wrap_key_data(value, impl=leaf.impl) if is_data else value
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return jax.random.wrap_key_data(jnp.asarray(value), impl=leaf.impl)


def _adopt(form: Form, frozen: Frozen | None, earlier: Path | None) -> None:
    """Find what of an earlier run's last checkpoint can be linked, the first time."""
    if frozen is None or earlier is None or not frozen.is_new:
        return
    try:
        form.adopt(earlier, Layout.from_json(read_leaves(earlier)).leaves, frozen)
    except (CheckpointError, OSError, ValueError, KeyError, TypeError):
        pass  # of no use


def _thawed(leaves: list[Any]) -> list[Any]:
    return [leaf.value if isinstance(leaf, FrozenLeaf) else leaf for leaf in leaves]


def _unpacked(leaves: list[Any]) -> list[Any]:
    """Return leaves as Orbax takes them."""
    return [
        leaf.placed() if isinstance(leaf, HostCopy) else leaf
        for leaf in _thawed(leaves)
    ]


def has_form(layout: Layout, leaves: list[Any]) -> bool:
    """Tell whether a tree with frozen leaves is written without a look at them."""
    return _form_of(layout, _held(layout, leaves), is_database=False) is not None


def _form_of(layout: Layout, held: list[Any], *, is_database: bool) -> Form | None:
    """Look up how Orbax has written such a tree before."""
    placements = _placements(held)
    for known, placed, form in tuple(_FORMS):
        if (known, placed, form.is_database) == (layout, placements, is_database):
            return form
    return None


def _placements(held: list[Any]) -> list[Any]:
    return [getattr(value, "sharding", type(value)) for value in _thawed(held)]


_FORMS: deque[tuple[Layout, list[Any], Form]] = deque(maxlen=8)


def load(
    path: str | os.PathLike[str],
    like: PyTree = None,
    *,
    cast: bool = False,
    verify: bool = True,
    with_info: bool = False,
) -> Any:
    """Load the tree of a checkpoint, of flaxckpt's or of plain Orbax's.

    A checkpoint of plain Orbax with several items, none of which has a default name
    (`state`, `pytree` or `default`), is a dict of them all by their names. `path/name`
    is one of them.

    In several processes, every one must call it.

    Args:
        path: The checkpoint's directory; a `gs://` or `s3://` URL, too. A
            `CheckpointInfo` stands for the very checkpoint that it is of.
        like: A tree of the wanted structure, of arrays or `jax.ShapeDtypeStruct`s:
            each leaf is restored with its dtype and shape, as its kind of value, onto
            its sharding, in that memory, whatever mesh wrote it. A struct whose
            sharding names no devices goes to those of `jax.set_mesh`. A sharding in
            the place of a leaf, or of a subtree, places what is stored there. Functions
            are taken from it. Not changed. What is shared in an NNX module is shared in
            what is returned. None: the tree as plain dicts, lists and tuples, JAX
            arrays on the default device, None for functions; NNX modules and states as
            the dicts that `nnx.update` and `nnx.replace_by_pure_dict` take.
        cast: Convert where only the dtypes of stored and wanted arrays differ, rather
            than raise.
        verify: Check each leaf against the digest of what was saved. Plain Orbax
            records none.
        with_info: Return a `Loaded`, which has the record of what was loaded, too.

    Returns:
        The tree, with the structure of `like` if that is given.

    Raises:
        CheckpointNotFoundError: If there is no checkpoint at `path`, or `path` is a
            `CheckpointInfo` and another checkpoint has taken its place.
        CheckpointMismatchError: Listing every leaf in which structure, shape or dtype
            differ from `like`; nothing was read.
        CheckpointCorruptError: If it cannot be read, or is not what was saved.
        UnsupportedLeafError: If `like` has leaves that are no values.
        CheckpointError: If the object store cannot be reached.

    Example:
        >>> import flaxckpt
        >>> with flaxckpt.ModelCheckpoint("runs/{epoch}") as ckpt:
        ...     path = ckpt.save({"w": np.arange(3), "b": (1, 2)}, epoch=0)
        >>> flaxckpt.load(path)
        {'b': (1, 2), 'w': array([0, 1, 2])}
    """
    loaded = restore(path, like, cast=cast, verify=verify)
    return loaded if with_info else loaded.tree


def restore(
    path: str | os.PathLike[str], like: PyTree, *, cast: bool, verify: bool
) -> Loaded:
    """Load a tree as `load` does, and its record."""
    check_like(like)

    def read(where: Path) -> Loaded:
        info = _info_of(path, where)
        layout, _ = _read_table(where)
        tree = _load(where, layout, None, like, cast=cast, check=verify)
        return Loaded(tree, info)

    return _undisturbed(path, read)


def _info_of(path: str | os.PathLike[str], where: Path) -> CheckpointInfo | None:
    """Read the record of a checkpoint whose files are at `where`."""
    info = read_record(where)
    if info is None or not is_url(path):
        return info
    url: Any = epath.Path(os.fspath(path))
    return dataclasses.replace(info, path=url)


def load_weights(
    path: str | os.PathLike[str],
    like: PyTree = None,
    *,
    cast: bool = False,
    verify: bool = True,
    with_info: bool = False,
) -> Any:
    """Load the weights alone, from a checkpoint of weights or of a whole state.

    What the weights are was settled by `weights` when it was saved. In a checkpoint
    that plain Orbax wrote they are `params` and the mappings beside it, if there is
    an `opt_state`, and otherwise all; of several items, those whose names are not those
    of an optimizer, metrics and the like.

    In several processes, every one must call it.

    Args:
        path: As for `load`.
        like: A tree of the weights' structure; as for `load`.
        cast: As for `load`.
        verify: As for `load`.
        with_info: As for `load`.

    Returns:
        The weights; for a Flax `TrainState` a dict of `params` and the collections
        beside it, which `Module.apply` takes; for an NNX model a dict that
        `nnx.update` takes.

    Raises:
        CheckpointError: If the weights were computed when saving, not picked, so that
            a whole checkpoint does not hold them; and as `load`.
    """
    check_like(like)

    def read(where: Path) -> Loaded:
        info = _info_of(path, where)
        layout, weights = _read_table(where)
        if layout is not None and weights is None:
            raise CheckpointError(
                f"Checkpoint {str(path)!r} does not hold its weights by themselves: "
                "`weights` computed them from the tree. Save with "
                "save_weights_only=True, or load the whole tree and compute them."
            )
        if layout is not None and layout.leaves and not layout.part(weights)[1]:
            raise CheckpointError(
                f"Checkpoint {str(path)!r} holds no weights: the tree that was saved "
                "had none. Load the whole tree with load."
            )
        part = plain_weights if layout is None else weights
        return Loaded(_load(where, layout, part, like, cast=cast, check=verify), info)

    loaded = _undisturbed(path, read)
    return loaded if with_info else loaded.tree


def verify(path: str | os.PathLike[str]) -> None:
    """Check that a checkpoint holds what was saved, bit for bit.

    Needs no accelerator, and no more memory than its largest leaf takes, or 256 MiB.

    Args:
        path: The checkpoint's directory; a `gs://` or `s3://` URL, too.

    Raises:
        CheckpointNotFoundError: If there is no checkpoint at `path`.
        CheckpointCorruptError: Naming the leaves that cannot be read or differ from
            what was saved, and the files that they are in.
        CheckpointError: If plain Orbax wrote it, which records nothing to check by.

    Example:
        >>> import flaxckpt
        >>> with flaxckpt.ModelCheckpoint("runs/{epoch}") as ckpt:
        ...     path = ckpt.save({"w": np.arange(3)}, epoch=0)
        >>> flaxckpt.verify(path)
    """
    _undisturbed(path, _verify)


def _verify(path: Path) -> None:
    layout, _ = _read_table(path)
    if layout is None:
        raise CheckpointError(
            f"Checkpoint {str(path)!r} was written by plain Orbax, which records no "
            "digests: there is nothing to check it by. Load it, to see if it can be "
            "read."
        )
    for indices in _batches(layout.leaves):
        wanted = {index: on_host(layout.leaves[index]) for index in indices}
        _read(path, layout, wanted, check=True)


@runs_unchecked
def _undisturbed(path: str | os.PathLike[str], read: Callable[[Path], T]) -> T:
    """Read a checkpoint, once more if it is replaced or deleted meanwhile.

    A program that evaluates what another one trains reads paths that are written to. A
    `CheckpointInfo` is read only while the checkpoint that it is of is there.
    """
    use_threads()
    if isinstance(path, CheckpointInfo):
        read = functools.partial(_read_listed, path, read)
    if is_url(path):
        return _from_store(os.fspath(path), read)
    for _ in looks():
        found = _found(path)
        before = _stamp(found)
        try:
            result = _shallow(found, read)
        except (CheckpointCorruptError, CheckpointNotFoundError, OSError):
            if _stamp(found) == before and _stays(found):
                raise
            continue
        if _stamp(found) == before:
            return result
    raise _replaced_too_often(path)


def _shallow(path: Path, read: Callable[[Path], T]) -> T:
    """Read a checkpoint whose tree is not nested more deeply than Python takes."""
    try:
        return read(path)
    except RecursionError as error:
        raise CheckpointCorruptError(
            str(path), "its tree is nested more deeply than can be read"
        ) from error


def _read_listed(info: CheckpointInfo, read: Callable[[Path], T], path: Path) -> T:
    """Read a checkpoint if it still is the one of a record.

    Raises:
        CheckpointNotFoundError: If it is another one.
    """
    there = read_record(path)
    if there is None or not is_same(info, there):
        when = "by one of plain Orbax" if there is None else f"at {there.time}"
        problem = f"it was saved at {info.time}, and what is there now {when}"
        raise CheckpointNotFoundError(str(path), (), problem)
    return read(path)


def _replaced_too_often(path: str | os.PathLike[str]) -> CheckpointError:
    return CheckpointError(
        f"Checkpoint {str(path)!r} was replaced {LOOKS} times or more while it was "
        "read. Read it when it is not being written, or save less often."
    )


def _stays(path: Path) -> bool:
    """Tell whether a checkpoint stays as it is: none of its files is on its way out."""
    before = _files_of(path)
    pause()
    return _files_of(path) == before != []


def _files_of(path: Path) -> list[str]:
    found = os.walk(located(path))
    return [f"{directory}/{name}" for directory, _, names in found for name in names]


def _from_store(url: str, read: Callable[[Path], T]) -> T:
    """Read a checkpoint in an object store, as `_undisturbed` does."""
    for _ in looks():
        with fetched(url) as source:
            try:
                source.begin()
                return _shallow(_found(source.directory), read)
            except CheckpointError as error:
                kinds = CheckpointCorruptError, CheckpointNotFoundError
                if isinstance(error, kinds) and source.is_replaced():
                    continue
                if error.args[:1] != (str(source.directory),):
                    raise
                raise type(error)(url, *error.args[1:]) from error.__cause__
    raise _replaced_too_often(url)


def _stamp(path: Path) -> tuple[Any, ...]:
    """Return what differs between any two checkpoints, and if one was moved meanwhile.

    Empty where there is none.
    """
    there = located(path)
    try:
        content, status = read_small(there / RECORD_FILE), there.stat()
    except (NoFileError, CheckpointPathError, OSError):
        return ()
    return content, there, status.st_ino, status.st_ctime_ns


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of the packages that write a checkpoint."""
    return {name: _version(name) for name in ("flaxckpt", "jax", "orbax-checkpoint")}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # it runs from its source tree
        return "unknown"


def _load(
    path: Path,
    layout: Layout | None,
    part: Skeleton | Callable[[Layout], Skeleton],
    like: PyTree,
    *,
    cast: bool,
    check: bool,
) -> PyTree:
    """Load a part of a checkpoint, None for all; without a layout, plain Orbax's."""
    values: list[Any] | None = None
    if layout is None:
        foreign = _read_foreign(path, like, weights_only=callable(part))
        layout, values = _tree.describe(foreign, storable)
    if callable(part):
        part = part(layout)
    view, sources = layout.part(layout.skeleton if part is None else part)
    try:
        if view.nbytes > layout.most_bytes:  # the weights may name a leaf many times
            raise _tree.OverfullError("its weights are its arrays too many times")
        like = _tree.spread(like, view)
    except _tree.OverfullError as error:
        raise CheckpointCorruptError(str(path), str(error)) from error
    try:
        plan, twins = _tree.match(str(path), view, like, cast=cast)
    except CheckpointMismatchError as error:
        if values is None:
            # It may be the table that is wrong.
            _check_table(path, layout, layout.leaves)
        raise _naming_items(path, error) from None
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
            if _tree.is_placement(given[position]):
                given[position] = None
            continue
        have = view.leaves[index]
        try:
            given[position] = _tree.convert(found[position], have, want, cast=cast)
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
        _tree.difference_of_twins(
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
    except _tree.OverfullError as error:
        raise CheckpointCorruptError(str(path), str(error)) from error


def _read_each(
    path: Path,
    layout: Layout,
    asked: Sequence[tuple[int | None, Wanted]],
    *,
    check: bool,
) -> list[Any]:
    """Read leaves as they are wanted, one that is wanted several times as often.

    So each place gets an array of its own, which may be donated.
    """
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
        values = _read(path, layout, wanted, check=check)
        for index, position in each.items():
            found[position] = values[index]
    return found


def _are_same(one: Any, other: Any) -> bool:
    """Tell whether two leaves are equal, bit for bit, in what this process has."""

    def parts(value: Any) -> list[bytes]:
        value = _tree.without_keys(value)
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
        given: The leaves of `like`, some of which may only say where to put what is
            stored; None without a `like`.
    """
    names = [leaf.name for leaf in layout.leaves if leaf.kind == "function"]
    if given is not None:
        placed = {
            want.leaf.name
            for (index, want), leaf in zip(plan, given, strict=True)
            if index is None and _tree.is_placement(leaf)
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
    """Check that leaves are stored as the table of leaves says.

    Orbax would take whatever it finds.

    Raises:
        CheckpointCorruptError: Naming those that are not.
    """
    if source_of(path) is not None:
        return  # nothing is fetched from an object store for that
    check_plain(path, layout.nbytes, layout.nbytes)
    reader = _reader(path, layout)
    if reader is None:
        return
    wrong = [leaf for leaf in leaves if reader.contradicts(leaf)]
    if wrong:
        names = listed([leaf.name for leaf in wrong])
        files = listed(_leaf_files(located(path), wrong))
        raise CheckpointCorruptError(
            str(path),
            f"the stored arrays do not match {LEAVES_FILE}: {names} (in one of the "
            f"files {files})",
        )


def _reader(path: Path, layout: Layout) -> Reader | None:
    """Return what reads a checkpoint's arrays; None where Orbax tells why it cannot."""
    if _is_database(path):
        check_plain(path, held=layout.nbytes)
    try:
        return Reader(located(path), source_of(path))
    except CheckpointPathError:
        raise
    except (OSError, ValueError):
        return None


def _read(
    path: Path, layout: Layout, wanted: Mapping[int, Wanted], *, check: bool
) -> list[Any]:
    """Read the wanted ones of a checkpoint's leaves, each to where it is wanted."""
    read = {i: layout.leaves[i] for i in wanted if layout.leaves[i].in_orbax}
    values, damaged, unchecked = _read_files(path, layout, read, wanted, check=check)
    others = {index: leaf for index, leaf in read.items() if index not in values}
    if others:
        _check_table(path, layout, others.values())
        by_orbax = _read_by_orbax(path, layout, {i: wanted[i] for i in others})
        values |= {index: by_orbax[index] for index in others}
    if check:
        unchecked |= others
        damaged += _differing(unchecked, values)
    if damaged:
        _complete(path)
        names = listed([leaf.name for leaf in damaged])
        files = listed(_data_files(located(path), damaged))
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
    """Read what is stored in a known way; no other process has to come.

    Returns:
        The values of those that could be read so, which of them differ from what was
        saved, and which of them are still to be checked.
    """
    reader = _reader(path, layout)
    if reader is None:
        return {}, [], {}
    known = dict(leaves)
    if are_several():  # what one can't read is damaged, unless none of them knows it
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

    # More than the cores take each other's cache, and are no faster.
    threads = min(_READ_THREADS, os.cpu_count() or 1)
    with unchecked_pool(threads, "flaxckpt-read") as pool:
        found = dict(zip(known, pool.map(read, known), strict=True))
    damaged = [known[index] for index, (_, same) in found.items() if same is False]
    values = {index: value for index, (value, _) in found.items() if value is not None}
    if are_several():  # Orbax would wait for processes that could read them
        damaged += [leaf for index, leaf in known.items() if index not in values]
        values = dict.fromkeys(known) | values
    unchecked = {i: known[i] for i, (_, same) in found.items() if same is None}
    for index in values:
        if known[index].kind == "key" and values[index] is not None:
            values[index] = _as_key(known[index], values[index], wanted[index])
    return values, damaged, unchecked


def _as_key(leaf: Leaf, data: Any, want: Wanted) -> Any:
    """Return typed PRNG keys with these data, where they are wanted."""
    if not isinstance(data, jax.Array):
        data = jax.device_put(data, want.sharding or jax.local_devices()[0])
    return _with_key(leaf, data)


def _read_by_orbax(path: Path, layout: Layout, wanted: Mapping[int, Wanted]) -> Any:
    asked = [
        _abstract(leaf, wanted[index]) if index in wanted else ocp.PLACEHOLDER
        for index, leaf in enumerate(layout.leaves)
    ]
    try:
        _complete(path)
        _check_names(path, [layout.leaves[index] for index in wanted])
        needed = sum(layout.leaves[index].nbytes for index in wanted)
        check_plain(path, needed, layout.nbytes)
        with quiet(), _context(), plainly(located(path)) as plain:
            tree = ocp.load(plain, layout.fill_for_orbax(asked))
            return layout.pick(tree)
    except (MemoryError, jax.errors.JaxRuntimeError, CheckpointError):
        raise
    except Exception as error:
        check_readable(path)
        leaves = [layout.leaves[index] for index in wanted]
        names, files = (
            [leaf.name for leaf in leaves],
            _data_files(located(path), leaves),
        )
        problem = f"cannot be read: {listed(names)} (in one of the files "
        problem += f"{listed(files) or 'that hold it, which are missing'})"
        raise CheckpointCorruptError(
            str(path), f"{problem}: {in_one_line(error)}"
        ) from error


def _is_database(path: Path) -> bool:
    """Tell whether a checkpoint's arrays are in a database, and not in files."""
    return is_there(located(path) / STATE / "manifest.ocdbt")


def _check_names(path: Path, leaves: Sequence[Leaf]) -> None:
    """Check that no leaf's name leads Orbax to files outside of the checkpoint."""
    if _is_database(path):
        return  # a database has keys, and no files
    for leaf in leaves:
        name = leaf.stored_name
        if not leaf.is_text and (name[:1] == "/" or ".." in name.split("/")):
            raise CheckpointCorruptError(
                str(path), f"the name of the leaf {name!r} leads out of the checkpoint"
            )


def _differing(leaves: Mapping[int, Leaf], values: Mapping[int, Any]) -> list[Leaf]:
    """Return the leaves whose values are not what was saved; Orbax checks little."""
    recorded = {index: leaf for index, leaf in leaves.items() if leaf.digest}
    there = {i: leaf for i, leaf in recorded.items() if not is_shared(values[i])}
    same = agree([values[i] for i in there], [leaf.digest for leaf in there.values()])
    damaged = [
        leaf for leaf, is_same in zip(there.values(), same, strict=True) if not is_same
    ]
    shared = {i: leaf for i, leaf in recorded.items() if i not in there}
    if shared:  # each process has a part of them
        parts = [part_of(values[i], leaf.digest) for i, leaf in shared.items()]
        totals = map(sum, zip(*gathered("digests", parts), strict=True))
        pairs = zip(shared.values(), totals, strict=True)
        damaged += [leaf for leaf, total in pairs if not is_sum(total, leaf.digest)]
    return damaged


def _data_files(path: Path, leaves: Sequence[Leaf]) -> list[str]:
    """Name the files that hold the values of leaves, and not what describes them."""
    found = _leaf_files(path, leaves)
    values = [
        name for name in found if not name.endswith(("/zarr.json", "/manifest.ocdbt"))
    ]
    return values or found


def _leaf_files(path: Path, leaves: Sequence[Leaf]) -> list[str]:
    """Name the files of leaves; those of the database, where one holds them all."""
    names = [leaf.stored_name for leaf in leaves]
    own = [path / "state" / name for name in names if is_inside(name)]
    found: list[Path] = []
    with contextlib.suppress(FileNotFoundError):  # they may be on their way out
        found += [file for each in own for file in each.rglob("*") if file.is_file()]
        if any(leaf.is_text for leaf in leaves):
            found += path.glob("state/_strings.json")
        found = found or [*path.glob("state/*.ocdbt"), *path.glob("state/**/d/*")]
    return [str(file.relative_to(path)) for file in sorted(found)]


def _batches(leaves: Sequence[Leaf]) -> Iterator[list[int]]:
    """Group the leaves that Orbax holds, so that each group fits into little memory."""
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


def _abstract(leaf: Leaf, want: Wanted) -> Any:
    """Describe to Orbax how to restore a leaf.

    In the stored dtype, for Orbax would cast without a word, and on the host where it
    is to stay there, to be converted, or to be placed without being committed.
    """
    match leaf.kind:
        case "bool" | "int" | "float" | "str" if not leaf.dtype:
            return {"bool": False, "int": 0, "float": 0.0, "str": ""}[leaf.kind]
        case "key":
            sharding = want.sharding or jax.sharding.SingleDeviceSharding(
                jax.local_devices()[0]
            )
            return jax.ShapeDtypeStruct(
                leaf.shape, _tree.key_dtype(leaf.impl), sharding=sharding
            )
        case _:
            pass
    dtype = "complex128" if leaf.kind == "complex" else leaf.dtype
    if want.sharding is not None and dtype == want.leaf.dtype:
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=want.sharding)
    return np.broadcast_to(np.zeros((), jnp.dtype(dtype)), leaf.shape)


def _complete(path: Path) -> None:
    """Have all of a checkpoint on the disk, for what reads there only."""
    source = source_of(path)
    if source is not None:
        source.complete()


def _read_foreign(path: Path, like: PyTree, *, weights_only: bool) -> PyTree:
    """Read what plain Orbax wrote: a tree, or a dict of its items by their names.

    Of several items, those that `like` names. Without one, all that Orbax can read;
    a warning names the others.
    """
    check_plain(path)
    if not _is_orbax(path):
        handler = _items(path.parent).get(path.name, "")
        return _read_item(path.parent, path.name, handler)
    items = _items(path)
    for name in _DEFAULT_ITEMS:
        if name in items:
            return _read_item(path, name, items[name])
    if len(items) < 2:
        return _read_item(path, None, next(iter(items.values()), ""))
    chosen = list(items)
    if weights_only:
        chosen = [
            name
            for name, handler in items.items()
            if is_weights_name(name) and "json" not in handler.lower()
        ]
    if not chosen:
        raise CheckpointError(
            f"Checkpoint {str(path)!r} has no weights among its items: "
            f"{', '.join(items)}. Load one by its path, as in "
            f"load({str(path / next(iter(items)))!r})."
        )
    if isinstance(like, Mapping):
        asked: Mapping[Any, Any] = like
        named = [name for name in items if name in asked]
        if named:
            return {name: _read_item(path, name, items[name]) for name in named}
    found: dict[str, PyTree] = {}
    left_out: list[str] = []
    for name in chosen:
        try:
            found[name] = _read_item(path, name, items[name])
        except _NoHandlerError:
            left_out.append(name)
    if not found:
        raise _NoHandlerError(path, {name: items[name] for name in left_out})
    if left_out:
        shown = ", ".join(f"{name} ({items[name]})" for name in left_out)
        warnings.warn(
            f"Checkpoint {str(path)!r} has items that Orbax's v1 functions cannot "
            f"read: {shown}. They are left out. Read them with Orbax's "
            "CheckpointManager and the handler that wrote them. To load other items "
            "without this warning, load one by its path, as in "
            f"load({str(path / next(iter(found)))!r}), or pass a `like` of them.",
            stacklevel=outside(),
        )
    return found


class _NoHandlerError(CheckpointError):
    """Items that Orbax's v1 functions cannot read; they are not damaged."""

    def __init__(self, path: Path, items: Mapping[str, str]) -> None:
        shown = ", ".join(f"{name} ({handler})" for name, handler in items.items())
        super().__init__(
            f"Checkpoint {str(path)!r} has nothing else to load than items that "
            f"Orbax's v1 functions cannot read: {shown}. Read them with Orbax's "
            "CheckpointManager and the handler that wrote them."
        )


def _has_handler(path: Path, name: str | None, handler: str, error: Exception) -> bool:
    """Tell whether Orbax failed to read an item that its v1 functions can read.

    Args:
        path: The checkpoint.
        name: The item; None for the only one.
        handler: The name of the class that has written it.
        error: What Orbax raised.
    """
    if not handler or handler.rpartition(".")[2] in _HANDLERS:
        return True
    names = [name] if name is not None else list(_items(path))
    has_tree = all(is_there(path / each / "_METADATA") for each in names)
    return has_tree and type(error).__name__ != "NoEntryError"


def _naming_items(
    path: Path, error: CheckpointMismatchError
) -> CheckpointMismatchError:
    """Add what the items are called, where a checkpoint of plain Orbax has several."""
    items = {} if is_checkpoint(path) else _items(path)
    if len(items) < 2 or items.keys() & set(_DEFAULT_ITEMS):
        return error
    advice = (
        f"It has the items {', '.join(items)}: pass a `like` with these keys, or load "
        f"one by its path, as in load({str(path / next(iter(items)))!r})."
    )
    return CheckpointMismatchError(error.path, error.differences, advice)


def _items(path: Path) -> dict[str, str]:
    """Name the items of a checkpoint of plain Orbax; none where it is one tree.

    Returns:
        For each name, that of the class in Orbax that has written it.
    """
    try:
        described = json.loads(read_small(path / "_CHECKPOINT_METADATA"))
        handlers = described["item_handlers"]
    except (NoFileError, OSError, ValueError, KeyError, TypeError, RecursionError):
        names = [each.parent.name for each in path.glob("*/_METADATA")]
        handlers = dict.fromkeys(names, "")
    if not isinstance(handlers, dict):
        return {}
    named: dict[Any, Any] = handlers
    return {
        name: str(handler)
        for name, handler in named.items()
        if name != "metrics" and (path / name).is_dir()
    }


def _read_item(path: Path, name: str | None, handler: str) -> PyTree:
    """Read an item, or the only tree: as it was placed, or, on other devices, to host.

    Args:
        path: The checkpoint.
        name: The item; None for the only tree.
        handler: The name of the class that has written it; empty if it is not known.

    Raises:
        CheckpointCorruptError: Naming it, if Orbax cannot read it.
        _NoHandlerError: If Orbax's v1 functions cannot read what that class writes.
    """

    def read(plain: Any, form: Any = None) -> PyTree:
        if name is None:
            return ocp.load(plain, form)
        return ocp.load_checkpointables(plain, {name: form})[name]

    def described(plain: Any) -> Any:
        if name is None:
            return ocp.metadata(plain).metadata
        return ocp.checkpointables_metadata(plain).metadata[name]

    try:
        with quiet(), _context(), plainly(path) as plain:
            try:
                return read(plain, jax.tree.map(_placed_form, described(plain)))
            except (ValueError, TypeError, KeyError):
                return read(plain, jax.tree.map(_host_form, described(plain)))
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        check_readable(path)
        if not _has_handler(path, name, handler, error):
            item = name or next(iter(_items(path)))
            raise _NoHandlerError(path, {item: handler}) from error
        item = "" if name is None else f"its item {name!r} cannot be read: "
        raise CheckpointCorruptError(str(path), item + in_one_line(error)) from error


def _placed_form(described: Any) -> Any:
    """Describe to Orbax where an array was; left to find that out, it warns."""
    placed = getattr(described, "sharding_metadata", None)
    if placed is None:
        return described
    shape, dtype = described.shape, described.dtype
    return jax.ShapeDtypeStruct(shape, dtype, sharding=placed.to_jax_sharding())


def _host_form(described: Any) -> Any:
    if not hasattr(described, "shape"):
        return described
    return np.broadcast_to(np.zeros((), described.dtype), described.shape)


def _read_table(path: Path) -> tuple[Layout | None, Skeleton]:
    """Read a checkpoint's table of leaves: the layout, and where in it the weights are.

    Both are None for what plain Orbax wrote.
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
        if str(_tree.key_dtype(leaf.impl)) != leaf.dtype:
            raise ValueError(f"keys of {leaf.impl} are of dtype {leaf.dtype}")
    elif leaf.dtype and not (storable(leaf.dtype) and _is_name(leaf.dtype)):
        raise ValueError(f"{leaf.name} is of dtype {leaf.dtype}, which is not known")


@functools.cache
def _is_name(dtype: str) -> bool:
    """Tell whether this is the name by which a dtype is recorded, and no other one."""
    return str(jnp.dtype(dtype)) == dtype


def check_like(like: Any) -> None:
    """Check that `like` is no path.

    Raises:
        SettingError: If it is one: the arguments were swapped.
    """
    if isinstance(like, os.PathLike) or (
        isinstance(like, str) and (os.sep in like or like in ("latest", "best"))
    ):  # other text is a tree of one leaf
        raise SettingError(
            "like", like, "it is the wanted tree. Paths go to load, or as which=."
        )


def foreign(directory: Path) -> list[str]:
    """Name the checkpoints in a directory that plain Orbax wrote."""
    return [
        each.name
        for each in _entries(directory)
        if not each.name.startswith(".")
        and not _is_ours(each)
        and any(os.path.isfile(each / name) for name in _ORBAX_FILES)
        and _is_orbax(each)
    ]


def _is_ours(path: Path) -> bool:
    """Tell whether flaxckpt wrote a checkpoint; not, if this process cannot know."""
    try:
        return is_checkpoint(path)
    except CheckpointPathError:
        return False


def _is_orbax(path: Path) -> bool:
    try:
        with quiet():
            return os.path.isdir(path) and ocp.is_orbax_checkpoint(path)
    except Exception:  # as where this process may not look
        return False


def _found(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise SettingError(
            "path", f"<{type(path).__name__}>", "pass the path of a checkpoint first."
        )
    found = Path(os.path.abspath(os.path.expanduser(path)))
    if is_checkpoint(found) or _is_orbax(found):
        return found
    if (
        found.is_dir()
        and not is_checkpoint(found.parent)
        and _is_orbax(found.parent)
        and found.name in _items(found.parent)
    ):
        return found
    beside = found if found.is_dir() else found.parent
    names = [each.name for each in _entries(beside) if _is_ours(each)]
    names += foreign(beside)
    raise CheckpointNotFoundError(str(found), tuple(names))


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:  # not there, or not for this process
        return []


def _context(*, is_database: bool = True, compress: bool = False) -> v1.Context:
    """Return Orbax's settings for all that is written and read here.

    Its sharding file stays on: without it, plain `ocp.load(path)` finds no place for
    the arrays. Directories are made synchronously: otherwise Orbax waits for signals
    that it finds by a global number of the save, which another thread's save changes,
    and writes before there are directories, or hangs.
    """
    context = v1.Context()
    context.asynchronous.create_directories_asynchronously = False
    context.array.saving.use_ocdbt = is_database
    context.array.saving.use_compression = compress
    context.array.saving.enable_post_merge_validation = False
    context.memory.deepcopy_host_arrays = False
    return context
