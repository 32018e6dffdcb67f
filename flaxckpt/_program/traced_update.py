"""`update` under a trace: the programs that save, and how their trees are sharded."""

import functools
import warnings
import weakref
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding

from flaxckpt._decision.logs import Logs
from flaxckpt._decision.state import CheckpointState
from flaxckpt._decision.step import judge
from flaxckpt._pods.saves import PodSaver
from flaxckpt._program.arrivals import Stream
from flaxckpt._program.handover import finish_programs, stream_tree
from flaxckpt._program.shards import Place, place_of
from flaxckpt._runtime.frames import outside
from flaxckpt._runtime.traces import runs_in_trace
from flaxckpt._saving.saves import Saver
from flaxckpt._settings import Settings
from flaxckpt._trees.ties import PyTree, flatten, leaves_of


class Programs:
    """The programs that call `update`."""

    def __init__(self, settings: Settings, saves: Saver | PodSaver) -> None:
        """Take what the calls need; no program has been traced yet."""
        self._settings, self._saves = settings, saves
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._has_streamed = False
        self._shardings: dict[Any, list[Any]] = {}

    def note_shardings(self, like: PyTree) -> None:
        """Note how a tree is sharded that programs will save, if it is."""
        flat = flatten(like)
        shardings = [getattr(leaf, "sharding", None) for leaf in flat.leaves]
        if any(isinstance(sharding, NamedSharding) for sharding in shardings):
            self._shardings = {flat.key: shardings}

    def update(
        self,
        before: CheckpointState,
        state: CheckpointState,
        due: Any,
        tree: PyTree,
        logs: Logs | None,
        epoch: Any,
        batch: Any,
        force: Any,
    ) -> CheckpointState:
        """Update within the program that is being traced, after `tick`.

        Args:
            before: The state before `tick`.
            state: The state after `tick`.
            due: Whether a check is due, bool[].
            tree: As for `ModelCheckpoint.update`, as are the other arguments.
            logs: The metrics, normalized.
            epoch: Zero-based epoch.
            batch: Zero-based batch; None at the end of an epoch.
            force: Whether to save in any case, bool[].

        Returns:
            The state to go on with.
        """
        state, save = judge(state, logs, due)
        state, stream = stream_tree(
            self._saves,
            tree,
            logs,
            epoch,
            batch,
            before=before,
            state=state,
            due=due,
            save=save | force,
            lasts=due if self._settings.save_last else np.False_,
            places=self._places(tree),
            stops=bool(self._settings.stop_on_error),
        )
        self._streams.add(stream)
        self._has_streamed = True
        return state

    def _places(self, tree: PyTree) -> list[Place | None]:
        """Return how each leaf of a traced tree is sharded; None where not known."""
        flat = flatten(tree)
        leaves, structure = flat.leaves, flat.key
        if self._shardings and structure not in self._shardings:
            warnings.warn(
                "update saves a tree of another structure than `like` of init or "
                "restore has, so it is not known how it is sharded, and all of it is "
                "gathered before it is saved. Pass init(like=...) what is saved.",
                stacklevel=outside(),
            )
        known = self._shardings.get(structure, [None] * len(leaves))
        return list(map(place_of, leaves, known))

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


def is_traced(tree: PyTree, *values: PyTree) -> bool:
    """Tell whether a trace is running, or a leaf of the arguments is traced."""
    if runs_in_trace():
        return True
    leaves = leaves_of(tree) + jax.tree.leaves(values)
    return any(map(_is_of_tracers, set(map(type, leaves))))


@functools.lru_cache(maxsize=256)  # `issubclass` on a type of JAX's takes a microsecond
def _is_of_tracers(kind: type) -> bool:
    return issubclass(kind, Tracer)
