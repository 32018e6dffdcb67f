"""Memory for copies, claimed before there is anything to copy.

On CPU new memory costs page faults, 30 times what the copying costs. If all processes
of a machine take them at once, in the call that saves first, the training waits.
"""

import math
from collections import defaultdict
from typing import Any

import jax
import numpy as np

from flaxckpt._copies.held import Copies
from flaxckpt._copies.memory_kinds import joined
from flaxckpt._copies.on_device import fill
from flaxckpt._copies.packing import SMALL_BYTES
from flaxckpt._copies.plan import Plan
from flaxckpt._copies.programs import Kind
from flaxckpt._runtime.locks import new_lock


class Loan:
    """Blank copies that the first save may take."""

    def __init__(self) -> None:
        """Have nothing to lend yet."""
        self._lock = new_lock()
        self._memory: Copies | None = None
        self._is_open = True

    def offer(self, memory: Copies) -> None:
        """Lend blank copies to the first save, unless it has begun."""
        with self._lock:
            if self._is_open:
                self._memory = memory

    def try_out(self) -> None:
        """Copy something into the memory: JAX takes longest to call a program first.

        The programs must be compiled. A save that begins meanwhile finds no memory.
        """
        with self._lock:
            memory, self._memory = self._memory, None
        if memory is not None and memory.plan is not None:
            sources = dict[Any, Any]()
            kinds = memory.plan.kinds
            values = {kind: _blank(kind, sources) for kind in kinds if kind}
            copies = Copies(memory.plan, [], [], True)
            fill(copies, [kind and values[kind] for kind in kinds], memory)
            jax.block_until_ready(copies.arrays)
            self.offer(copies)

    def take(self) -> Copies | None:
        """Return the memory; whatever is offered from now on is dropped."""
        with self._lock:
            self._is_open = False
            memory, self._memory = self._memory, None
            return memory


def is_on_cpu(plan: Plan) -> bool:
    """Tell whether all copies of a plan are on CPU devices, where pages fault."""
    kinds = {kind[2] for kind in _kinds(plan)}
    return all(next(iter(kind.device_set)).platform == "cpu" for kind in kinds)


def blank_copies(plan: Plan) -> Copies:
    """Claim memory for the copies of a plan; each process, for its own shards."""
    sources: dict[Any, Any] = {}
    return Copies(plan, [_blank(kind, sources) for kind in _kinds(plan)], [], True)


def refitted(memory: Copies | None, plan: Plan) -> Copies | None:
    """Return memory in the order of a plan, so that its copies can take it.

    Trees that are saved with other metrics than before have another plan, and the same
    large arrays. New memory is claimed for small arrays only.

    Args:
        memory: Earlier copies, or blank ones; None for none.
        plan: The plan of the copies to come.

    Returns:
        The memory; None if it lacks a large array, or is the host's.
    """
    if memory is None or memory.plan is None:
        return None
    if memory.plan is plan:
        return memory
    held = defaultdict[Kind, list[jax.Array]](list)
    for kind, array in zip(_kinds(memory.plan), memory.arrays, strict=True):
        held[kind].append(array)
    sources: dict[Any, Any] = {}
    arrays: list[jax.Array] = []
    for kind in _kinds(plan):
        if held[kind]:
            arrays.append(held[kind].pop())
        elif math.prod(kind[0]) * kind[1].itemsize <= SMALL_BYTES:
            arrays.append(_blank(kind, sources))
        else:
            return None
    return Copies(plan, arrays, [], True)


def _kinds(plan: Plan) -> list[Kind]:
    return [kind for batch in plan.batches for kind in batch.program.kinds]


def _blank(kind: Kind, sources: dict[Any, Any]) -> jax.Array:
    """Make an array whose memory has been written to.

    Args:
        kind: What the array is.
        sources: What was copied for the arrays before, by shape and dtype.
    """
    shape, dtype, sharding = kind
    part = sharding.shard_shape(shape), dtype
    if part not in sources:
        sources[part] = np.zeros(*part)
    with jax.enable_x64(True):  # without it, JAX narrows 64-bit kinds
        parts = [
            jax.device_put(sources[part], device, may_alias=False)
            for device in sharding.addressable_devices
        ]
    return joined(shape, dtype, sharding, parts)
