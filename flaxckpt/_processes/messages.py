"""Messages between the processes of one run, over JAX's coordination service.

Messages go through the service's table of keys and values. Every process reaches it
without a collective: from any thread, whatever the devices are doing, and with
time-outs that hold (https://docs.jax.dev/en/latest/multi_process.html). Process 0
leads.

A process that works for long on what others wait for gives signs of life. A time-out is
the time without a sign.
"""

import contextlib
import functools
import itertools
import json
import threading
from collections import Counter
from collections.abc import Callable, Generator
from typing import Any

import jax

from flaxckpt import errors
from flaxckpt._runtime.failures import in_one_line
from flaxckpt._runtime.jax_internals import distributed_state
from flaxckpt.errors import CheckpointError

TIMEOUT_SECS = 600.0
_SIGNS = 4  # in each time-out
_LAST_LOOK_SECS = 0.01
_LONGEST = 20  # time-outs for which a process gives signs, in case it hangs
SIGNS = "flaxckpt-signs"  # the name of the thread that gives signs of life
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


class SilenceError(CheckpointError):
    """A process gave no sign of life in time; to users, a `CheckpointError`."""


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
        self._signs = itertools.count(1)

    def round(self) -> "Round":
        """Begin the next exchange of messages."""
        number = next(self._rounds)
        return Round(f"{self._key}/{number}", self._timeout, f"{self._key}/signs")

    @contextlib.contextmanager
    def at_work(self) -> Generator[None]:
        """Give signs of life while this process works on what others wait for."""
        is_done = threading.Event()

        def give_signs() -> None:
            for _ in range(_SIGNS * _LONGEST):
                if is_done.wait(self._timeout / _SIGNS):
                    return
                sign = str(next(self._signs))
                with contextlib.suppress(jax.errors.JaxRuntimeError):
                    _set(f"{self._key}/signs/{process_index()}", sign, again=True)

        thread = threading.Thread(target=give_signs, name=SIGNS, daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_done.set()


_MADE: Counter[str] = Counter()
# Rounds of `joined` and `from_leader` whose messages are still there. Every process has
# left them once it comes to the next `joined`.
_PAST: list["Round"] = []


class Round:
    """One exchange of messages.

    A message is a value that JSON has, or an error, which `hear` raises.
    """

    def __init__(self, key: str, timeout: float, signs: str) -> None:
        """Send nothing yet.

        Args:
            key: Prefix of its messages' keys.
            timeout: How long to wait for a message or a sign of life, in seconds.
            signs: Prefix of the keys of signs of life.
        """
        self._key, self._timeout, self._signs = key, timeout, signs

    def tell(self, subject: str, content: Any, *, again: bool = False) -> None:
        """Send a message to all processes.

        Args:
            subject: What the message is about.
            content: The message; `hear` raises a `CheckpointError`.
            again: Whether the message may replace an earlier one on the subject.
        """
        _set(f"{self._key}/{subject}/{process_index()}", _encoded(content), again=again)

    def settle(self, subject: str, content: Any) -> Any:
        """Send a message unless a process has settled the subject; return what it said.

        Raises:
            CheckpointError: If the message that settled it is an error.
        """
        key = f"{self._key}/{subject}"
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # it is there already
            _set(key, _encoded(content))
        for _ in range(_SIGNS):  # a process that was stopped meanwhile looks again
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                return _got(key, self._timeout / _SIGNS)
        return _got(key, self._timeout)

    def hear(
        self, subject: str, process: int = LEADER, watch: "_Watch | None" = None
    ) -> Any:
        """Wait for a message of a process, as long as it gives signs of life.

        Args:
            subject: What the message is about.
            process: Index of the process.
            watch: The signs of life that the caller has seen; None to begin now.

        Raises:
            CheckpointError: If the message is an error.
            SilenceError: If it does not come in time.
        """
        watch = watch or _Watch(self._signs)
        while True:
            is_silent = watch.is_silent(process)
            wait = _LAST_LOOK_SECS if is_silent else self._timeout / _SIGNS
            try:
                return _got(f"{self._key}/{subject}/{process}", wait)
            except jax.errors.JaxRuntimeError as error:
                if is_silent:
                    raise SilenceError(
                        f"Process {process} (of 0 to {process_count() - 1}) gave no "
                        f"sign within {self._timeout:.3g} s. It may have died, or not "
                        "have come to this call: every process must make the same "
                        "calls."
                    ) from error
            watch.look()

    def hear_all(self, subject: str, first: int = LEADER) -> list[Any]:
        """Wait for the messages of all processes, and return them in order.

        Args:
            subject: What the messages are about.
            first: The first of the processes.

        Raises:
            SilenceError: If a process is silent. It may still be at work.
            CheckpointError: The first error among the messages, once all are there.
        """
        watch, found = _Watch(self._signs), list[Any]()
        problems: list[CheckpointError] = []
        for process in range(first, process_count()):
            try:
                found.append(self.hear(subject, process, watch))
            except CheckpointError as error:
                problems.append(error)
        if problems:
            silent = (each for each in problems if isinstance(each, SilenceError))
            raise next(silent, problems[0])
        return found

    def forget(self) -> None:
        """Delete all messages of the round; every process must have heard them."""
        _client().key_value_delete(self._key)


class _Watch:
    """The signs of life of all processes, as a waiting process has seen them.

    It counts its looks, and not the time: a process that was stopped for a while must
    not take the others for dead.
    """

    def __init__(self, signs: str) -> None:
        """Begin to wait; `signs` is the prefix of the signs' keys."""
        self._signs, self._looks = signs, 0
        # Of each process, its newest sign, and the look that has found it.
        self._seen: dict[str, tuple[str, int]] = {}

    def look(self) -> None:
        """Look for new signs; what the first look finds may be old."""
        for key, sign in _client().key_value_dir_get(f"{self._signs}/"):
            if self._seen.get(key, ("", 0))[0] != sign:
                self._seen[key] = sign, self._looks
        self._looks += 1

    def is_silent(self, process: int) -> bool:
        """Tell whether there was no new sign of a process for a time-out of looks."""
        last = self._seen.get(f"{self._signs}/{process}", ("", 0))[1]
        return self._looks - last >= _SIGNS


def _got(key: str, secs: float) -> Any:
    """Wait for a message, and return it; raise it if it is an error."""
    text = _client().blocking_key_value_get(key, max(int(secs * 1e3), 1))
    message = json.loads(text)
    if "error" in message:
        name, arguments, notes = message["error"]
        error = getattr(errors, name)(*arguments)
        for note in notes:
            error.add_note(note)
        raise error
    return message["content"]


def _encoded(content: Any) -> str:
    message = {"content": content}
    if isinstance(content, CheckpointError):
        notes = getattr(content, "__notes__", [])
        message = {"error": [_name_of(type(content)), content.args, notes]}
    return json.dumps(message, default=str)


def _set(key: str, text: str, *, again: bool = False) -> None:
    _client().key_value_set(key, text, again)


def _name_of(kind: type[CheckpointError]) -> str:
    """Name a class of errors, or the nearest above it that `errors` has."""
    return next(
        each.__name__ for each in kind.__mro__ if hasattr(errors, each.__name__)
    )


def joined(name: str, content: Any, join: Callable[[list[Any]], Any]) -> Any:
    """Return in all processes what process 0 makes of what each of them passes.

    Every process must call this.

    Args:
        name: What the exchange is about.
        content: This process's part. All processes raise the first exception among the
            parts, as a `CheckpointError`.
        join: Takes the parts of all processes, in order; process 0 calls it.

    Raises:
        CheckpointError: If another process passes an exception, or does not come.
    """
    exchange = _channel(name).round()
    told = content
    if isinstance(content, Exception) and not isinstance(content, CheckpointError):
        index = process_index()
        told = CheckpointError(f"Process {index} failed: {in_one_line(content)}.")
    exchange.tell("part", told)
    if is_leader():
        try:
            parts = exchange.hear_all("part")
            while _PAST:  # all processes have come here
                _PAST.pop().forget()
            exchange.tell("all", join(parts))
        except CheckpointError as error:
            exchange.tell("all", error)
        _PAST.append(exchange)
    try:
        return exchange.hear("all")
    except CheckpointError as error:
        if isinstance(content, Exception):
            raise error from content
        raise


def at_work(name: str) -> contextlib.AbstractContextManager[None]:
    """Give signs of life before `joined` of this name, for which others wait.

    Nothing happens in one process.
    """
    return _channel(name).at_work() if are_several() else contextlib.nullcontext()


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
            with at_work(name):
                made = make()
        except CheckpointError as error:
            made = error
        except BaseException as error:  # the other processes wait for this one
            failed = CheckpointError(f"Process 0 failed: {in_one_line(error)}.")
            exchange.tell("leader", failed)
            raise
        exchange.tell("leader", made)
        _PAST.append(exchange)
    return exchange.hear("leader")


@functools.cache
def _channel(name: str) -> Channel:
    return Channel(name)


def _client() -> Any:
    return distributed_state().client
