"""Copies of a tree's arrays on their devices, so that training may donate its arrays.

New memory costs 30 times more than the copying, in page faults. So the copies of one
save are donated to the next save's copies.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxckpt._copies.held import Copies, fits
from flaxckpt._copies.memory_kinds import copied
from flaxckpt._copies.plan import Plan, kinds_of
from flaxckpt._decision.state import CheckpointState, judged
from flaxckpt._decision.step import judge


def copy_on_device(
    leaves: Sequence[Any], into: Copies | None = None, plan: Plan | None = None
) -> Copies:
    """Copy the JAX arrays among `leaves` on their devices, each in its sharding.

    Returns at once; the devices copy after the work that they were given before.
    Offloaded arrays are copied within their memory. Other leaves are passed on.

    Args:
        leaves: Leaves of a tree.
        into: Copies that are no longer needed. Their memory is used if they have the
            same plan.
        plan: The plan for the leaves; None to make one.
    """
    copies = unfilled(leaves, plan or Plan(kinds_of(leaves)))
    fill(copies, leaves, into)
    return copies


def unfilled(leaves: Sequence[Any], plan: Plan) -> Copies:
    """Return copies for `fill` to fill; copy only the offloaded arrays."""
    beside: list[Any] = [None] * len(leaves)
    for index in plan.others:
        beside[index] = leaves[index]
    for index in plan.offloaded:
        beside[index] = copied(leaves[index])
    return Copies(plan, [], beside)


def fill(
    copies: Copies,
    leaves: Sequence[Any],
    into: Copies | None = None,
    is_wanted: Any = np.True_,
) -> None:
    """Copy leaves into `copies`, as `copy_on_device` does.

    Args:
        copies: What `unfilled` returned for the leaves.
        leaves: Leaves of a tree.
        into: As for `copy_on_device`.
        is_wanted: As for `Program.refill`. If a device decides not to copy, `copies`
            get the values of `into`. Without `into`, or if it is blank, the leaves are
            copied whatever a device decides.
    """
    assert copies.plan is not None
    reused = None
    if fits(into, copies.plan):
        reused = iter(list(into.arrays))
        if into.is_blank:  # there is nothing to keep, and this program is compiled
            is_wanted = np.True_
    for batch in copies.plan.batches:
        alone, packs = batch.pick(leaves)
        # Each branch is one statement, since an interrupt may come between any two, and
        # the call deletes the earlier copies that it is given.
        if reused is None:
            copies.arrays += batch.program.fill(alone, packs)
        else:
            earlier = [next(reused) for _ in range(batch.number)]
            copies.arrays += batch.program.refill(alone, packs, earlier, is_wanted)


@jax.jit
def verdict_of(state: CheckpointState, value: jax.Array) -> tuple[Any, Any]:
    """Judge a due check on the device, without waiting for `value`.

    Args:
        state: The decision state after `tick`.
        value: The monitored value, a real scalar.

    Returns:
        Three times the leaves that `judged` names, and whether to save, bool[]. The
        first two are the leaves after the decision: the loop may donate one. The third
        are the leaves before it.
    """
    names = judged(state)
    before = tuple(jnp.copy(getattr(state, name)) for name in names)
    state, save = judge(state, {state.monitor: value}, np.True_)
    after = tuple(getattr(state, name) for name in names)
    return (after, after, before), save
