"""`Stream`: shards that come from a running program, put together to whole saves."""

import functools
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from flaxckpt._copies.memory_kinds import to_default_memory
from flaxckpt._copies.packing import Packing
from flaxckpt._decision.logs import Logs
from flaxckpt._decision.moment import Moment
from flaxckpt._decision.state import LEAVES, CheckpointState, with_leaves
from flaxckpt._program.call_host import call_host
from flaxckpt._program.shards import Cut, MeshSpec, common, cut_of
from flaxckpt._runtime.locks import new_lock
from flaxckpt._saving.at_exit import error_at_exit
from flaxckpt._saving.call import Call
from flaxckpt._saving.receiver import Arrival, Receiver, TracedTrees
from flaxckpt._trees.ties import PyTree
from flaxckpt.errors import CheckpointError


@dataclass
class _Event:
    """A save for which some of the devices have handed their shards over.

    Attributes:
        mark: The scalars of the save, as bytes; the same on all devices.
        is_ready: Set once the save has memory to copy to, or has failed.
        arrival: The save with its memory; None if it cannot be saved.
        error: What went wrong; None if nothing did.
        arrived: How many devices have handed their shards over.
    """

    mark: bytes
    is_ready: threading.Event = field(default_factory=threading.Event)
    arrival: Arrival | None = None
    error: BaseException | None = None
    arrived: int = 0


