"""Saves in the background: one at a time, none lost, no error unheard."""

import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from flaxckpt.errors import CheckpointError, CheckpointWriteError


class Writer:
    """Runs one save after the other on a thread of its own.

    A save that fails is remembered, and raised by the next call of any method.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._running: Future[None] | None = None
        self._path = ""

    def submit(self, path: str, save: Callable[[], None]) -> None:
        """Start a save. Call `wait` before, so that at most one is under way."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "flaxckpt")
        self._path = path
        _UNHEARD.add(self)
        self._running = self._thread.submit(save)

    def wait(self) -> None:
        """Wait until the save under way is durable.

        Raises:
            CheckpointError: If it failed; once.
        """
        running, self._running = self._running, None
        if running is None:
            return
        _UNHEARD.discard(self)
        error = running.exception()
        if isinstance(error, CheckpointError):
            raise error
        if error is not None:
            cause = f"{type(error).__name__}: {error}"
            raise CheckpointWriteError(self._path, cause) from error

    def check(self) -> None:
        """Raise the error of a save that has failed by now, without waiting."""
        if self._running is not None and self._running.done():
            self.wait()

    def close(self) -> None:
        """Wait for the save under way, and end the thread.

        Raises:
            CheckpointError: If that save failed.
        """
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None


_UNHEARD: set[Writer] = set()


def _finish() -> None:
    """End well where the program ends without `wait` or `close`."""
    for writer in list(_UNHEARD):
        try:
            writer.wait()
        except CheckpointError as error:
            warnings.warn(f"At the program's end: {error}", stacklevel=1)


# `atexit` runs too late: no thread pool takes work by then, and Orbax has some.
threading._register_atexit(_finish)  # pyright: ignore  # as concurrent.futures does
