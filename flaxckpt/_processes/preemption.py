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
            there = signal.getsignal(number)
            if not isinstance(there, _Handler):
                signal.signal(number, _Handler(there))

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


class _Handler:
    """Remembers a signal for those who watch, or else does what the one before did.

    Others may call it long after: a handler that was set since, and calls the one that
    it found.
    """

    def __init__(self, earlier: Any) -> None:
        """Keep what `signal.getsignal` has returned; None for a handler that C set."""
        self.earlier = earlier

    def __call__(self, number: int, frame: FrameType | None) -> None:
        watches = list(_watches)
        if watches and all(watch.signal is None for watch in watches):
            for watch in watches:
                watch.signal = signal.Signals(number).name
            return
        if not watches:
            _give_back()
        if callable(self.earlier):
            self.earlier(number, frame)
        elif self.earlier != signal.SIG_IGN:  # nor can Python call what C set
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def _give_back() -> None:
    """Give the signals back if nobody watches. If that is interrupted, do it again.

    Another thread, which may be collecting garbage, cannot: then the next signal does.
    """
    if _watches or threading.current_thread() is not threading.main_thread():
        return
    for number in _SIGNALS:
        there = signal.getsignal(number)
        # Python cannot set what C set: then ours stays, and does the default.
        if isinstance(there, _Handler) and there.earlier is not None:
            signal.signal(number, there.earlier)


def _forget() -> None:
    """Let a forked process, which has a loop of its own or none, end as ever."""
    _watches.clear()
    _give_back()


os.register_at_fork(after_in_child=_forget)
