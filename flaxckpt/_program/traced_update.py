"""`update` under a trace: a running program hands its tree to the host.

The program decides, and hands its leaves to the host only if there is something to
save. The host copies them, and the program goes on. If the leaves are sharded, each
device hands over its own shards. Meanwhile the host calls no JAX, which could deadlock.
"""

import contextlib
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from flaxckpt._decision.logs import Logs
from flaxckpt._decision.moment import Moment
from flaxckpt._decision.state import (
    BEST,
    LEAVES,
    CheckpointState,
    judged,
    with_judged,
    with_leaves,
)
from flaxckpt._decision.step import judge, value_to_count
from flaxckpt._pods.saves import PodSaver
from flaxckpt._program.shards import MeshSpec, mesh_spec_of
from flaxckpt._program.stream import Stream
from flaxckpt._runtime.frames import outside
from flaxckpt._runtime.jax_internals import runtime_tokens
from flaxckpt._saving.at_exit import before_end
from flaxckpt._saving.saves import Saver
from flaxckpt._settings import Settings
from flaxckpt._trees.leaf import is_of_keys, without_keys
from flaxckpt._trees.remembered import Remembered
from flaxckpt._trees.ties import PyTree, flatten
from flaxckpt.errors import CheckpointError


class Programs:
    """The programs that call `update`."""

    def __init__(self, settings: Settings, saves: Saver | PodSaver) -> None:
        """Take what the calls need; no program has been traced yet."""
        self._settings, self._saves = settings, saves
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._has_streamed = False
        self._shardings: Remembered[list[Any]] | None = None

    def note_shardings(self, like: PyTree) -> None:
        """Note how a tree is sharded that programs will save, if it is."""
        flat = flatten(like)
        shardings = [getattr(leaf, "sharding", None) for leaf in flat.leaves]
        if any(isinstance(sharding, NamedSharding) for sharding in shardings):
            self._shardings = Remembered[list[Any]](1)
            self._shardings.keep(flat.key, shardings)

    def update(
        self,
        before: CheckpointState,
        state: CheckpointState,
        due: Any,
        tree: PyTree,
        logs: Logs | None,
        at: Moment,
        force: Any,
    ) -> CheckpointState:
        """Update within the program that is being traced, after `tick`.

        `before` is the state before `tick`; `state` and `due` are what `tick` returned.
        `ModelCheckpoint.update` describes the other arguments.

        Returns:
            The state to go on with. It depends on the handover, so saves come in the
            order of the calls.

        Raises:
            CheckpointError: Within `shard_map` or `vmap`; and as `Receiver.plan`.
        """
        if state.save_best_only:
            state, save = judge(state, logs, due)
        else:
            state, save = _count_stale(state, logs, due), due
        to_slot = due if self._settings.save_last else np.False_
        save, places = save | force, self._places(tree)
        _refuse_shard_map()
        before_end(finish_programs)
        at.check()
        receiver, logs = self._saves.receiver, dict(logs or {})
        trees = receiver.plan(tree, logs, at, to_slot=to_slot is not np.False_)
        handed, trees.sent = trees.sent, []  # no value outlives its trace
        sent_logs = _scalars_in(logs)
        sent = {
            "flags": {"save": save, "to_slot": to_slot, "due": due},
            "at": at.given(),
            "logs": sent_logs,
            "state": {name: getattr(state, name) for name in LEAVES},
            "before": {name: getattr(before, name) for name in BEST},
        }
        # A function that is differentiated may save, too.
        scalars = jax.lax.stop_gradient(jax.tree.map(jnp.asarray, sent))
        leaves = [jax.lax.stop_gradient(without_keys(leaf)) for leaf in handed]
        stream = Stream(
            receiver,
            trees,
            _logs_on_host(logs, sent_logs),
            state,
            [places.get(id(leaf)) for leaf in handed],
            stops=bool(self._settings.stop_on_error),
        )
        is_wanted = jnp.asarray(save) | jnp.asarray(to_slot)
        tells = receiver.tells and before.save_best_only
        hand_over = self._handing_over(stream, tells=tells)
        token = hand_over(is_wanted, scalars, leaves)
        self._has_streamed = True
        return with_leaves(state, seen=state.seen + token)

    def _handing_over(self, stream: Stream, *, tells: bool) -> Callable[..., Any]:
        """Return what hands over leaves, if there is something to save.

        Within `vmap`, where the decision is the same for all members, it hands over the
        leaves of all members, stacked along a first axis; or the leaves as they are, if
        all members share them.

        Args:
            stream: The stream to hand over to.
            tells: Whether the host prints that nothing is saved.
        """
        self._streams.add(stream)

        @jax.custom_batching.custom_vmap
        def hand_over(save: Any, scalars: Any, leaves: list[Any]) -> Any:
            nothing = lambda *_: jnp.int32(0)  # noqa: E731
            token = jax.lax.cond(save, stream.hand_over, nothing, scalars, leaves)
            if tells:  # apart, since XLA takes no calls of other devices in one `cond`
                token += jax.lax.cond(save, nothing, stream.tell, scalars)
            return token

        @hand_over.def_vmap
        def hand_over_all(
            number: int, batched: Any, save: Any, scalars: Any, leaves: list[Any]
        ) -> Any:
            of_save, of_scalars, of_leaves = batched
            _check_is_one_decision({**of_scalars, "save": of_save})
            own = [name for name, differs in of_scalars["logs"].items() if differs]
            logs = {n: each for n, each in scalars["logs"].items() if n not in own}
            is_shared = not any(of_leaves)
            together = stream.stacked(None if is_shared else number, own)
            together.check_path(scalars["at"])
            if own:
                warnings.warn(
                    f"The members of vmap have metrics of their own: {', '.join(own)}. "
                    "Their checkpoint records none of these, and state.stale does not "
                    "count them.",
                    stacklevel=outside(),
                )
            stacked = [
                leaf
                if differs or is_shared
                else jnp.broadcast_to(leaf, (number, *leaf.shape))
                for leaf, differs in zip(leaves, of_leaves, strict=True)
            ]
            hand_over = self._handing_over(together, tells=tells)
            return hand_over(save, {**scalars, "logs": logs}, stacked), False

        return hand_over

    def _places(self, tree: PyTree) -> dict[int, MeshSpec | None]:
        """Return by its id how each leaf is sharded; None where that is not known."""
        flat = flatten(tree)
        leaves, known = flat.leaves, None
        if self._shardings is not None:
            known = self._shardings.get(flat.key)
        if self._shardings is not None and known is None:
            warnings.warn(
                "update saves a tree of another structure than `like` of init or "
                "restore has, so it is not known how it is sharded, and all of it is "
                "gathered before it is saved. Pass init(like=...) what is saved.",
                stacklevel=outside(),
            )
        places = map(mesh_spec_of, leaves, known or [None] * len(leaves))
        return dict(zip(map(id, leaves), places, strict=True))

    def finish(self) -> None:
        """Wait for the saves of running programs, before a save outside of them.

        The copy for that save is made after the program that computes its values, and
        the program may wait for the very memory that the save would claim.
        """
        if self._has_streamed:
            finish_programs()

    def reset(self) -> None:
        """Wait for the saves of running programs, and reset their streams."""
        self.finish()
        for stream in self._streams:
            stream.reset()


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


