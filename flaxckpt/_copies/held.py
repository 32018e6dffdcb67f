"""Copies that a save holds until they are written, on devices or on the host."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from flaxckpt._copies.plan import Plan
from flaxckpt._trees.owned_shards import Shards


class HostCopy(np.ndarray[Any, Any]):
    """The values of an array, on the host; knows where it was.

    Attributes:
        sharding: The array's.
    """

    sharding: jax.sharding.Sharding

    def placed(self) -> jax.Array:
        """Return it as the array it was."""
        with jax.enable_x64(True):  # whatever this thread is set to
            return jax.device_put(np.asarray(self), self.sharding)


@dataclass
class Copies:
    """Copies of a tree's leaves.

    Attributes:
        plan: How they are held; None if nothing was copied on a device.
        arrays: The copies on devices, group by group.
        beside: The other leaves, and copies of offloaded arrays, each in its position.
        verdict: What the device was asked to decide; see `fill_if_better`. None for
            nothing.
    """

    plan: Plan | None
    arrays: list[jax.Array]
    beside: list[Any]
    verdict: Any = None

    def settle(self) -> None:
        """Take up what a device has decided: if that is interrupted, do it again."""
        if self.verdict is not None:
            self.arrays[:] = self.verdict[2]

    @property
    def is_filled(self) -> bool:
        """Whether all of them are there."""
        self.settle()
        groups = () if self.plan is None else self.plan.groups
        return len(self.arrays) == sum(len(group.shardings) for group in groups)

    def memory(self) -> "Copies":
        """Return what of these copies the next ones can use the memory of."""
        if self.plan is not None:
            return Copies(self.plan, self.arrays, [])  # the same list, to be filled
        kinds = np.ndarray, Shards
        held = [leaf if isinstance(leaf, kinds) else None for leaf in self.beside]
        return Copies(None, [], held)

    def refilled(self, newer: "Copies") -> "Copies":
        """Return these copies, in whose memory newer ones may have been made."""
        if self.plan is None or newer.plan is not self.plan:
            return self
        return Copies(self.plan, newer.arrays, self.beside)

    def leaves(self) -> list[Any]:
        """Return the leaves; small arrays as `HostCopy`."""
        found, arrays = list(self.beside), iter(self.arrays)
        for group in () if self.plan is None else self.plan.groups:
            for index in group.alone:
                found[index] = next(arrays)
            for pack in group.packs:
                # Of a shard, since an array holds on to its own values.
                shard = next(arrays).addressable_shards[0]
                self._unpack(np.asarray(shard.data), pack, found)
        return found

    def _unpack(self, values: Any, pack: list[int], found: list[Any]) -> None:
        assert self.plan is not None
        at, values = 0, values.view(HostCopy)
        for index in pack:
            kind = self.plan.kinds[index]
            assert kind is not None
            size = math.prod(kind[0])
            leaf = found[index] = values[at : at + size].reshape(kind[0])
            leaf.sharding = kind[2]
            at += size
