"""The clock of `save_interval_secs`: it tells when an interval is over.

The clocks of several processes differ, so the clock of process 0 counts, and all
processes must learn at the same call that the interval is over. They may be any number
of calls apart, because JAX dispatches steps asynchronously: a message "now" would come
too late for processes that are ahead. So they meet at calls that all know beforehand.
At a meeting, process 0 says whether the interval is over, and if not, after how many
calls they meet next: when a quarter of the remaining time will have passed at the pace
so far, but after at most as many calls as there were so far. So an interval of any
length has some tens of meetings, other calls send no message, and steps that grow
slower do not make the interval many times as long. Process 0 waits for nobody; the
others wait until process 0 has come to the call.
"""

import time
from collections.abc import Callable

from flaxckpt._processes.messages import Channel, is_leader


class Interval:
    """Tell in one process when an interval is over."""

    def __init__(
        self, secs: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Set the length; the interval begins at the first call of `is_over`.

        Args:
            secs: How long the interval is, in seconds.
            clock: Returns the time, in seconds.
        """
        self._secs, self._clock = secs, clock
        self._start: float | None = None

    def is_over(self) -> bool:
        """Tell whether the interval is over; the first call begins it."""
        return self._passed() >= self._secs

    def restart(self) -> None:
        """Begin anew, now."""
        self._start = self._clock()

    def _passed(self) -> float:
        now = self._clock()
        if self._start is None:
            self._start = now
        return now - self._start


class AgreedInterval(Interval):
    """Tell all processes at the same call, by the clock of process 0.

    Every process must make the same calls.
    """

    def __init__(
        self,
        secs: float,
        clock: Callable[[], float] = time.monotonic,
        *,
        channel: Channel,
    ) -> None:
        """Set the length; the interval begins at the first call of `is_over`.

        Args:
            secs: How long the interval is, in seconds.
            clock: Returns the time, in seconds.
            channel: Carries the messages.
        """
        super().__init__(secs, clock)
        self._channel = channel
        self._round, self._earlier = channel.round(), channel.round()
        self._calls = self._next = 0

    def is_over(self) -> bool:
        """Tell whether the interval is over; every process must call this.

        Raises:
            CheckpointError: If process 0 does not come to this call in time.
        """
        self._calls += 1
        if self._calls < self._next:
            return False
        subject = f"interval, call {self._calls}"
        if is_leader():
            wait = calls_to_wait(self._calls, self._passed(), self._secs)
            self._round.tell(subject, wait)
        else:
            wait = self._round.hear(subject)
        self._next = self._calls + wait
        return wait == 0

    def restart(self) -> None:
        """Begin anew, now; every process must have come to the `restart` before."""
        super().restart()
        self._calls = self._next = 0
        if is_leader():
            self._earlier.forget()
        self._earlier, self._round = self._round, self._channel.round()


def calls_to_wait(calls: int, passed: float, secs: float) -> int:
    """Return after how many calls to look at the clock; 0 if the interval is over.

    Args:
        calls: How many calls there were so far, at least 1.
        passed: The time since the interval began, in seconds.
        secs: How long the interval is, in seconds.
    """
    left = secs - passed
    if left <= 0:
        return 0
    quarter = calls * left / passed / 4 if passed else calls
    return max(int(min(quarter, calls)), 1)
