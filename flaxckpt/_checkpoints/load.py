"""The public functions that read one checkpoint: `load`, `load_weights`, `verify`."""

import contextlib
import dataclasses
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from etils import epath

from flaxckpt._checkpoints.load_tree import load_tree
from flaxckpt._checkpoints.loaded_in_all import loaded_in_all
from flaxckpt._checkpoints.read import Sums, batches, read
from flaxckpt._checkpoints.read_table import read_table
from flaxckpt._checkpoints.undisturbed import undisturbed
from flaxckpt._disk.info import CheckpointInfo, Loaded
from flaxckpt._disk.record import read_record
from flaxckpt._object_store.source import Place
from flaxckpt._object_store.url import is_url
from flaxckpt._processes.messages import are_several
from flaxckpt._runtime.collector import paused_collector
from flaxckpt._trees.layout import Layout
from flaxckpt._trees.stored_weights import plain_weights
from flaxckpt._trees.ties import PyTree, flatten
from flaxckpt._trees.wanted import on_host
from flaxckpt.errors import CheckpointError, SettingError, UnsupportedLeafError


def load(
    path: str | os.PathLike[str],
    like: PyTree = None,
    *,
    cast: bool = False,
    verify: bool = True,
    with_info: bool = False,
) -> Any:
    """Load the tree of a checkpoint that flaxckpt or plain Orbax wrote.

    A checkpoint of plain Orbax may have several items, none of which has a default name
    (`state`, `pytree` or `default`). Then the tree is a dict of all items by their
    names, and `path/name` loads one item.

    If there are several processes, each must call this.

    Args:
        path: The checkpoint's directory, or a `gs://` or `s3://` URL. A
            `CheckpointInfo` loads only the very checkpoint that it describes.
        like: A tree of the wanted structure, of arrays or `jax.ShapeDtypeStruct`s; it
            is not changed. Each leaf is restored with the dtype, shape and kind of
            value of the leaf in `like`, onto that leaf's sharding and memory, whatever
            mesh wrote it. A struct whose sharding names no devices goes to the devices
            of `jax.set_mesh`. A sharding in place of a leaf or subtree places what is
            stored there. Functions are taken from `like`. What an NNX module in `like`
            shares is shared in the result. None, for the whole or a part: what is
            stored there, as plain dicts, lists and tuples, with JAX arrays on the
            default device, and None for functions. NNX modules and states become the
            dicts that `nnx.update` and `nnx.replace_by_pure_dict` take.
        cast: Convert arrays if only their dtype differs from the wanted dtype, rather
            than raise.
        verify: Check each leaf against the digest of what was saved. Plain Orbax
            records no digests.
        with_info: Return a `Loaded`: the tree, and the checkpoint's record.

    Returns:
        The tree, with the structure of `like` if that is given.

    Raises:
        CheckpointNotFoundError: If there is no checkpoint at `path`, or `path` is a
            `CheckpointInfo` and another checkpoint has taken its place.
        CheckpointMismatchError: If the structure, a shape or a dtype differs from
            `like`; lists every such leaf. It comes before flaxckpt reads values, unless
            only the values show the difference.
        CheckpointCorruptError: If it cannot be read, or is not what was saved.
        CheckpointPathError: If this process cannot read it.
        UnsupportedLeafError: If `like` has leaves that are no values.
        SettingError: If `path` is no path, or `like` is one.
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
    """Load a tree and its record, as `load` does."""
    check_like(like)

    def read(where: Place, sums: Sums) -> Loaded:
        info = _info_of(path, where.path)
        layout, _ = read_table(where.path)
        with _quick(where, layout):
            tree = load_tree(where, layout, None, like, sums, cast=cast, check=verify)
        return Loaded(tree, info)

    return loaded_in_all(path, like, read)


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
    """Load only the weights, from a checkpoint of weights or of a whole state.

    The `weights` of the `ModelCheckpoint` that saved it chose the weights. In a
    checkpoint of plain Orbax, names tell: the weights are `params` and the mappings
    beside it if there is an `opt_state` or the like, and otherwise the whole tree. Of
    several items, they are those without the name of an optimizer, metrics and the
    like.

    If there are several processes, each must call this.

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
        CheckpointError: If `weights` computed the weights rather than picked them, so
            that a checkpoint of the whole state does not hold them; if it holds no
            weights; and as `load`.
    """
    check_like(like)

    def read(where: Place, sums: Sums) -> Loaded:
        info = _info_of(path, where.path)
        layout, weights = read_table(where.path)
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
        with _quick(where, layout):
            tree = load_tree(where, layout, part, like, sums, cast=cast, check=verify)
        return Loaded(tree, info)

    loaded = loaded_in_all(path, like, read)
    return loaded if with_info else loaded.tree


def _quick(place: Place, layout: Layout | None) -> AbstractContextManager[None]:
    """Pause the collector of garbage in a load that takes no longer than seconds."""
    if place.source or are_several() or layout is None or layout.nbytes > 2**30:
        return contextlib.nullcontext()
    return paused_collector()


def verify(path: str | os.PathLike[str]) -> None:
    """Check that a checkpoint holds what was saved, bit for bit.

    Needs no accelerator, and memory for its largest leaf, or 256 MiB if that is more.

    Args:
        path: The checkpoint's directory, or a `gs://` or `s3://` URL.

    Raises:
        CheckpointNotFoundError: If there is no checkpoint at `path`.
        CheckpointCorruptError: If leaves cannot be read, or differ from what was saved;
            names the leaves and their files.
        CheckpointPathError: If this process cannot read it.
        CheckpointError: If plain Orbax wrote it, which records no digests.

    Example:
        >>> import flaxckpt
        >>> import numpy as np
        >>> with flaxckpt.ModelCheckpoint("runs/{epoch}") as ckpt:
        ...     path = ckpt.save({"w": np.arange(3)}, epoch=0)
        >>> flaxckpt.verify(path)
    """
    undisturbed(path, _verify)


def _verify(place: Place) -> None:
    layout, _ = read_table(place.path)
    if layout is None:
        raise CheckpointError(
            f"Checkpoint {str(place.path)!r} was written by plain Orbax, which records "
            "no digests: there is nothing to check it by. Load it, to see if it can be "
            "read."
        )
    for indices in batches(layout.leaves):
        wanted = {index: on_host(layout.leaves[index]) for index in indices}
        read(place, layout, wanted, check=True)


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
