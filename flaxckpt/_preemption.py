"""Signals that tell a process to end, remembered until the loop asks for them."""

import os
import signal
import threading
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
        _watches.append(self)
        if len(_watches) == 1:
            for number in _SIGNALS:
                _earlier[number] = signal.getsignal(number)
                signal.signal(number, _remember)

    def look(self) -> str | None:
        """Return `signal`."""
        return self.signal

    def close(self) -> None:
        """Give the signals back, unless somebody else has taken them since."""
        if self not in _watches:
            return
        if len(_watches) == 1:
            _give_back()
        _watches.remove(self)


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


_watches: list[Watch] = []
_earlier: dict[int, Any] = {}


def _give_back() -> None:
    for number in _SIGNALS:
        if signal.getsignal(number) is _remember:
            signal.signal(number, _earlier[number])


def _forget() -> None:
    """Let a forked process, which has a loop of its own or none, end as ever."""
    if _watches:
        _give_back()
        _watches.clear()


os.register_at_fork(after_in_child=_forget)


def _remember(number: int, frame: FrameType | None) -> None:
    if any(watch.signal is not None for watch in _watches):
        handler = _earlier[number]
        if callable(handler):
            handler(number, frame)
        elif handler == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        return
    for watch in _watches:
        watch.signal = signal.Signals(number).name