class Stream:
    """One traced call of `update`: the handover in the program, and on the host.

    Attributes:
        receiver: Saves what is handed over.
    """

    def __init__(
        self,
        receiver: Receiver,
        trees: TracedTrees,
        logs: Logs,
        state: CheckpointState,
        places: Sequence[MeshSpec | None],
        *,
        stops: bool,
    ) -> None:
        """Take what all saves of the call have in common."""
        self.receiver, self._trees, self._logs = receiver, trees, logs
        self._state, self._stops = with_leaves(state, **dict.fromkeys(LEAVES, 0)), stops
        self._places = places
        self._mesh = common([place.mesh for place in places if place is not None])
        self._specs = [PartitionSpec() if p is None else p.spec for p in places]
        self._guard = new_lock()
        self._events: dict[int, _Event] = {}
        self._calls: Counter[int] = Counter()
        self._broken: CheckpointError | None = None

    def stacked(self, number: int | None, without: Collection[str]) -> "Stream":
        """Return the stream of all members of `vmap` together.

        Args:
            number: How many members there are; None if they share all leaves.
            without: The metrics that differ between them, which are not recorded.
        """
        logs = {name: each for name, each in self._logs.items() if name not in without}
        trees, places = self._trees, self._places
        if number is not None:
            trees, places = trees.stacked(number), [None] * len(places)
        return Stream(
            self.receiver, trees, logs, self._state, places, stops=self._stops
        )

    def check_path(self, names: Collection[str]) -> None:
        """Check that the filepath can be filled in; see `Receiver.check_path`."""
        logs = {n: 0 if each is None else each for n, each in self._logs.items()}
        self.receiver.check_path(names, logs)

    # ---- in the program --------------------------------------------------------------

    def hand_over(self, scalars: PyTree, leaves: list[jax.Array]) -> jax.Array:
        """Hand leaves to the host.

        Returns:
            Zero, i32[], once the host has taken them.
        """
        leaves = list(map(to_default_memory, leaves))
        if self._mesh is None:
            is_placed = jax.device_count() == 1
            return self._call(self._take, scalars, leaves, is_placed=is_placed)
        axes = self._mesh.axis_names
        take = functools.partial(
            self._take_shards, self._cuts([leaf.shape for leaf in leaves])
        )

        def hand_shards_over(scalars: PyTree, shards: list[jax.Array]) -> jax.Array:
            at = jax.lax.axis_index(axes)
            return self._call(take, (at, scalars), shards, is_placed=True)

        return jax.shard_map(
            hand_shards_over,
            mesh=self._mesh,
            in_specs=(PartitionSpec(), self._specs),
            out_specs=PartitionSpec(),
            check_vma=False,
        )(scalars, leaves)

    def _call(
        self,
        take: Callable[[PyTree, list[np.ndarray[Any, Any]]], np.int32],
        scalars: PyTree,
        leaves: list[jax.Array],
        *,
        is_placed: bool,
    ) -> jax.Array:
        flat, structure = jax.tree.flatten(scalars)
        packing, number = Packing([*flat, *leaves]), len(flat)

        def unpacked(arrays: Sequence[Any]) -> np.int32:
            values = packing.unpack(arrays)
            scalars = structure.unflatten([value[()] for value in values[:number]])
            return take(scalars, values[number:])

        return call_host(unpacked, packing.pack([*flat, *leaves]), is_placed=is_placed)

    def tell(self, scalars: PyTree) -> jax.Array:
        """Have the host print that a due check has saved nothing."""
        # Not by a call from each device of a mesh, each of which would print.
        is_placed = jax.device_count() == 1
        take: Any = lambda scalars, _: self._tell(scalars)  # noqa: E731
        return self._call(take, scalars, [], is_placed=is_placed)

    def _cuts(self, shapes: Sequence[tuple[int, ...]]) -> list[list[Cut]]:
        """Return for each device which part of each leaf it hands over."""
        assert self._mesh is not None
        sizes = dict(zip(self._mesh.axis_names, self._mesh.axis_sizes, strict=True))
        return [
            [
                cut_of(shape, spec, sizes, dict(zip(sizes, at, strict=True)))
                for shape, spec in zip(shapes, self._specs, strict=True)
            ]
            for at in np.ndindex(*self._mesh.axis_sizes)
        ]

    # ---- on the host -----------------------------------------------------------------

    def reset(self) -> None:
        """Forget the saves that a program began to hand over and did not finish."""
        with self._guard:
            self._forget()
            self._broken = None

    def _take(
        self, scalars: PyTree, leaves: Sequence[np.ndarray[Any, Any]]
    ) -> np.int32:
        try:
            arrival = self._begin(scalars)
            if arrival is None:
                return np.int32(0)
            try:
                for target, leaf in zip(arrival.memory, leaves, strict=True):
                    np.copyto(target, leaf)
                self.receiver.arrived(arrival)
            except Exception as error:
                self.receiver.give_back(arrival.job)
                self._fail(error)
        except BaseException:  # an interrupt, which may come to the main thread
            self.receiver.take_back()
            raise
        return np.int32(0)

    def _take_shards(
        self,
        cuts: list[list[Cut]],
        device: tuple[Any, PyTree],
        shards: Sequence[np.ndarray[Any, Any]],
    ) -> np.int32:
        number, scalars = int(device[0]), device[1]
        try:
            at, event, is_first = self._event(number, scalars)
        except CheckpointError as error:
            error.__traceback__ = None
            if self._stops:
                raise error_at_exit(error) from None
            return np.int32(0)  # `wait` raises the error
        if is_first:
            try:
                event.arrival = self._begin(scalars)
                if event.arrival is not None:
                    self.receiver.hold(event.arrival.job)
            except BaseException as error:
                event.error = error
            event.is_ready.set()
        event.is_ready.wait()
        if event.arrival is None and event.error is not None:
            # Raise on all devices: one that went on would wait for the others for ever.
            with self._guard:
                event.arrived += 1
                if event.arrived == len(cuts):
                    self._forget()
            raise error_at_exit(event.error)
        if event.arrival is not None:
            parts = zip(event.arrival.memory, cuts[number], shards, strict=True)
            try:
                for target, cut, shard in parts:
                    if cut is not None:
                        np.copyto(target[*cut, ...], shard)
            except BaseException as error:
                event.error = error
        with self._guard:
            event.arrived += 1
            if event.arrived < len(cuts):
                return np.int32(0)
            self._events.pop(at, None)
        if event.error is None and event.arrival is not None:
            try:
                self.receiver.arrived(event.arrival)
            except BaseException as error:
                event.error = error
        if event.error is not None:
            # The other devices have gone on, so only the next save may end the program.
            if event.arrival is not None:
                self.receiver.give_back(event.arrival.job)
            self.receiver.fail(event.error.with_traceback(None))
        return np.int32(0)

    def _event(self, number: int, scalars: PyTree) -> tuple[int, _Event, bool]:
        """Find the save that a device's call belongs to: the n-th call to the n-th."""
        mark = b"".join(each.tobytes() for each in jax.tree.leaves(scalars))
        with self._guard:
            if self._broken is not None:
                raise self._broken
            at = self._calls[number]
            event = self._events.get(at)
            is_first = event is None
            if event is None:
                event = _Event(mark)
            if event.mark != mark or (
                is_first and at < max(self._calls.values(), default=0)
            ):
                self._forget()
                self._broken = CheckpointError(
                    "A program that saves was ended before all devices had handed "
                    "over what they had begun to, and was run again. Call ckpt.wait() "
                    "in between; nothing is saved until then."
                )
                self.receiver.fail(self._broken, ends=self._stops)
                raise self._broken
            self._events[at] = event
            self._calls[number] = at + 1
            return at, event, is_first

    def _forget(self) -> None:
        for event in self._events.values():
            if event.arrival is not None:
                self.receiver.give_back(event.arrival.job)
        self._events.clear()
        self._calls.clear()

    def _begin(self, scalars: PyTree) -> Arrival | None:
        """Take down the call, and claim memory for its leaves.

        Returns:
            The save; None if it cannot be saved, and then `wait` raises the error.

        Raises:
            CheckpointError: If this error, or an earlier one, is to end the program.
        """
        if self._stops:
            self.receiver.end_program()
        try:
            flags, call = self._call_of(scalars)
            return self.receiver.expect(
                self._trees, call, to_slot=bool(flags["to_slot"])
            )
        except Exception as error:
            self._fail(error)
            return None

    def _call_of(self, scalars: PyTree) -> tuple[Mapping[str, Any], Call]:
        flags, at = scalars["flags"], scalars["at"]
        state = with_leaves(self._state, **scalars["state"])
        logs = {**self._logs, **scalars["logs"]}
        call = Call(bool(flags["save"]), Moment(**at), logs, state)
        call.before = with_leaves(state, **scalars["before"])
        return flags, call

    def _tell(self, scalars: PyTree) -> np.int32:
        flags, call = self._call_of(scalars)
        if flags["due"]:
            self.receiver.tell_decided(call)
        return np.int32(0)

    def _fail(self, error: BaseException) -> None:
        # Without the frames, which still run and hold views of the program's memory.
        self.receiver.fail(error.with_traceback(None), ends=self._stops)
        if self._stops:
            raise error_at_exit(error) from None
