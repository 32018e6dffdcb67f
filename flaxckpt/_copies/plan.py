"""Which arrays of a tree are copied together: a plan for each structure.

Each argument and each result of a jitted call costs some microseconds. So small arrays
on one device are joined into one.
"""

import functools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from flaxckpt._copies.memory_kinds import is_offloaded
from flaxckpt._decision.state import CheckpointState
from flaxckpt._decision.step import judge

Kind: TypeAlias = tuple[tuple[int, ...], Any, jax.sharding.Sharding] | None
_SMALL_BYTES = 64 * 2**10  # arrays up to this size are packed
# XLA may change the bits of other dtypes where it joins arrays, or fail.
_PACKED = frozenset(
    [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
    + ["bool", "bfloat16", "float16", "float32", "float64", "complex64", "complex128"]
)
_MANY = 4  # fewer small arrays than this are copied one by one


@dataclass
class _Group:
    """Arrays on the same devices: a jitted call takes no arrays on different ones.

    Attributes:
        devices: The devices, in order.
        alone: Positions of the leaves that are copied one by one.
        packs: For each pack, the positions of the leaves that are copied into one
            array; they have the same dtype and sharding.
        shardings: The copies' shardings: the leaves in `alone` first, then the packs.
    """

    devices: Any
    alone: list[int] = field(default_factory=list)
    packs: list[list[int]] = field(default_factory=list)
    shardings: list[jax.sharding.Sharding] = field(default_factory=list)

    def pick(self, leaves: Sequence[Any]) -> tuple[list[Any], list[list[Any]]]:
        """Return the leaves in `alone`, and the leaves of each pack."""
        packs = [[leaves[index] for index in pack] for pack in self.packs]
        return [leaves[index] for index in self.alone], packs

    @functools.cached_property
    def work(self) -> Any:
        """Dummy arithmetic, so that JAX on CPU runs the copy asynchronously.

        JAX on CPU runs a program of fewer than 1000 floating-point operations on the
        calling thread, and a copy has no such operations.
        """
        work, sharding = np.ones(1024, np.float32), self.shardings[0]
        if isinstance(sharding, jax.sharding.NamedSharding):
            sharding = jax.sharding.NamedSharding(
                sharding.mesh, jax.sharding.PartitionSpec()
            )
        elif not isinstance(sharding, jax.sharding.SingleDeviceSharding):
            return work
        # `device_put` onto the whole sharding would compare the value in all processes,
        # and wait for them.
        parts = [jax.device_put(work, each) for each in sharding.addressable_devices]
        return jax.make_array_from_single_device_arrays(work.shape, sharding, parts)

    @functools.cached_property
    def copy(self) -> Any:
        """The jitted function that copies, into new memory if `slot` is None."""

        def copy(
            alone: list[jax.Array],
            packs: list[list[jax.Array]],
            slot: list[jax.Array] | None,
            work: jax.Array,
        ) -> tuple[list[jax.Array], jax.Array]:
            del slot  # it is donated: XLA puts the copies into its memory
            return _copied(alone, packs), jnp.sum(work * work)

        return jax.jit(
            copy,
            donate_argnums=2,
            keep_unused=True,
            out_shardings=(self.shardings, None),
        )

    @functools.cached_property
    def decide(self) -> Any:
        """The jitted function that judges, and copies only if there is a new best."""
        return self._decider(jax.lax.cond)

    @functools.cached_property
    def decide_and_copy(self) -> Any:
        """The jitted function that judges, and copies in any case."""
        return self._decider(lambda save, copy, slot: copy())

    def _decider(self, choose: Callable[..., list[jax.Array]]) -> Any:
        def decide(
            state: CheckpointState,
            value: jax.Array,
            alone: list[jax.Array],
            packs: list[list[jax.Array]],
            slot: list[jax.Array],
            work: jax.Array,
        ) -> tuple[Any, Any, list[jax.Array], jax.Array]:
            before = jnp.copy(state.best_value), jnp.copy(state.has_best)
            state, save = judge(state, {state.monitor: value}, np.True_)
            copies = choose(save, lambda: _copied(alone, packs), lambda: slot)
            best = state.best_value, state.has_best
            return (best, best, before), save, copies, jnp.sum(work * work)

        return jax.jit(
            decide,
            donate_argnums=4,
            keep_unused=True,
            out_shardings=(None, None, self.shardings, None),
        )


class Plan:
    """How the arrays among the leaves of a tree are copied.

    Attributes:
        kinds: Shape, dtype and sharding of each leaf; None if it is no JAX array.
        groups: The arrays that programs copy, by their devices.
        offloaded: Positions of the arrays outside their devices' default memory.
            Programs cannot copy them.
        beside: Positions of the leaves that are no JAX arrays.
    """

    def __init__(self, kinds: list[Kind]) -> None:
        """Group the arrays, and pack small ones."""
        self.kinds = kinds
        self.offloaded: list[int] = []
        self.beside = [index for index, kind in enumerate(kinds) if kind is None]
        groups: dict[Any, _Group] = {}
        packs: dict[tuple[Any, Any], list[int]] = {}
        for index, kind in enumerate(kinds):
            if kind is None:
                continue
            if is_offloaded(kind[2]):
                self.offloaded.append(index)
                continue
            devices = _devices(kind[2])
            group = groups.setdefault(devices, _Group(devices))
            if _is_small(kind):
                packs.setdefault((kind[1], kind[2]), []).append(index)
            else:
                group.alone.append(index)
        for (_, sharding), indices in packs.items():
            group = groups[_devices(sharding)]
            if len(indices) < _MANY:
                group.alone += indices
            else:
                group.packs.append(indices)
        for group in groups.values():
            firsts = group.alone + [pack[0] for pack in group.packs]
            group.shardings = [_sharding(kinds[index]) for index in firsts]
        self.groups = list(groups.values())

    def is_on_one_mesh(self, *scalars: Any) -> bool:
        """Tell whether arrays and scalars are on the same devices, none offloaded."""
        placed = [x.sharding for x in scalars if isinstance(x, jax.Array)]
        if self.offloaded or any(map(is_offloaded, placed)):
            return False
        devices = {group.devices for group in self.groups}
        devices.update(map(_devices, placed))
        return len(devices) == 1


def planned(leaves: Sequence[Any]) -> Plan:
    """Plan how to copy leaves; leaves of the same kinds get the same `Plan` object."""
    kinds = [
        (leaf.shape, leaf.dtype, leaf.sharding) if isinstance(leaf, jax.Array) else None
        for leaf in leaves
    ]
    for plan in tuple(_PLANS):
        if plan.kinds == kinds:
            return plan
    plan = Plan(kinds)
    _PLANS.appendleft(plan)
    return plan


_PLANS: deque[Plan] = deque(maxlen=16)


def _devices(sharding: jax.sharding.Sharding) -> Any:
    """Return a sharding's devices in order, since programs depend on the order."""
    assignment = getattr(sharding, "_device_assignment", None)
    return frozenset(sharding.device_set) if assignment is None else assignment


def _is_small(kind: Kind) -> bool:
    if kind is None:
        return False
    shape, dtype, sharding = kind
    return (
        isinstance(sharding, jax.sharding.SingleDeviceSharding)
        and str(dtype) in _PACKED
        and math.prod(shape) * dtype.itemsize <= _SMALL_BYTES
    )


def _sharding(kind: Kind) -> jax.sharding.Sharding:
    assert kind is not None
    return kind[2]


def _copied(alone: list[jax.Array], packs: list[list[jax.Array]]) -> list[jax.Array]:
    joined = [jnp.concatenate([each.reshape(-1) for each in pack]) for pack in packs]
    return [jnp.copy(array) for array in alone] + joined
