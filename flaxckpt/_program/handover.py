"""`update` under a trace: a running program hands its tree to the host.

The program decides, and hands its leaves to the host only if there is something to
save. The host copies them, and the program goes on. If the leaves are sharded, each
device hands over its own shards. Meanwhile the host calls no JAX, which could deadlock.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxckpt._decision.logs import Logs
from flaxckpt._decision.scalars import index
from flaxckpt._decision.state import BEST, LEAVES, CheckpointState, with_leaves
from flaxckpt._pods.saves import PodSaver
from flaxckpt._program.arrivals import Stream
from flaxckpt._program.shards import Place
from flaxckpt._runtime.jax_internals import runtime_tokens
from flaxckpt._saving.at_exit import before_end
from flaxckpt._saving.saves import Saver
from flaxckpt._trees.leaf import without_keys
from flaxckpt._trees.ties import PyTree, leaves_of
from flaxckpt.errors import CheckpointError


def finish_programs() -> None:
    """Wait for all that running programs have to hand over."""
    # The caller sees the error of a failed program when it fetches the results.
    try:
        jax.effects_barrier()
    except (jax.errors.JaxRuntimeError, ExceptionGroup):
        # JAX never waits for the tokens after a failed one.
        tokens = runtime_tokens()
        for token in (
            *tokens.current_tokens.values(),
            *tokens.output_runtime_tokens.values(),
        ):
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                token.block_until_ready()
        tokens.clear()


def stream_tree(
    saves: Saver | PodSaver,
    tree: PyTree,
    logs: Logs | None,
    epoch: Any,
    batch: Any,
    *,
    before: CheckpointState,
    state: CheckpointState,
    due: Any,
    save: Any,
    lasts: Any,
    places: Sequence[Place | None],
    stops: bool,
) -> tuple[CheckpointState, "Stream"]:
    """Have the program that is being traced save, where it decides to.

    Args:
        saves: The saves of the object.
        tree: What to save.
        logs: The metrics.
        epoch: Zero-based epoch.
        batch: Zero-based batch; None at the end of an epoch.
        before: The state before the decision.
        state: The state after.
        due: Whether a check is due, bool[].
        save: Whether to save in the series, bool[].
        lasts: Whether to save in the slot otherwise, bool[].
        places: How each leaf of `tree` is sharded, as far as that is known.
        stops: Whether an error ends the program.

    Returns:
        The state to go on with, and the stream. The state depends on the handover, so
        saves come in the order of the calls.

    Raises:
        CheckpointError: Within `shard_map` or `vmap`; and as `Receiver.plan`.
    """
    if jax.sharding.get_abstract_mesh().manual_axes:
        raise CheckpointError(
            "update was called within shard_map, where each device sees its own shards "
            "only. Call it in the jitted function around it; flaxckpt.step may be "
            "called here."
        )
    before_end(finish_programs)
    index("epoch", epoch)
    if batch is not None:
        index("batch", batch)
    can_last = lasts is not np.False_
    receiver = saves.receiver
    trees = receiver.plan(tree, logs, batch, lasts=can_last)
    logs = dict(logs or {})
    sent = {
        "flags": {"save": save, "lasts": lasts, "due": due},
        "at": {"epoch": epoch} if batch is None else {"epoch": epoch, "batch": batch},
        "logs": {
            name: value
            for name, value in logs.items()
            if isinstance(value, jax.Array)
            and not value.shape
            and not jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        },
        "state": {name: getattr(state, name) for name in LEAVES},
        "before": {name: getattr(before, name) for name in BEST},
    }
    scalars = jax.tree.map(jnp.asarray, sent)
    kept = {  # in the order of `logs`
        name: None if name in sent["logs"] else value
        for name, value in logs.items()
        if name in sent["logs"]
        or not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value))
    }
    by_id = {
        id(leaf): place for leaf, place in zip(leaves_of(tree), places, strict=True)
    }
    handed, trees.sent = trees.sent, []  # no value outlives its trace
    leaf_places = [by_id.get(id(leaf)) for leaf in handed]
    taking = Stream(receiver, trees, kept, state, leaf_places, stops=stops)
    # A function that is differentiated may save, too.
    leaves = [jax.lax.stop_gradient(without_keys(leaf)) for leaf in handed]
    scalars = jax.lax.stop_gradient(scalars)
    save = _not_batched(jnp.asarray(save) | jnp.asarray(lasts), (leaves, scalars))
    token = jax.lax.cond(
        save, taking.hand_over, lambda *_: jnp.int32(0), scalars, leaves
    )
    if receiver.tells and before.save_best_only:
        token += jax.lax.cond(save, lambda _: jnp.int32(0), taking.tell, scalars)
    return with_leaves(state, seen=state.seen + token), taking


@jax.custom_batching.custom_vmap
def _not_batched(save: jax.Array, values: PyTree) -> jax.Array:
    """Return `save`; under `vmap`, raise if it or a value to save is batched."""
    del values
    return save


@_not_batched.def_vmap
def _refuse_batches(*_: Any) -> Any:
    raise CheckpointError(
        "update was called within vmap, where each member decides for itself. Carry a "
        "flaxckpt.Snapshot, which each member fills with its best, and save it "
        "afterwards with ckpt.save_snapshot(snapshot, member=i)."
    )
