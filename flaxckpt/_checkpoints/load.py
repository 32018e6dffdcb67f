"""The public functions that read one checkpoint: `load`, `load_weights`, `verify`."""

import contextlib
import dataclasses
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from etils import epath

from flaxckpt._checkpoints.load_tree import Options, Read, load_tree, put_states
from flaxckpt._checkpoints.loaded_in_all import loaded_in_all
from flaxckpt._checkpoints.read import Sums, batches, read
from flaxckpt._checkpoints.read_table import read_table
from flaxckpt._checkpoints.undisturbed import undisturbed
from flaxckpt._disk.info import CheckpointInfo, Loaded, LoadReport
from flaxckpt._disk.record import read_record
from flaxckpt._object_store.source import Place
from flaxckpt._object_store.url import is_url
from flaxckpt._processes.messages import are_several
from flaxckpt._runtime.collector import paused_collector
from flaxckpt._runtime.frames import outside
from flaxckpt._trees.layout import Layout
from flaxckpt._trees.renaming import Rename
from flaxckpt._trees.selection import Select
from flaxckpt._trees.skeleton import Skeleton
from flaxckpt._trees.stored_weights import plain_weights
from flaxckpt._trees.ties import MODULE, PyTree, flatten, role_of
from flaxckpt._trees.wanted import on_host
from flaxckpt._trees.weights import default_weights
from flaxckpt.errors import (
    CheckpointError,
    SettingError,
    UnsupportedLeafError,
)

_KERAS = (
    "the variables of a Keras model are set in place: call "
    "flaxckpt.integrations.keras.load_into(model, path)."
)


def load(
    path: str | os.PathLike[str],
    like: PyTree = None,
    *,
    cast: bool = False,
    verify: bool = True,
    partial: bool = False,
    select: Select | None = None,
    rename: Rename | None = None,
    with_info: bool = False,
) -> Any:
    """Load the tree of a checkpoint that flaxckpt or plain Orbax wrote, or of a file.

    The file may be one of safetensors, numpy's `.npz`, Flax's msgpack, or Keras's
    weights. The names in it, split at `.` or `/`, are the keys of nested dicts.
    A checkpoint of plain Orbax may have several items, none of which has a default name
    (`state`, `pytree` or `default`). Then the tree is a dict of all items by their
    names, and `path/name` loads one item.

    If there are several processes, each must call this.

    Args:
        path: The checkpoint's directory, a `gs://` or `s3://` URL, or a file. A
            `CheckpointInfo` loads only the very checkpoint that it describes.
        like: A tree of the wanted structure, of arrays or `jax.ShapeDtypeStruct`s. Each
            leaf is restored with the dtype, shape and kind of value of the leaf in
            `like`, onto that leaf's sharding and memory, whatever mesh wrote it. A
            struct whose sharding names no devices goes to the devices of
            `jax.set_mesh`. A sharding in place of a leaf or subtree places what is
            stored there. Functions are taken from `like`. What an NNX module in `like`
            shares is shared in the result. `like` is not changed, but for objects with
            a state, such as data iterators: they get the stored state. Where `like` is
            None, as a whole or in a part, what is stored comes as plain dicts, lists
            and tuples, with JAX arrays on the default device, and None for functions.
            NNX modules and states become the dicts that `nnx.update` and
            `nnx.replace_by_pure_dict` take.
        cast: Convert arrays if only their dtype differs from the wanted dtype, rather
            than raise.
        verify: Check each leaf against the digest of what was saved. Only flaxckpt
            records digests.
        partial: Load what the checkpoint and `like` both have. A value of `like` stays
            as it is if nothing is stored for it, or a value of another shape or kind.
            What is stored and not wanted is passed over, and not read. A warning of one
            line tells of both.
        select: The part that is loaded, alone: the path of a subtree, such as
            `"params/encoder"`. Or a function of a leaf's path, a tuple of names, and of
            its `jax.ShapeDtypeStruct`, None if it is no array; the tree then has the
            leaves for which it is true.
        rename: New names for what is stored (and selected), before it is compared with
            `like`: a mapping of prefixes, `{"old/prefix": "new/prefix"}`, where `""` is
            the root; or a function from a leaf's path, with slashes, to the new one.
        with_info: Return a `Loaded`: the tree, the checkpoint's record, and a report of
            what was loaded, kept and passed over. The report then takes the place of
            the warning.

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
        SettingError: If `path` is no path, or `like` is one; if `select` or `rename`
            names what is not stored.
        CheckpointError: If the object store cannot be reached.

    Example:
        >>> import flaxckpt
        >>> import numpy as np
        >>> with flaxckpt.ModelCheckpoint("runs/{epoch}") as ckpt:
        ...     path = ckpt.save({"w": np.arange(3), "b": (1, 2)}, epoch=0)
        >>> flaxckpt.load(path)
        {'b': (1, 2), 'w': array([0, 1, 2])}
    """
    options = Options(
        cast=cast, verify=verify, partial=partial, select=select, rename=rename
    )
    check_like(like)
    found = restore(path, like, options)
    put_states(path, found)
    return _result(path, found, with_info=with_info)


def restore(path: str | os.PathLike[str], like: PyTree, options: Options) -> Read:
    """Load a tree and its record, as `load` does, but put no states into objects."""
    return _read(path, like, [like], options, weights_only=False)


def _read(
    path: str | os.PathLike[str],
    like: PyTree,
    likes: list[PyTree],
    options: Options,
    *,
    weights_only: bool,
) -> Read:
    """Load the whole tree, or its weights, as the first of `likes` that it fits."""

    def read_at(place: Place, sums: Sums) -> Read:
        info = info_of(path, place.path)
        layout, weights = read_table(place.path)
        part = part_of_weights(path, layout, weights) if weights_only else None
        with _quick(place, layout):
            found = load_tree(place, layout, part, likes, sums, options)
        return dataclasses.replace(found, info=info)

    return loaded_in_all(path, like, read_at)


