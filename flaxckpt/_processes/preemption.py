"""Signals that tell a process to end, remembered until the loop asks for them."""

import os
import signal
import threading
import weakref
from types import FrameType
from typing import Any

from jax.experimental.multihost_utils import reached_preemption_sync_point

from flaxckpt.errors import SettingError

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Watch:
    """Remembers the first of SIGTERM and SIGINT, instead of ending at once.

    A second one ends the process as it would have without. Several watches share the
    signals; with the last of them closed, the earlier handlers are back.

    Attributes:
        signal: Name of the signal that came, such as `SIGTERM`; None for none yet.
    """

    def __init__(self) -> None:
        """Take the signals over.

        Raises:
            SettingError: Outside of the main thread, where Python takes no signals.
        """
        if threading.current_thread() is not threading.main_thread():
            raise SettingError(
                "save_on_preemption",
                True,
                "signals are handled in the main thread only. Make the object there.",
            )
        self.signal: str | None = None
        weakref.finalize(self, _give_back)
        _watches.add(self)
        for number in _SIGNALS:
            if number not in _earlier:
                _earlier[number] = signal.signal(number, _remember)

    def look(self) -> str | None:
        """Return `signal`."""
        return self.signal

    def close(self) -> None:
        """Give the signals back, unless somebody else has taken them since."""
        _watches.discard(self)
        _give_back()


class AgreedWatch:
    """Tells all processes of a run at the same call that one of them is to end.

    JAX's coordination service has them agree: it takes SIGTERM of each
    (`jax.experimental.multihost_utils.reached_preemption_sync_point`).

    Attributes:
        signal: `SIGTERM`, once it has come to one of them; None for none yet.
    """

    def __init__(self) -> None:
        """Take nothing over."""
        self.signal: str | None = None
        self._calls = 0

    def look(self) -> str | None:
        """Return `signal`; every process must call this equally often."""
        self._calls += 1
        if self.signal is None and reached_preemption_sync_point(self._calls):
            self.signal = signal.SIGTERM.name
        return self.signal

    def close(self) -> None:
        """Do nothing: there is nothing to give back."""


_watches: "weakref.WeakSet[Watch]" = weakref.WeakSet()
_earlier: dict[int, Any] = {}  # the handlers of before, of the signals taken over


def _give_back() -> None:
    """Give the signals back if nobody watches. If that is interrupted, do it again.

    Another thread, which may be collecting garbage, cannot: then the next signal does.
    """
    if _watches or threading.current_thread() is not threading.main_thread():
        return
    for number in list(_earlier):
        if signal.getsignal(number) is _remember:
            signal.signal(number, _earlier[number])
        del _earlier[number]


def _forget() -> None:
    """Let a forked process, which has a loop of its own or none, end as ever."""
    _watches.clear()
    _give_back()


os.register_at_fork(after_in_child=_forget)


def _remember(number: int, frame: FrameType | None) -> None:
    watches = list(_watches)
    if any(watch.signal is not None for watch in watches) or not watches:
        handler = _earlier.get(number)
        if not watches:
            _give_back()
        if callable(handler):
            handler(number, frame)
        elif handler == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        return
    for watch in watches:
        watch.signal = signal.Signals(number).name
