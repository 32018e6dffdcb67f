"""When so much time has passed since the last check that another one is due.

The clocks of several processes differ, so process 0's counts, and all have to learn at
the same call what it shows. They may be any number of calls apart, since JAX runs what
they dispatch in its own time: a message that says "now" would come too late for those
ahead. So they meet at calls that all know beforehand. There, process 0 says whether the
time is over, and if not, at which call they meet next: when a quarter of what is left
will have passed, by the pace so far, but after at most as many calls as there were. So
there are some tens of meetings in an interval of any length, no message at any other
call, and an interval that steps grow slower in does not become many times as long.
Process 0 waits for nobody; the others wait until it has come to the call.
"""

import time
from collections.abc import Callable

from flaxckpt._processes.messages import Channel, is_leader


class Interval:
    """Tells when the time is over, in one process."""

    def __init__(
        self, secs: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin at the first call.

        Args:
            secs: How long it is.
            clock: Returns the time, in seconds.
        """
        self._secs, self._clock = secs, clock
        self._start: float | None = None

    def is_over(self) -> bool:
        """Tell whether the time is over; the first call begins it."""
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
    """Tells all processes at the same call, by the clock of process 0.

    All of them make the same calls.
    """

    def __init__(
        self,
        secs: float,
        clock: Callable[[], float] = time.monotonic,
        *,
        channel: Channel,
    ) -> None:
        """Begin at the first call.

        Args:
            secs: How long it is.
            clock: Returns the time, in seconds.
            channel: For what they tell each other.
        """
        super().__init__(secs, clock)
        self._channel = channel
        self._round, self._earlier = channel.round(), channel.round()
        self._calls = self._next = 0

    def is_over(self) -> bool:
        """Tell whether the time is over; every process must call this equally often.

        Raises:
            CheckpointError: If process 0 does not come to this call.
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
        """Begin anew, now; the time before, every process must have come to this."""
        super().restart()
        self._calls = self._next = 0
        if is_leader():
            self._earlier.forget()
        self._earlier, self._round = self._round, self._channel.round()


def calls_to_wait(calls: int, passed: float, secs: float) -> int:
    """Tell after how many calls to look at the clock again; 0 if the time is over.

    Args:
        calls: How many there were so far, at least 1.
        passed: In which time, in seconds.
        secs: How long the interval is.
    """
    left = secs - passed
    if left <= 0:
        return 0
    quarter = calls * left / passed / 4 if passed else calls
    return max(int(min(quarter, calls)), 1)
