"""Orbax in silence: what it logs while this package calls it tells a user nothing.

Orbax logs through `absl.logging`, whose first call also gives Python's root logger a
handler, after which a user's own `logging.basicConfig` does nothing. So while one of
this package's calls to Orbax is under way, the lines of that call's threads do not get
as far as `absl.logging`. No logger, handler, level or filter is touched, and absl logs
the lines of all other threads as ever.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Generator
from typing import Any

import absl.logging


class _Call:
    """One of this package's calls to Orbax, which works on several threads."""

    def __init__(self) -> None:
        self._others = set(threading.enumerate()) - {threading.current_thread()}

    def runs_on(self, thread: threading.Thread) -> bool:
        """Tell whether a thread is the caller's, or one that has started since."""
        return thread not in self._others


class _Gate:
    """Stands in for `absl.logging.log`, through which all of absl's functions log."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._calls: list[_Call] = []
        self._through: Any = absl.logging.log

    def enter(self, call: _Call) -> None:
        with self._guard:
            self._calls.append(call)
            if absl.logging.log is not _log:
                self._through = absl.logging.log
                absl.logging.log = _log

    def leave(self, call: _Call) -> None:
        with self._guard:
            self._calls.remove(call)
            if not self._calls and absl.logging.log is _log:
                absl.logging.log = self._through

    def log(self, *args: Any, **kwargs: Any) -> None:
        thread = threading.current_thread()
        if not any(call.runs_on(thread) for call in tuple(self._calls)):
            self._through(*args, **kwargs)

    def open(self) -> None:
        """Forget all calls: none of them is under way in a process that was forked."""
        self._guard = threading.Lock()
        self._calls.clear()
        if absl.logging.log is _log:
            absl.logging.log = self._through


_GATE = _Gate()
_log = _GATE.log  # one object, so that it can be told from others
os.register_at_fork(after_in_child=_GATE.open)
# absl names the line that logs, and skips the frames that it has been told of.
absl.logging.ABSLLogger.register_frame_to_skip(__file__, "log")


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Keep what Orbax logs from the console until the block ends.

    If the user has set absl's verbosity to INFO or more, Orbax logs as ever.
    """
    if _is_wanted():
        yield
        return
    call = _Call()
    _GATE.enter(call)
    try:
        yield
    finally:
        _GATE.leave(call)


def _is_wanted() -> bool:
    """Tell whether the user has asked absl for lines of this kind."""
    level = logging.getLogger("absl").level
    return absl.logging.get_verbosity() >= absl.logging.INFO or (
        logging.NOTSET < level <= logging.INFO
    )
