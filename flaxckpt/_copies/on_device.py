"""Copies of a tree's arrays on their devices, so that training may donate its arrays.

New memory costs 30 times more than the copying, in page faults. So the copies of one
save are donated to the next save's copies.
"""

from collections.abc import Sequence
from typing import Any

import jax

from flaxckpt._copies.held import Copies
from flaxckpt._copies.memory_kinds import copied
from flaxckpt._copies.plan import Plan, planned
from flaxckpt._decision.state import CheckpointState


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
        plan: What `planned` returned for the leaves; None to call it.
    """
    copies = unfilled(leaves, plan or planned(leaves))
    fill(copies, leaves, into)
    return copies


def unfilled(leaves: Sequence[Any], plan: Plan) -> Copies:
    """Return copies for `fill` or `fill_if_better`; copy only the offloaded arrays."""
    beside: list[Any] = [None] * len(leaves)
    for index in plan.beside:
        beside[index] = leaves[index]
    for index in plan.offloaded:
        beside[index] = copied(leaves[index])
    return Copies(plan, [], beside)


def fill(copies: Copies, leaves: Sequence[Any], into: Copies | None = None) -> None:
    """Copy leaves into `copies`, as `copy_on_device` does."""
    assert copies.plan is not None
    reuse = into is not None and into.plan is copies.plan
    slots = iter(list(into.arrays)) if into is not None and reuse else None
    for group in copies.plan.groups:
        slot = slots and [next(slots) for _ in group.shardings]
        alone, packs = group.pick(leaves)
        # One statement, since an interrupt may come between any two, and the call
        # deletes the slot that it is given.
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

    Returns at once, without waiting for `value`. `copies.verdict` then begins with
    three pairs of `best_value` and `has_best`, and whether to save, bool[]. The first
    two pairs are from after `judge`, since the training loop may donate one of them;
    the third is from before.

    Args:
        copies: What `unfilled` returned for the leaves.
        state: The decision state after `tick`.
        value: The monitored value, a real scalar.
        leaves: Leaves of a tree, on the same devices as `value`.
        into: Earlier copies of the same plan, whose memory is used. They keep their
            values if there is nothing to save. None for new memory.
        always: Whether to copy even without a new best, for a slot, which takes any
            state.
    """
    assert copies.plan is not None
    (group,) = copies.plan.groups
    slot = (into or copy_on_device(leaves, None, copies.plan)).arrays
    decide = group.decide_and_copy if always else group.decide
    alone, packs = group.pick(leaves)
    work = group.work
    # One statement, as in `fill`; after an interrupt, `settle` can still be called.
    copies.verdict = decide(state, value, alone, packs, slot, work)
    copies.settle()
