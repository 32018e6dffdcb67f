"""The public functions that read one checkpoint: `load`, `load_weights`, `verify`."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from flaxckpt._checkpoints.read import load_tree, read, read_table
from flaxckpt._checkpoints.undisturbed import undisturbed
from flaxckpt._disk.info import CheckpointInfo, Loaded
from flaxckpt._disk.record import read_record
from flaxckpt._object_store.url import is_url
from flaxckpt._trees.leaf import Leaf
from flaxckpt._trees.match import on_host
from flaxckpt._trees.stored_weights import plain_weights
from flaxckpt._trees.ties import PyTree, flatten
from flaxckpt.errors import CheckpointError, SettingError, UnsupportedLeafError

_BATCH_BYTES = 256 * 2**20


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
        >>> import numpy as np
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
        layout, _ = read_table(where)
        tree = load_tree(where, layout, None, like, cast=cast, check=verify)
        return Loaded(tree, info)

    return undisturbed(path, read)


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
        layout, weights = read_table(where)
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
        return Loaded(
            load_tree(where, layout, part, like, cast=cast, check=verify), info
        )

    loaded = undisturbed(path, read)
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
        >>> import numpy as np
        >>> with flaxckpt.ModelCheckpoint("runs/{epoch}") as ckpt:
        ...     path = ckpt.save({"w": np.arange(3)}, epoch=0)
        >>> flaxckpt.verify(path)
    """
    undisturbed(path, _verify)


def _verify(path: Path) -> None:
    layout, _ = read_table(path)
    if layout is None:
        raise CheckpointError(
            f"Checkpoint {str(path)!r} was written by plain Orbax, which records no "
            "digests: there is nothing to check it by. Load it, to see if it can be "
            "read."
        )
    for indices in batches(layout.leaves):
        wanted = {index: on_host(layout.leaves[index]) for index in indices}
        read(path, layout, wanted, check=True)


def batches(leaves: Sequence[Leaf]) -> Iterator[list[int]]:
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


def check_like(like: Any) -> None:
    """Check that `like` is a tree.

    Raises:
        SettingError: If it is a path: the arguments were swapped.
        UnsupportedLeafError: If JAX cannot flatten it.
    """
    if isinstance(like, os.PathLike) or (
        isinstance(like, str) and (os.sep in like or like in ("latest", "best"))
    ):  # other text is a tree of one leaf
        raise SettingError(
            "like", like, "it is the wanted tree. Paths go to load, or as which=."
        )
    try:
        flatten(like)
    except UnsupportedLeafError as error:
        raise UnsupportedLeafError(error.leaves, "restored") from error
