"""The trees that one call saves, with their layouts."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxckpt._saving.call import Entry
from flaxckpt._saving.job import Job
from flaxckpt._trees.layout import Layout
from flaxckpt._trees.skeleton import Skeleton
from flaxckpt._trees.ties import PyTree
from flaxckpt.errors import SettingError

# By default, several saves may be under way where all their copies fit into this.
SMALL_BYTES = 64 * 2**20
MAX_IN_FLIGHT = 8
STRUCTURES = 4  # so many structures of saved trees are remembered


@dataclass
class Part:
    """A tree to write: the whole state, or its weights.

    Attributes:
        layout: Its layout.
        leaves: Its leaves, until the copies take their place.
        weights: Where in the layout the weights are.
        frozen: Positions of the frozen leaves.
    """

    layout: Layout
    leaves: list[Any]
    weights: Skeleton
    frozen: list[int]


@dataclass
class Save:
    """The trees that a job writes, from the last of its entries that saves.

    Attributes:
        part: The tree for the series.
        whole: The tree for the slot; None for no slot. Where it is the same object as
            `part`, the slot gets it only if the series does not.
        path: The path in the series; None if it is not known yet.
        scalars: Names of the scalars to copy with the leaves; see `Entry.scalars`.
        entries: The calls, the latest last.
    """

    part: Part
    whole: Part | None
    path: Path | None
    scalars: list[tuple[str, str]] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)

    @property
    def parts(self) -> list[Part]:
        """The trees to copy."""
        if self.whole is None or self.whole is self.part:
            return [self.part]
        return [self.part, self.whole]

    def leaves(self, entry: Entry) -> list[Any]:
        """Return the leaves to copy, followed by the scalars on devices.

        A frozen leaf that is stored already is there as a `FrozenLeaf`, which no copy
        is made of.
        """
        leaves = [leaf for part in self.parts for leaf in part.leaves]
        for position, frozen in entry.frozen.items():
            if frozen.digest:
                leaves[position] = frozen
        if self.scalars:
            scalars = entry.scalars()
            leaves += [scalars[name] for name in self.scalars]
        return leaves


@dataclass(frozen=True)
class Sent:
    """Stands for a leaf that a program hands over.

    Attributes:
        index: The leaf's position in `Parts.sent`.
    """

    index: int


class Parts:
    """The trees that a traced call may save.

    Attributes:
        sent: The values of the trace that the program hands over, each once.
        kinds: Their shapes and dtypes, as the host gets them.
    """

    def __init__(self, part: Part, whole: Part | None) -> None:
        """Gather the leaves.

        Args:
            part: The tree for the series.
            whole: The tree for the slot; None for no slot.
        """
        found: dict[int, tuple[int, jax.Array]] = {}
        for each in (part, whole):
            for leaf in () if each is None else each.leaves:
                if isinstance(leaf, jax.Array):
                    found.setdefault(id(leaf), (len(found), leaf))
        self.sent = [leaf for _, leaf in found.values()]
        self.kinds = [_kind_on_host(leaf) for leaf in self.sent]
        for each in (part, whole):
            if each is not None:
                each.leaves = [
                    Sent(found[id(leaf)][0]) if isinstance(leaf, jax.Array) else leaf
                    for leaf in each.leaves
                ]
        self._part, self._whole = part, whole

    def copies(self) -> tuple[Part, Part | None]:
        """Return copies of the parts, for one save."""
        part = replace(self._part, leaves=list(self._part.leaves))
        if self._whole is None:
            return part, None
        if self._whole is self._part:
            return part, part
        return part, replace(self._whole, leaves=list(self._whole.leaves))


@dataclass
class Incoming:
    """A save whose leaves a program is handing over.

    Attributes:
        job: The job that writes it.
        save: The trees.
        entry: The call.
        where: The path of the checkpoint or the slot; None if it is not known.
        memory: The arrays to copy the leaves to.
    """

    job: Job
    save: Save
    entry: Entry
    where: Path | None
    memory: list[np.ndarray[Any, Any]]


def refusal_of_nothing(tree: PyTree, *, is_picked: bool) -> SettingError:
    """Make the error for a tree that has no values to save."""
    is_short = tree is None or (isinstance(tree, dict | list | tuple) and not tree)
    shown = tree if is_short else f"<{type(tree).__name__}>"
    if is_picked:
        advice = (
            "these are the weights of the tree, and hold no array, number or text. "
            "Pass save_weights_only=False, or a `weights` that picks some."
        )
        return SettingError("weights(tree)", shown, advice)
    advice = (
        "it holds no array, number or text, so a checkpoint of it would be empty. If "
        "a filter made it, the filter matched nothing."
    )
    return SettingError("tree", shown, advice)


def _kind_on_host(leaf: jax.Array) -> tuple[tuple[int, ...], Any]:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return leaf.shape, np.dtype(leaf.dtype)
