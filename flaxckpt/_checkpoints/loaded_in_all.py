"""Loads a checkpoint in all processes of a run, or in none of them."""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec, Sharding

from flaxckpt._checkpoints.load_tree import Read
from flaxckpt._checkpoints.read import Sums, damage
from flaxckpt._checkpoints.undisturbed import undisturbed
from flaxckpt._object_store.source import Place
from flaxckpt._processes.messages import are_several, at_work, joined
from flaxckpt._runtime.patience import TRIES
from flaxckpt._trees.digest import is_sum
from flaxckpt._trees.ties import PyTree, leaves_of
from flaxckpt.errors import CheckpointError


def loaded_in_all(
    path: str | os.PathLike[str],
    like: PyTree,
    read: Callable[[Place, Sums], Read],
) -> Read:
    """Load a checkpoint; if arrays span several processes, each of them calls this.

    Args:
        path: The checkpoint.
        like: The wanted tree.
        read: Loads it, and notes what the processes have to add up.

    Raises:
        CheckpointError: The error of any process; also if the checkpoint was replaced
            so often that the processes never read the same one.
    """
    if not (are_several() and any(map(_is_shared, leaves_of(like)))):
        return undisturbed(path, lambda place: read(place, Sums()))
    for _ in range(TRIES):
        sums = Sums()
        loaded: Any = None
        try:
            with at_work("loaded"):
                loaded = undisturbed(path, functools.partial(_read, read, sums))
            info = loaded.info
            account: Any = [info and [str(info.time), info.series], sums.totals]
        except Exception as error:
            account = error
        digests = [leaf.digest for leaf in sums.leaves]
        compare = functools.partial(_damaged, digests)
        damaged = joined("loaded", account, compare)
        if damaged:
            assert sums.place is not None
            raise damage(sums.place, [sums.leaves[index] for index in damaged])
        if damaged is not None:
            return loaded
    raise CheckpointError(
        f"Checkpoint {str(path)!r} was replaced so often that the processes never read "
        "the same one. Read it when it is not being written, or save less often."
    )


def _read(read: Callable[[Place, Sums], Read], sums: Sums, place: Place) -> Read:
    return read(place, sums.begin(place))


def _is_shared(leaf: Any) -> bool:
    """Tell whether a wanted leaf spans several processes, as far as it shows."""
    if isinstance(leaf, PartitionSpec):
        return True
    sharding = leaf if isinstance(leaf, Sharding) else getattr(leaf, "sharding", None)
    return isinstance(sharding, jax.sharding.Sharding) and not (
        sharding.is_fully_addressable
    )


def _damaged(digests: list[str], accounts: Sequence[Any]) -> list[int] | None:
    """Return which leaves have not their digest; None if they are not of one save."""
    marks, totals = zip(*accounts, strict=True)
    if any(mark != marks[0] for mark in marks):
        return None
    sums = map(sum, zip(*totals, strict=True))
    pairs = enumerate(zip(sums, digests, strict=True))
    return [index for index, (total, digest) in pairs if not is_sum(total, digest)]
