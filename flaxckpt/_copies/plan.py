"""Which arrays of a tree are copied together: a plan for each list of kinds.

Each argument and each result of a jitted call costs some microseconds. So small arrays
on one device are joined into one. XLA takes longer than in proportion to compile a
program over more arrays, so a program copies at most `MOST_TOGETHER` of them. Arrays of
the same kind stand together, so many batches share one program.
"""

import functools
import math
from collections import deque
from collections.abc import Sequence
from operator import attrgetter, itemgetter
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from flaxckpt._copies.memory_kinds import is_offloaded
from flaxckpt._copies.packing import PACKED, SMALL_BYTES
from flaxckpt._copies.programs import Kind, Program, program
from flaxckpt._runtime.jax_internals import device_order

MOST_TOGETHER = 128
_REMEMBERED = 16
_PACKED = frozenset(map(jnp.dtype, PACKED | {"complex64", "complex128"}))
_MANY = 4  # fewer small arrays than this are copied one by one


class Batch:
    """Arrays on the same devices, which one program copies.

    Attributes:
        alone: Positions of the leaves that are copied one by one.
        packs: For each pack, the positions of the leaves that are copied into one
            array; they have the same dtype and sharding.
        number: How many copies there are: the leaves in `alone` first, then the packs.
    """

    def __init__(self, indices: Sequence[int], kinds: Sequence[Kind | None]) -> None:
        """Pack small arrays.

        Args:
            indices: Positions of the arrays.
            kinds: Shape, dtype and sharding of each leaf.
        """
        self._kinds: Sequence[Any] = kinds
        self.alone: list[int] = []
        packs: dict[Any, list[int]] = {}
        for index in indices:
            shape, dtype, sharding = self._kinds[index]
            if _is_small(shape, dtype, sharding):
                packs.setdefault((dtype, sharding), []).append(index)
            else:
                self.alone.append(index)
        self.packs = [pack for pack in packs.values() if len(pack) >= _MANY]
        self.alone += [i for pack in packs.values() if len(pack) < _MANY for i in pack]
        self.number = len(self.alone) + len(self.packs)

    def pick(self, leaves: Sequence[Any]) -> tuple[list[Any], list[list[Any]]]:
        """Return the leaves in `alone`, and the leaves of each pack."""
        packs = [list(itemgetter(*pack)(leaves)) for pack in self.packs]
        return [leaves[index] for index in self.alone], packs

    @functools.cached_property
    def program(self) -> Program:
        """The program that copies, which batches of the same kinds share."""
        alone = tuple(self._kinds[index] for index in self.alone)
        packs = tuple(tuple(self._kinds[i] for i in pack) for pack in self.packs)
        return program(alone, packs)


class Plan:
    """How the arrays among the leaves of a tree are copied.

    Attributes:
        kinds: Shape, dtype and sharding of each leaf; None if it is no JAX array.
        batches: The arrays that programs copy. Batches of one kind come first, then
            mixed ones for each set of devices. A small array may be in two batches.
        offloaded: Positions of the arrays outside their devices' default memory.
            Programs cannot copy them.
        others: Positions of the leaves that are no JAX arrays.
    """

    def __init__(self, kinds: list[Kind | None]) -> None:
        """Sort the arrays into batches."""
        self.kinds = kinds
        by_kind: dict[Any, list[int]] = {}
        for index, kind in enumerate(kinds):
            by_kind.setdefault(kind, []).append(index)
        self.others = by_kind.pop(None, [])
        self.offloaded: list[int] = []
        self.batches: list[Batch] = []
        self._rest: dict[Any, list[int]] = {}
        of_one_kind: list[list[int]] = []
        # Largest first, so scalars of metrics are in the last mixed batch.
        for kind in sorted(by_kind, key=nbytes, reverse=True):
            indices, left = by_kind[kind], len(by_kind[kind]) % MOST_TOGETHER
            if is_offloaded(kind[2]):
                self.offloaded += indices
                continue
            if 0 < left < len(indices) - left and _is_small(*kind):
                # To copy small arrays twice costs less than one more program.
                indices, left = indices[:-left] + indices[-MOST_TOGETHER:], 0
            whole = len(indices) - left
            of_one_kind.append(indices[:whole])
            self._rest.setdefault(device_order(kind[2]), []).extend(indices[whole:])
        for indices in (*of_one_kind, *self._rest.values()):
            for start in range(0, len(indices), MOST_TOGETHER):
                self.batches.append(
                    Batch(indices[start : start + MOST_TOGETHER], kinds)
                )

    def copy_kinds(self) -> list[Kind]:
        """Return shape, dtype and sharding of each copy, batch by batch."""
        return [kind for batch in self.batches for kind in batch.program.copy_kinds]

    def is_on_one_mesh(self, *scalars: Any) -> bool:
        """Tell whether arrays and scalars are on the same devices, none offloaded."""
        placed = [x.sharding for x in scalars if isinstance(x, jax.Array)]
        if self.offloaded or any(map(is_offloaded, placed)):
            return False
        return len({*self._rest, *map(device_order, placed)}) == 1


class Plans:
    """Remembers the latest plans: leaves of the same kinds get the same object."""

    def __init__(self) -> None:
        """Remember nothing yet."""
        self._known: deque[Plan] = deque(maxlen=_REMEMBERED)

    def plan(self, kinds: list[Kind | None]) -> Plan:
        """Plan how to copy leaves of these kinds; see `kinds_of`."""
        for plan in tuple(self._known):
            if plan.kinds == kinds:
                return plan
        plan = Plan(kinds)
        self._known.appendleft(plan)
        return plan


def kinds_of(leaves: Sequence[Any]) -> list[Kind | None]:
    """Return shape, dtype and sharding of each leaf; None if it is no JAX array."""
    one_of_each = dict(zip(map(type, leaves), leaves, strict=True))
    arrays = set(map(type, filter(is_array, one_of_each.values())))
    return [_KIND(leaf) if type(leaf) in arrays else None for leaf in leaves]


def is_array(leaf: Any) -> bool:
    """Tell whether a leaf is a JAX array, and not traced."""
    return isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)


# Returns the kind of an array, or of a struct with a sharding.
kind_of = attrgetter("shape", "dtype", "sharding")
_KIND = attrgetter("aval.shape", "aval.dtype", "sharding")  # of arrays, faster


def nbytes(kind: Any) -> int:
    """Return the bytes of an array of a kind."""
    return math.prod(kind[0]) * kind[1].itemsize


def _is_small(shape: Any, dtype: Any, sharding: Any) -> bool:
    return (
        isinstance(sharding, jax.sharding.SingleDeviceSharding)
        and math.prod(shape) * dtype.itemsize <= SMALL_BYTES
        and dtype in _PACKED
    )
