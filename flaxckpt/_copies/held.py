"""Copies, on devices or on the host, that a save holds until it is written."""

import math
from dataclasses import dataclass
from typing import Any, TypeGuard

import jax
import numpy as np

from flaxckpt._copies.plan import Plan


class HostCopy(np.ndarray[Any, Any]):
    """An array's values on the host, with the sharding that the array had.

    Attributes:
        sharding: The array's sharding.
    """

    sharding: jax.sharding.Sharding

    def array(self) -> jax.Array:
        """Put the values back onto devices, in `sharding`."""
        with jax.enable_x64(True):  # without it, JAX narrows 64-bit values
            return jax.device_put(np.asarray(self), self.sharding)


@dataclass
class Copies:
    """Copies of a tree's leaves.

    Attributes:
        plan: How `arrays` is batched and packed; None if no program made copies.
        arrays: The copies that programs made on devices, batch by batch.
        beside: One entry for each leaf: its value if it is not in `arrays`, else None.
            Copies of offloaded arrays are here.
        is_blank: Whether the values in `arrays` are of no use; only the memory is.
    """

    plan: Plan | None
    arrays: list[jax.Array]
    beside: list[Any]
    is_blank: bool = False

    @property
    def is_filled(self) -> bool:
        """Whether every batch of the plan was copied."""
        batches = () if self.plan is None else self.plan.batches
        return len(self.arrays) == sum(batch.number for batch in batches)

    def memory(self) -> "Copies":
        """Return the copies whose memory the next save can use."""
        if self.plan is not None:
            # This list may be filled later.
            return Copies(self.plan, self.arrays, [], self.is_blank)
        held = [leaf if isinstance(leaf, np.ndarray) else None for leaf in self.beside]
        return Copies(None, [], held)

    def refilled(self, newer: "Copies") -> "Copies":
        """Return these copies, with the arrays of `newer` if it took their memory."""
        if self.plan is None or newer.plan is not self.plan:
            return self
        return Copies(self.plan, newer.arrays, self.beside)

    def leaves(self) -> list[Any]:
        """Return the leaves in order; arrays that were packed come as `HostCopy`."""
        found, arrays = list(self.beside), iter(self.arrays)
        for batch in () if self.plan is None else self.plan.batches:
            for index in batch.alone:
                found[index] = next(arrays)
            for pack in batch.packs:
                # `np.asarray` of the whole array would keep the values with the array.
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


def fits(copies: Copies | None, plan: Plan) -> TypeGuard[Copies]:
    """Tell whether these are copies of the plan, so new ones can take their memory."""
    return copies is not None and copies.plan is plan
