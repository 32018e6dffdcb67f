"""Drop Orbax's log lines while this package calls Orbax: they tell a user nothing.

Orbax logs through `absl.logging`, whose first call also gives Python's root logger a
handler, after which a user's own `logging.basicConfig` does nothing. So while one of
this package's calls to Orbax is under way, Orbax's lines on that call's threads do not
reach `absl.logging`. No logger, handler, level or filter is touched, and absl logs all
other lines as before.
"""

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Generator
from typing import Any

import absl.logging


class _Gate:
    """A replacement for `absl.logging.log`, which all of absl's functions call.

    It keeps the threads that do not belong to each of this package's calls to Orbax. A
    call runs on the caller's thread and on those that have started since.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._others: list[set[threading.Thread]] = []
        self._through: Any = absl.logging.log

    def enter(self, others: set[threading.Thread]) -> None:
        with self._guard:
            self._others.append(others)
            if absl.logging.log is not _log:
                self._through = absl.logging.log
                absl.logging.log = _log

    def leave(self, others: set[threading.Thread]) -> None:
        with self._guard:
            self._others.remove(others)
            if not self._others and absl.logging.log is _log:
                absl.logging.log = self._through

    def log(self, *args: Any, **kwargs: Any) -> None:
        thread = threading.current_thread()
        is_ours = any(thread not in others for others in tuple(self._others))
        if not (is_ours and _is_of_orbax()):
            self._through(*args, **kwargs)

    def open(self) -> None:
        """Forget all calls: in a forked process, none of them is under way."""
        self._guard = threading.Lock()
        self._others.clear()
        if absl.logging.log is _log:
            absl.logging.log = self._through


_GATE = _Gate()
_log = _GATE.log  # one object, so that `is` recognizes it
os.register_at_fork(after_in_child=_GATE.open)
# absl reports the line that logs: it has to skip the frame of `_Gate.log`.
absl.logging.ABSLLogger.register_frame_to_skip(__file__, "log")


def _is_of_orbax() -> bool:
    """Tell whether Orbax has called absl's function that is logging."""
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") == "absl.logging":
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__", "")[:6] == "orbax."


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Keep Orbax's log lines from the console until the block ends.

    If the user has set absl's verbosity to INFO or more, Orbax logs as before.
    """
    if _is_wanted():
        yield
        return
    others = set(threading.enumerate()) - {threading.current_thread()}
    _GATE.enter(others)
    try:
        yield
    finally:
        _GATE.leave(others)


def _is_wanted() -> bool:
    """Tell whether the user has asked absl for lines of this kind."""
    level = logging.getLogger("absl").level
    return absl.logging.get_verbosity() >= absl.logging.INFO or (
        logging.NOTSET < level <= logging.INFO
    )