def _refuse_shard_map() -> None:
    if jax.sharding.get_abstract_mesh().manual_axes:
        raise CheckpointError(
            "update was called within shard_map, where each device sees its own shards "
            "only. Call it in the jitted function around it; flaxckpt.step may be "
            "called here."
        )


def _count_stale(
    state: CheckpointState, logs: Logs | None, due: Any
) -> CheckpointState:
    """Count a due check as `judge` does, for a decision that does not need the metric.

    Within `vmap`, metrics of the members' own do not count: there is one state for all.
    """
    value = value_to_count(state, logs)
    if value is None:
        return state

    @jax.custom_batching.custom_vmap
    def count(state: CheckpointState, value: Any, due: Any) -> tuple[Any, ...]:
        counted, _ = judge(state, {state.monitor: value}, due)
        return tuple(getattr(counted, name) for name in judged(state))

    @count.def_vmap
    def keep(_: int, batched: Any, state: CheckpointState, *_rest: Any) -> Any:
        each, names = (state, batched[0]), judged(state)
        return tuple(tuple(getattr(one, name) for name in names) for one in each)

    arguments = jax.lax.stop_gradient(jax.tree.map(jnp.asarray, (state, value, due)))
    return with_judged(state, count(*arguments))


def _scalars_in(logs: Logs) -> dict[str, jax.Array]:
    """Return the metrics that the program hands over: scalars, and no PRNG keys."""
    return {
        name: value
        for name, value in logs.items()
        if isinstance(value, jax.Array)
        and not value.shape
        and not is_of_keys(value.dtype)
    }


def _logs_on_host(logs: Logs, sent: Logs) -> Logs:
    """Return the metrics without JAX arrays; None stands for each that is in `sent`."""
    return {
        name: None if name in sent else value
        for name, value in logs.items()
        if name in sent
        or not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value))
    }


def _check_is_one_decision(batched: PyTree) -> None:
    """Check that the members of `vmap` save at the same calls.

    Args:
        batched: Whether each of the scalars that are handed over differs.

    Raises:
        CheckpointError: If they may not.
    """
    parts = {name: each for name, each in batched.items() if name != "logs"}
    if any(jax.tree.leaves(parts)):
        raise CheckpointError(
            "update was called within vmap, and its members may save at different "
            "calls: each has a state, an epoch, a batch or a step of its own. With "
            "save_freq, equal counters and a state that is made outside of vmap, all "
            "members are saved together. Otherwise carry a flaxckpt.Snapshot, which "
            "each member fills with its best, and save it afterwards with "
            "ckpt.save_snapshot(snapshot, member=i)."
        )
