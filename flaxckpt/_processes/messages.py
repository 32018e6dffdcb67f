"""Messages between the processes of one run, over JAX's coordination service.

Messages go through the service's table of keys and values. Every process reaches it
without a collective: from any thread, whatever the devices are doing, and with
time-outs that hold (https://docs.jax.dev/en/latest/multi_process.html). Process 0
leads.
"""

import functools
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax

from flaxckpt import errors
from flaxckpt._runtime.failures import in_one_line
from flaxckpt._runtime.jax_internals import distributed_state
from flaxckpt.errors import CheckpointError

TIMEOUT_SECS = 600.0
LEADER = 0


def are_several() -> bool:
    """Tell whether this is one of several processes; starts no backend."""
    return process_count() > 1


def process_count() -> int:
    """Return how many processes there are."""
    if not jax.distributed.is_initialized():
        return 1
    return int(distributed_state().num_processes or 1)


def process_index() -> int:
    """Return the index of this process."""
    if not jax.distributed.is_initialized():
        return 0
    return int(distributed_state().process_id or 0)


def is_leader() -> bool:
    """Tell whether this process is the one that leads."""
    return process_index() == LEADER


class Channel:
    """Messages of all processes under one name, in rounds.

    Every process must make the channels of a name in the same order.
    """

    def __init__(self, name: str, timeout: float = TIMEOUT_SECS) -> None:
        """Send nothing yet.

        Args:
            name: Its name.
            timeout: How long to wait for a message, in seconds.
        """
        self._timeout = timeout
        self._key = f"flaxckpt/{name}/{_MADE[name]}"
        _MADE[name] += 1
        self._rounds = itertools.count()

    def round(self) -> "Round":
        """Begin the next exchange of messages."""
        return Round(f"{self._key}/{next(self._rounds)}", self._timeout)


_MADE: Counter[str] = Counter()


class Round:
    """One exchange of messages.

    A message is a value that JSON has, or an error, which `hear` raises.
    """

    def __init__(self, key: str, timeout: float) -> None:
        """Send nothing yet.

        Args:
            key: Prefix of its messages' keys.
            timeout: How long to wait for a message, in seconds.
        """
        self._key, self._timeout = key, timeout

    def tell(self, subject: str, content: Any, *, again: bool = False) -> None:
        """Send a message to all processes.

        Args:
            subject: What the message is about.
            content: The message; `hear` raises a `CheckpointError`.
            again: Whether the message may replace an earlier one on the subject.
        """
        if isinstance(content, CheckpointError):
            message = {"error": [_name_of(type(content)), content.args]}
        else:
            message = {"content": content}
        text = json.dumps(message, default=str)
        _client().key_value_set(f"{self._key}/{subject}/{process_index()}", text, again)

    def hear(
        self, subject: str, process: int = LEADER, timeout: float | None = None
    ) -> Any:
        """Wait for a message of a process.

        Args:
            subject: What the message is about.
            process: Index of the process.
            timeout: How long to wait, in seconds; None for as long as usual.

        Raises:
            CheckpointError: If the message is an error, or does not come in time.
        """
        key, secs = f"{self._key}/{subject}/{process}", timeout or self._timeout
        try:
            text = _client().blocking_key_value_get(key, int(secs * 1e3))
        except jax.errors.JaxRuntimeError as error:
            raise CheckpointError(
                f"Process {process} of {process_count()} gave no sign within "
                f"{self._timeout:.3g} s ({subject}). It may have died, or not have "
                "come to this call: every process must make the same calls."
            ) from error
        message = json.loads(text)
        if "error" in message:
            name, arguments = message["error"]
            raise getattr(errors, name)(*arguments)
        return message["content"]

    def hear_all(self, subject: str) -> list[Any]:
        """Wait for the messages of all processes, and return them in order."""
        until, found = time.monotonic() + self._timeout, list[Any]()
        for process in range(process_count()):
            left = max(until - time.monotonic(), 0.1)  # one time-out for all messages
            found.append(self.hear(subject, process, left))
        return found

    def hear_others(self, subject: str) -> list[Any]:
        """Wait for the messages of all but process 0; raise the first error at the end.

        By then no process is still at work on what the messages are about.
        """
        until, found = time.monotonic() + self._timeout, list[Any]()
        errors: list[CheckpointError] = []
        for process in range(1, process_count()):
            try:
                left = max(until - time.monotonic(), 0.1)
                found.append(self.hear(subject, process, left))
            except CheckpointError as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return found

    def forget(self) -> None:
        """Delete all messages of the round, once every process has heard them."""
        _client().key_value_delete(self._key)


def _name_of(kind: type[CheckpointError]) -> str:
    """Name a class of errors, or the nearest above it that `errors` has."""
    return next(
        each.__name__ for each in kind.__mro__ if hasattr(errors, each.__name__)
    )


def gathered(name: str, content: Any) -> list[Any]:
    """Return what each process passes, in order; every process must call this.

    Args:
        name: What the exchange is about.
        content: This process's value; a `CheckpointError` is raised in all processes.

    Raises:
        CheckpointError: The error of the first process that passes one; or if a process
            does not come.
    """
    if not are_several():
        if isinstance(content, CheckpointError):
            raise content
        return [content]
    exchange = _channel(name).round()
    exchange.tell("each", content)
    return exchange.hear_all("each")


def from_leader(name: str, make: Callable[[], Any]) -> Any:
    """Return in all processes what process 0 makes; every process must call this.

    Raises:
        CheckpointError: If `make` raises in process 0, or process 0 does not come.
            Process 0 itself raises what `make` raised.
    """
    if not are_several():
        return make()
    exchange = _channel(name).round()
    if is_leader():
        try:
            made = make()
        except CheckpointError as error:
            made = error
        except BaseException as error:  # the other processes wait for this one
            failed = CheckpointError(f"Process 0 failed: {in_one_line(error)}.")
            exchange.tell("leader", failed)
            raise
        exchange.tell("leader", made)
    return exchange.hear("leader")


@functools.cache
def _channel(name: str) -> Channel:
    return Channel(name)


def _client() -> Any:
    return distributed_state().client
