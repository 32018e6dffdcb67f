"""Copies of a tree's arrays, so that training may donate or change its own.

Fresh memory costs 30 times more than the copying, in page faults, so the copies of one
save are donated to the next. Each array costs a call of a jitted function some
microseconds, so small ones are copied into one.
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
    beside: list[Any] = [None] * len(leaves)
    for index in plan.beside:
        beside[index] = leaves[index]
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
    slot = (into or copy_on_device(leaves, None, copies.plan)).arrays
    decide = group.decide_and_copy if always else group.decide
    alone, packs = group.pick(leaves)
    work = group.work
    # As in `fill`: one line, and what is decided is there.
    copies.verdict = decide(state, value, alone, packs, slot, work)
    copies.settle()
