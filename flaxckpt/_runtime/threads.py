"""How background work leaves the cores and the interpreter's lock to training.

Training keeps the cores busy, and checkpoints are written in the same process. So the
writing threads are few, have a low priority, and often give up the interpreter's lock.
"""

import itertools
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from flaxckpt._runtime.unchecked import unchecked_pool

_MOST_THREADS = 4
_NICER, _MUCH_NICER = 5, 15
_TURN_SECS, _PAUSE_SECS = 5e-4, 5e-5


def stand_back(nicer: int = _NICER) -> None:
    """Lower the priority of this thread, and of the threads that it starts later.

    Linux gives a thread that is 5 steps nicer a third of the weight of another thread.
    With less, a save would not be done before the next save.

    Args:
        nicer: How many steps of niceness to add.
    """
    if sys.platform == "linux":  # elsewhere, niceness is set for the whole process
        os.nice(nicer)


def writing_threads() -> int:
    """Return how many threads write files: half the cores, but 2 to 4 (1 on 1 core)."""
    cores = os.cpu_count() or 1
    return min(cores, _MOST_THREADS, max(2, cores // 2))


def writing_pool() -> ThreadPoolExecutor:
    """Make a pool of `writing_threads` threads.

    Threads beyond half the cores are much nicer, and so take only idle time.
    """
    threads, cores = itertools.count(), os.cpu_count() or 1

    def begin() -> None:
        if next(threads) >= max(1, cores // 2):
            stand_back(_MUCH_NICER - _NICER)

    return unchecked_pool(writing_threads(), "flaxckpt-write", begin)


def give_way(turn: float) -> float:
    """Give up the interpreter's lock for a moment, after half a millisecond of work.

    Python itself would take the lock away only after 5 ms, and a training step asks for
    it several times.

    Args:
        turn: When the work began, in seconds of `time.perf_counter`.

    Returns:
        When the work goes on, in the same seconds: the next call's `turn`.
    """
    if time.perf_counter() - turn < _TURN_SECS:
        return turn
    time.sleep(_PAUSE_SECS)
    return time.perf_counter()
