"""Memory for copies, claimed before there is anything to copy.

New memory costs page faults on CPU. If all processes of a machine take them at once, in
the call that saves first, the training waits. That call would also be the first to
call the programs that copy, and JAX spends a millisecond more on a first call.
"""

import functools
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from flaxckpt._copies.held import Copies
from flaxckpt._copies.memory_kinds import copied, from_own_shards
from flaxckpt._copies.packing import SMALL_BYTES
from flaxckpt._copies.plan import Plan, nbytes
from flaxckpt._copies.programs import Kind, Program
from flaxckpt._runtime.locks import new_lock

_ALIGNMENT = 64  # of the memory that JAX on CPU uses as it is, in bytes


class Blank:
    """Blank copies, which the first save takes."""

    def __init__(self) -> None:
        """Have none yet."""
        self._lock = new_lock()
        self._copies: Copies | None = None
        self._is_open = True

    @property
    def is_open(self) -> bool:
        """Whether no save has come yet."""
        return self._is_open

    def keep(self, copies: Copies) -> None:
        """Keep blank copies for the first save, unless it has come."""
        with self._lock:
            if self._is_open:
                self._copies = copies

    def try_out(self) -> None:
        """Call each program that refills once, on the copies if there are any.

        A save waits meanwhile. The programs must be compiled. Copies that a failure has
        deleted are dropped.
        """
        with self._lock:
            copies = self._copies
            if copies is None or copies.plan is None:
                return
            try:
                _refill_each_once(copies.plan, copies.arrays)
            finally:
                if any(array.is_deleted() for array in copies.arrays):
                    self._copies = None

    def take(self) -> Copies | None:
        """Return the copies; whatever comes later is dropped."""
        with self._lock:
            self._is_open = False
            copies, self._copies = self._copies, None
            return copies


def is_on_cpu(plan: Plan) -> bool:
    """Tell whether all copies of a plan are on CPU devices, where pages fault."""
    shardings = {kind[2] for kind in plan.copy_kinds()}
    return all(next(iter(each.device_set)).platform == "cpu" for each in shardings)


def blank_copies(plan: Plan) -> Copies:
    """Claim memory for the copies of a plan; each process, for its own shards."""
    return Copies(plan, _blanks(plan.copy_kinds()), [], is_blank=True)


def refitted(memory: Copies | None, plan: Plan) -> Copies | None:
    """Return memory in the order of a plan, so that its copies can take it.

    Trees that are saved with other metrics than before have another plan, and the same
    large arrays. New memory is claimed for small arrays only. Not for one process: the
    memory may be that of a save that still waits, and this would mix its copies.

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
    for kind, array in zip(memory.plan.copy_kinds(), memory.arrays, strict=True):
        held[kind].append(array)
    kinds, arrays = plan.copy_kinds(), dict[int, jax.Array]()
    for at, kind in enumerate(kinds):
        if held[kind]:
            arrays[at] = held[kind].pop()
        elif nbytes(kind) > SMALL_BYTES:
            return None
    lacking = [at for at in range(len(kinds)) if at not in arrays]
    arrays |= zip(lacking, _blanks(kinds[at] for at in lacking), strict=True)
    return Copies(plan, [arrays[at] for at in range(len(kinds))], [], is_blank=True)


def _refill_each_once(plan: Plan, arrays: list[jax.Array]) -> None:
    """Call each program of a plan once, and replace the arrays that it refills."""
    called, at = set[Program](), 0
    for batch in plan.batches:
        these = slice(at, at + batch.number)
        at += batch.number
        if batch.program not in called:
            called.add(batch.program)
            refilled = batch.program.refill(
                _zeros(batch.program.alone),
                list(map(_zeros, batch.program.packs)),
                arrays[these],
                np.True_,
            )
            arrays[these] = jax.block_until_ready(refilled)


def _blanks(kinds: Iterable[Kind]) -> list[jax.Array]:
    """Make arrays whose memory has been written to, and can be donated."""
    return list(map(copied, _zeros(kinds)))


def _zeros(kinds: Iterable[Kind]) -> list[jax.Array]:
    """Make arrays of zeros that take little memory, and cannot be donated.

    All share one numpy array. JAX on CPU uses its memory as it is if it is aligned, and
    the system gives it no pages until somebody writes there.
    """
    kinds = list(kinds)
    parts = [(sharding.shard_shape(shape), dtype) for shape, dtype, sharding in kinds]
    zeros = np.zeros(max(map(nbytes, parts), default=0) + _ALIGNMENT, np.uint8)
    zeros = zeros[-zeros.ctypes.data % _ALIGNMENT :]

    @functools.cache
    def on(device: Any, part: tuple[tuple[int, ...], Any]) -> jax.Array:
        values = zeros[: nbytes(part)].view(part[1]).reshape(part[0])
        return jax.device_put(values, device)

    with jax.enable_x64(True):  # without it, JAX narrows 64-bit kinds
        return [
            from_own_shards(
                *kind, [on(each, part) for each in kind[2].addressable_devices]
            )
            for kind, part in zip(kinds, parts, strict=True)
        ]
