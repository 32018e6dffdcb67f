"""How work in the background leaves the machine to the training loop.

Training keeps the cores busy, and what writes checkpoints runs in the same process: it
gets what is left of the cores, and of the interpreter's lock, and not much more.
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
    """Have this thread, and those that it starts, leave most of a busy core to others.

    Linux gives a thread that is 5 steps nicer a third of the weight of another. With
    less, a save would not be done when the next one comes.

    Args:
        nicer: Steps.
    """
    if sys.platform == "linux":  # elsewhere it is for the whole process
        os.nice(nicer)


def writing_threads() -> int:
    """Return how many threads write to files: half the cores, and two at least."""
    cores = os.cpu_count() or 1
    return min(cores, _MOST_THREADS, max(2, cores // 2))


def writing_pool() -> ThreadPoolExecutor:
    """Make that many threads.

    If they are more than half the cores, the others take only what is idle.
    """
    threads, cores = itertools.count(), os.cpu_count() or 1

    def begin() -> None:
        if next(threads) >= max(1, cores // 2):
            stand_back(_MUCH_NICER - _NICER)

    return unchecked_pool(writing_threads(), "flaxckpt-write", begin)


def give_way(turn: float) -> float:
    """Let the training loop have the interpreter's lock, after a while of work.

    Python itself would take it away after 5 ms only, and a step asks several times.

    Args:
        turn: When the work began, in the seconds of `time.perf_counter`.

    Returns:
        When it goes on.
    """
    if time.perf_counter() - turn < _TURN_SECS:
        return turn
    time.sleep(_PAUSE_SECS)
    return time.perf_counter()
