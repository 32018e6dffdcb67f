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
    """Remember the first SIGTERM or SIGINT, instead of ending the process at once.

    A second signal ends the process as it would without a watch. Several watches share
    the handlers. When the last watch is closed, the earlier handlers are back.

    Attributes:
        signal: Name of the signal that came, such as `SIGTERM`; None if none came.
    """

    def __init__(self) -> None:
        """Install the handlers.

        Raises:
            SettingError: Outside of the main thread, where Python handles no signals.
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
        """End the watch; the last one restores handlers that nobody has replaced."""
        _watches.discard(self)
        _give_back()


class AgreedWatch:
    """Tell all processes of a run at the same call that one of them is to end.

    JAX's coordination service handles SIGTERM in each process, and has all agree on the
    call (`jax.experimental.multihost_utils.reached_preemption_sync_point`).

    Attributes:
        signal: `SIGTERM`, once it has come to one process; None before.
    """

    def __init__(self) -> None:
        """Install nothing: JAX has the handler."""
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
    """Remember a signal for the watches, or else do what the earlier handler did.

    A handler that was set later may call this one long after the last watch is closed.
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
        elif self.earlier != signal.SIG_IGN:  # the default, or a handler that C set
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def _give_back() -> None:
    """Restore the earlier handlers if no watch is left; an interrupted call may repeat.

    Only the main thread can. If another thread collects the last watch as garbage, the
    next signal restores them.
    """
    if _watches or threading.current_thread() is not threading.main_thread():
        return
    for number in _SIGNALS:
        there = signal.getsignal(number)
        # Python cannot restore a handler that C set: ours stays, and does the default.
        if isinstance(there, _Handler) and there.earlier is not None:
            signal.signal(number, there.earlier)


def _forget() -> None:
    """Have signals end a forked process as usual: the parent's loop is not its own."""
    _watches.clear()
    _give_back()


os.register_at_fork(after_in_child=_forget)