def _result(path: str | os.PathLike[str], found: Read, *, with_info: bool) -> Any:
    if with_info:
        return Loaded(found.tree, found.info, found.report)
    tell(path, found.report)
    return found.tree


def tell(path: str | os.PathLike[str], report: LoadReport) -> None:
    """Warn of what a load has kept or passed over."""
    if report.kept or report.passed_over:
        warnings.warn(
            f"Checkpoint {os.fspath(path)!r}: {report}.", stacklevel=outside()
        )


def info_of(path: str | os.PathLike[str], where: Path) -> CheckpointInfo | None:
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
    into: Any = None,
    cast: bool = False,
    verify: bool = True,
    partial: bool = False,
    select: Select | None = None,
    rename: Rename | None = None,
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
        like: A tree of the weights' structure; as for `load`. A whole state or a model,
            such as a Flax `TrainState` or an NNX module, stands for its weights, as
            `default_weights` picks them.
        into: A Flax NNX module that gets the weights, in place, instead of `like`. What
            it shares stays shared, and what is no weight stays as it is.
        cast: As for `load`.
        verify: As for `load`.
        partial: As for `load`.
        select: As for `load`; paths begin at the weights.
        rename: As for `load`; paths begin at the weights, or at what is selected.
        with_info: As for `load`.

    Returns:
        The weights; for a Flax `TrainState` a dict of `params` and the collections
        beside it, which `Module.apply` takes; for an NNX model a dict, or with `like` a
        State, which `nnx.update` takes. With `into`, that module.

    Raises:
        CheckpointError: If `weights` computed the weights rather than picked them, so
            that a checkpoint of the whole state does not hold them; if it holds no
            weights; and as `load`.
        SettingError: If `into` is no NNX module, or comes with `like`; and as `load`.
    """
    check_like(like)
    if into is not None:
        like = _state_within(into, like)
    options = Options(
        cast=cast, verify=verify, partial=partial, select=select, rename=rename
    )

    picked = default_weights(like)
    # If it is no model, a `like` that is a tree of the weights may look like more.
    likes = [picked] if picked is like or role_of(like) == MODULE else [like, picked]
    found = _read(path, like, likes, options, weights_only=True)
    put_states(path, found)
    if into is not None:
        sys.modules["flax.nnx"].update(into, found.tree)  # type: ignore[attr-defined]
        found = dataclasses.replace(found, tree=into)
    return _result(path, found, with_info=with_info)


def _state_within(into: Any, like: PyTree) -> PyTree:
    """Return the weights of an NNX module, as a State.

    Raises:
        SettingError: If it is none, or there is a `like` beside it.
    """
    if like is not None:
        raise SettingError("into", _shown(into), "pass either `like` or `into`.")
    if role_of(into) != MODULE:
        advice = "it is no Flax NNX module. Pass like=, and take what is returned."
        if _is_keras_model(into):
            advice = _KERAS
        raise SettingError("into", _shown(into), advice)
    return default_weights(into)


def _is_keras_model(value: Any) -> bool:
    keras: Any = sys.modules.get("keras")
    kind = getattr(keras, "Model", None)
    return isinstance(kind, type) and isinstance(value, kind)


def _shown(value: Any) -> str:
    return f"<{type(value).__name__}>"


def part_of_weights(
    path: object, layout: Layout | None, weights: Skeleton
) -> Skeleton | Callable[[Layout], Skeleton]:
    """Return the weights' skeleton, or what finds it in another library's layout.

    Args:
        path: The checkpoint, for the error.
        layout: The checkpoint's layout; None if another library wrote it.
        weights: What its table of leaves says of the weights.

    Raises:
        CheckpointError: If the checkpoint does not hold its weights.
    """
    if layout is None:
        return plain_weights
    if weights is None:
        raise CheckpointError(
            f"Checkpoint {str(path)!r} does not hold its weights by themselves: "
            "`weights` computed them from the tree. Save with "
            "save_weights_only=True, or load the whole tree and compute them."
        )
    if layout.leaves and not layout.part(weights)[1]:
        raise CheckpointError(
            f"Checkpoint {str(path)!r} holds no weights: the tree that was saved "
            "had none. Load the whole tree with load."
        )
    return weights


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
        by = "another library" if place.path.is_file() else "plain Orbax"
        raise CheckpointError(
            f"Checkpoint {str(place.path)!r} was written by {by}, which records no "
            "digests: there is nothing to check it by. Load it, to see if it can be "
            "read."
        )
    for indices in batches(layout.leaves):
        wanted = {index: on_host(layout.leaves[index]) for index in indices}
        read(place, layout, wanted, check=True)


def check_like(like: Any) -> None:
    """Check that `like` is a tree.

    Raises:
        SettingError: If it is a path: the arguments were swapped. If it is a Keras
            model, whose variables are set in place.
        UnsupportedLeafError: If JAX cannot flatten it.
    """
    if isinstance(like, os.PathLike) or (
        isinstance(like, str) and (os.sep in like or like in ("latest", "best"))
    ):  # other text is a tree of one leaf
        raise SettingError(
            "like", like, "it is the wanted tree. Paths go to load, or as which=."
        )
    if _is_keras_model(like):
        raise SettingError("like", _shown(like), _KERAS)
    try:
        flatten(like)
    except UnsupportedLeafError as error:
        raise UnsupportedLeafError(error.leaves, "restored") from error
