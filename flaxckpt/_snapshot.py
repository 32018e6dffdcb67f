"""Copies of a tree's arrays, so that training may donate or change its own.

Fresh memory costs 30 times more than the copying, in page faults, so the copies of one
save are donated to the next. Each array costs a call of a jitted function some
microseconds, so small ones are copied into one.
"""

import functools
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from flaxckpt._memory import copied, is_offloaded
from flaxckpt._pieces import Shards, is_shared, pieces
from flaxckpt._state import CheckpointState, judge

Kind: TypeAlias = tuple[tuple[int, ...], Any, jax.sharding.Sharding] | None

_SMALL_BYTES = 64 * 2**10  # arrays up to this size are packed
# Of others, XLA may change the bits where it joins arrays, or give up.
_PACKED = frozenset(
    [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
    + ["bool", "bfloat16", "float16", "float32", "float64", "complex64", "complex128"]
)
_MANY = 4  # so many of them at least


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
class _Group:
    """Arrays on the same devices: one call may not mix arrays of different ones.

    Attributes:
        devices: The devices, in order.
        alone: Positions of the leaves that are copied one by one.
        packs: Those of leaves that are copied into one array, of one dtype each.
        shardings: Of the copies: those alone first, then the packs.
    """

    devices: Any
    alone: list[int] = field(default_factory=list)
    packs: list[list[int]] = field(default_factory=list)
    shardings: list[jax.sharding.Sharding] = field(default_factory=list)

    def pick(self, leaves: Sequence[Any]) -> tuple[list[Any], list[list[Any]]]:
        """Return the leaves of the group."""
        packs = [[leaves[index] for index in pack] for pack in self.packs]
        return [leaves[index] for index in self.alone], packs

    @functools.cached_property
    def work(self) -> Any:
        """Something to reckon with, beside the copying.

        JAX on CPU runs what takes fewer than 1000 floating-point operations on the
        thread that calls it, and copying takes none.
        """
        work, sharding = np.ones(1024, np.float32), self.shardings[0]
        if isinstance(sharding, jax.sharding.NamedSharding):
            sharding = jax.sharding.NamedSharding(
                sharding.mesh, jax.sharding.PartitionSpec()
            )
        elif not isinstance(sharding, jax.sharding.SingleDeviceSharding):
            return work
        # Not put there as a whole, for which all processes have to come and compare it.
        parts = [jax.device_put(work, each) for each in sharding.addressable_devices]
        return jax.make_array_from_single_device_arrays(work.shape, sharding, parts)

    @functools.cached_property
    def copy(self) -> Any:
        """The jitted function that copies, into fresh memory if the slot is None."""

        def copy(
            alone: list[jax.Array],
            packs: list[list[jax.Array]],
            slot: list[jax.Array] | None,
            work: jax.Array,
        ) -> tuple[list[jax.Array], jax.Array]:
            del slot  # its memory is used
            return _copied(alone, packs), jnp.sum(work * work)

        return jax.jit(
            copy,
            donate_argnums=2,
            keep_unused=True,
            out_shardings=(self.shardings, None),
        )

    @functools.cached_property
    def decide(self) -> Any:
        """The jitted function that judges, and copies what is better."""
        return self._decider(jax.lax.cond)

    @functools.cached_property
    def decide_and_copy(self) -> Any:
        """The jitted function that judges, and copies."""
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
        kinds: Shape, dtype and sharding of each leaf; None for what is no array of JAX.
        groups: The arrays, by their devices.
        offloaded: Positions of the arrays that are in another memory of their devices
            than the default one. No program copies those.
    """

    def __init__(self, kinds: list[Kind]) -> None:
        """Group the arrays, and pack small ones."""
        self.kinds = kinds
        self.offloaded: list[int] = []
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
        """Tell whether all arrays are on the same devices: one program takes them."""
        placed = [x.sharding for x in scalars if isinstance(x, jax.Array)]
        if self.offloaded or any(map(is_offloaded, placed)):
            return False
        devices = {group.devices for group in self.groups}
        devices.update(map(_devices, placed))
        return len(devices) == 1


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


def planned(leaves: Sequence[Any]) -> Plan:
    """Plan how to copy leaves; the same plan for leaves of the same form."""
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


def snapshot(
    leaves: Sequence[Any], into: Copies | None = None, plan: Plan | None = None
) -> Copies:
    """Copy the JAX arrays among `leaves` on their devices, each in its sharding.

    Returns at once; the copies are made in the devices' order of work. Arrays in
    another memory of the devices are copied within that memory. Other leaves are passed
    on.

    Args:
        leaves: Leaves of a tree.
        into: Copies that nobody needs any more, whose memory is used if they are of
            the same plan.
        plan: What `planned` returns for the leaves, if it is there already.
    """
    copies = unfilled(leaves, plan or planned(leaves))
    fill(copies, leaves, into)
    return copies


def unfilled(leaves: Sequence[Any], plan: Plan) -> Copies:
    """Return copies for `fill` or `fill_if_better` to fill."""
    beside = _beside(leaves)
    for index in plan.offloaded:
        beside[index] = copied(leaves[index])
    return Copies(plan, [], beside)


def fill(copies: Copies, leaves: Sequence[Any], into: Copies | None = None) -> None:
    """Copy leaves; see `snapshot`."""
    assert copies.plan is not None
    reuse = into is not None and into.plan is copies.plan
    slots = iter(list(into.arrays)) if into is not None and reuse else None
    for group in copies.plan.groups:
        slot = slots and [next(slots) for _ in group.shardings]
        alone, packs = group.pick(leaves)
        # Whatever interrupts this: what is copied is there. The slot is no more.
        copies.arrays += group.copy(alone, packs, slot, group.work)[0]


def fill_if_better(
    copies: Copies,
    state: CheckpointState,
    value: jax.Array,
    leaves: Sequence[Any],
    into: Copies | None,
    *,
    always: bool,
) -> None:
    """Judge a due check on the device, and copy only if there is something to save.

    Returns at once, without waiting for `value`. Of `copies`, `verdict` then has the
    two leaves of the best after `judge`, twice, since their owner may donate them, and
    before; and whether to save, bool[].

    Args:
        copies: What `unfilled` returns for the leaves.
        state: The decision state after `tick`.
        value: The monitored value.
        leaves: Leaves of a tree, on one mesh with `value`.
        into: Earlier copies of the same plan; taken as they were if there is nothing
            to save, or else refilled. None for none.
        always: Whether to copy whatever is decided, for a slot that takes what does
            not improve.
    """
    assert copies.plan is not None
    (group,) = copies.plan.groups
    slot = (into or snapshot(leaves, None, copies.plan)).arrays
    decide = group.decide_and_copy if always else group.decide
    alone, packs = group.pick(leaves)
    work = group.work
    # As in `fill`: one line, and what is decided is there.
    copies.verdict = decide(state, value, alone, packs, slot, work)
    copies.settle()


def on_host(leaves: Sequence[Any], into: Copies | None = None) -> Copies:
    """Copy the JAX arrays among `leaves` to the host's memory, waiting for them.

    Of arrays of several processes, the pieces that are here, as `Shards`.
    """
    reuse = into.beside if into is not None else []
    if len(reuse) != len(leaves):
        reuse = [None] * len(leaves)
    copies: list[Any] = []
    for leaf, old in zip(leaves, reuse, strict=True):
        if not isinstance(leaf, jax.Array) or _is_key(leaf.dtype):
            copies += snapshot([leaf]).leaves()
        elif is_shared(leaf):
            copies.append(_shards(leaf, old))
        else:
            copies.append(_copy_of(np.asarray(leaf), old))
    return Copies(None, [], copies)


def _shards(array: jax.Array, old: Any) -> Shards:
    into = dict(old.pieces) if isinstance(old, Shards) else {}
    copies = [(at, _copy_of(values, into.get(at))) for at, values in pieces(array)]
    return Shards(array.sharding, copies)


def _copy_of(values: Any, into: Any) -> Any:
    """Copy values, into earlier ones that nobody needs any more, if they fit."""
    fits = isinstance(into, np.ndarray) and (into.shape, into.dtype) == (
        values.shape,
        values.dtype,
    )
    copy: Any = into if fits else np.empty_like(values)
    np.copyto(copy, values)
    return copy


def memory_of_host(
    kinds: Sequence[tuple[tuple[int, ...], Any]], reuse: Copies | None
) -> list[np.ndarray[Any, Any]]:
    """Return memory for values of these shapes and dtypes, of earlier copies' if so.

    Args:
        kinds: Shapes and dtypes.
        reuse: Copies that nobody needs any more; None for none.
    """
    old = [] if reuse is None else [a for a in reuse.beside if a is not None]
    fits = [(array.shape, array.dtype) for array in old] == list(kinds)
    return old if fits else [np.empty(shape, dtype) for shape, dtype in kinds]


def fits_on_device(leaves: Sequence[Any]) -> bool:
    """Tell whether each device has room for a copy, where it says how much it has."""
    needed: dict[Any, int] = {}
    for leaf in leaves:
        if isinstance(leaf, jax.Array) and not is_offloaded(leaf.sharding):
            for device in leaf.sharding.addressable_devices:
                size = leaf.nbytes // len(leaf.sharding.device_set)
                if leaf.is_fully_replicated:
                    size = leaf.nbytes
                needed[device] = needed.get(device, 0) + size
    for device, size in needed.items():
        stats: Mapping[str, int] = device.memory_stats() or {}
        if "bytes_limit" in stats:
            free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
            # What a step takes for its activations is not in use between steps.
            peak = stats.get("peak_bytes_in_use", 0) - stats.get("bytes_in_use", 0)
            if size > free - max(peak, 0):
                return False
    return True


def _devices(sharding: jax.sharding.Sharding) -> Any:
    """Return the devices of a sharding in their order, which counts for a program."""
    assignment = getattr(sharding, "_device_assignment", None)
    return frozenset(sharding.device_set) if assignment is None else assignment


def _beside(leaves: Sequence[Any]) -> list[Any]:
    return [None if isinstance(leaf, jax.Array) else leaf for leaf in leaves]


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


def _is_key(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jax.dtypes.prng_key))


def _copied(alone: list[jax.Array], packs: list[list[jax.Array]]) -> list[jax.Array]:
    joined = [jnp.concatenate([each.reshape(-1) for each in pack]) for pack in packs]
    return [jnp.copy(array) for array in alone] + joined
