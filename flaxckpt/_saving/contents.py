"""The trees that one call saves, with their layouts."""

from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flaxckpt._checkpoints.series_writer import Page
from flaxckpt._copies.plan import kinds_of
from flaxckpt._copies.programs import Kind
from flaxckpt._saving.call import Call, OnDevice, Undecided, fetched_value, is_unknown
from flaxckpt._trees.layout import Layout
from flaxckpt._trees.skeleton import Skeleton

# By default, several saves may be under way where all their copies fit into this.
_SMALL_BYTES = 64 * 2**20
_MAX_IN_FLIGHT = 8


@dataclass
class StoredTree:
    """A tree to write: the whole state, or its weights.

    Attributes:
        layout: Its layout.
        leaves: Its leaves, until the copies take their place.
        weights: Where in the layout the weights are.
        frozen: Positions of the frozen leaves.
        own: Positions of the leaves that each process has for itself.
        kinds: Shape, dtype and sharding of each leaf; None if it is no JAX array.
    """

    layout: Layout
    leaves: list[Any]
    weights: Skeleton
    frozen: list[int]
    own: list[int]
    kinds: list[Kind | None]

    def page(self, path: Path, leaves: list[Any], *, in_slot: bool) -> Page:
        """Return what to write at a path, with copies of the leaves."""
        return Page(path, in_slot, self.layout, leaves, self.weights, self.own)


@dataclass
class Contents:
    """The trees that a job writes, from the last of its calls that saves.

    Attributes:
        series: The tree for the series; None if it gets nothing.
        slot: The tree for the slot; None for no slot. If it is the same object as
            `series`, the slot gets it only if the series does not.
        path: The path in the series; None if it is not known yet.
        scalars: Names of the scalars to copy with the leaves; see `Call.scalars`.
        calls: The calls, the latest last.
    """

    series: StoredTree | None
    slot: StoredTree | None
    path: Path | None
    scalars: list[tuple[str, str]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    @property
    def trees(self) -> list[StoredTree]:
        """The trees to copy, each once."""
        slot = None if self.slot is self.series else self.slot
        return [tree for tree in (self.series, slot) if tree is not None]

    def leaves(self, call: Call) -> tuple[list[Any], list[Kind | None]]:
        """Return the leaves to copy, followed by the scalars on devices, and all kinds.

        A frozen leaf that is stored already comes as a `FrozenLeaf`. The save does not
        copy it.
        """
        leaves = list(chain.from_iterable(tree.leaves for tree in self.trees))
        kinds = list(chain.from_iterable(tree.kinds for tree in self.trees))
        for position, frozen in call.frozen.items():
            if frozen.digest:
                leaves[position], kinds[position] = frozen, None
        scalars = call.scalars() if self.scalars else {}
        leaves += [scalars[name] for name in self.scalars]
        kinds += kinds_of(leaves[len(kinds) :])
        return leaves, kinds

    def take_up_scalars(self, call: Call, *, waits: bool = False) -> None:
        """Have scalars on devices copied with the trees; the loop may donate them.

        Args:
            call: The call, which has the scalars.
            waits: Whether to fetch each scalar that is on other devices than the tree,
                and not only those that are computed already.
        """
        leaves = self.trees[0].leaves
        array = next((leaf for leaf in leaves if isinstance(leaf, jax.Array)), None)
        self.scalars = []
        for name, value in call.scalars().items():
            if array is not None and (
                value.sharding.device_set == array.sharding.device_set
            ):
                self.scalars.append(name)
            elif not waits and (array is None or is_unknown(value)):
                self.scalars.append(name)
            else:
                call.keep(name, fetched_value(value))

    def wanted(self, call: Call) -> Any:
        """Tell whether to copy, a bool or bool[]; a slot takes any state."""
        if isinstance(call.decision, OnDevice) and self.slot is None:
            return call.decision.flag
        return np.True_

    def decided(self, call: Call) -> "Contents":
        """Return what to save of these contents, after the call was judged."""
        contents = replace(self, series=None) if call.skips else self
        contents.take_up_scalars(call)
        return contents

    def key(self, call: Call) -> Any:
        """Return the key of a job: it supersedes a waiting job of an equal key."""
        if call.skips:
            where = line = None  # any later state supersedes it in the slot
        elif self.path is None:
            return None
        elif isinstance(call.decision, OnDevice | Undecided) and self.slot is not None:
            return None  # the device decides between the series and the slot
        else:
            where, line = self.path, call.line
        trees = [tree for tree in (self.series, self.slot) if tree is not None]
        layouts = [(tree.layout, tree.weights) for tree in trees]
        return where, line, self.scalars, layouts

    def limit(self) -> int:
        """Return how many saves of this size may be under way by default."""
        size = sum(tree.layout.nbytes for tree in self.trees)
        return min(max(_SMALL_BYTES // max(size, 1), 1), _MAX_IN_FLIGHT)
