"""The program's end: finish the saves under way, and report their errors."""

import concurrent.futures.thread
import os
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

from flaxckpt.errors import CheckpointError


def error_at_exit(error: BaseException) -> CheckpointError:
    """Return an error that ends a program and quotes another error, which is kept."""
    return CheckpointError(f"{type(error).__name__}: {error}")


def before_end(function: Callable[[], None]) -> None:
    """Have a function called at the program's end, before the saves are finished."""
    if function not in _BEFORE_END:
        _BEFORE_END.append(function)


_BEFORE_END: list[Callable[[], None]] = []
UNHEARD: set[Any] = set()


# A forked process, which has none of its parent's threads, forgets the parent's jobs.
os.register_at_fork(after_in_child=UNHEARD.clear)
os.register_at_fork(after_in_child=_BEFORE_END.clear)


def settle_saves() -> None:
    """Wait for the saves that all objects of this process have under way.

    A loop that was interrupted may have left an object that nobody has closed. Whoever
    restores in this process wants what that object has saved. A function of `on_saved`
    waits for none: its own object waits for it.
    """
    queues = list(UNHEARD)
    if not any(queue.is_on_its_thread() for queue in queues):
        for queue in queues:
            queue.settle()


def _finish() -> None:
    """Finish the saves of objects that nobody has closed."""
    _join_others()
    for function in list(_BEFORE_END):
        try:
            function()
        except Exception as error:
            _tell(error)
    for queue in list(UNHEARD):
        while True:
            try:
                queue.close()
                break
            except (CheckpointError, Warning) as error:  # each is raised once
                _tell(error)


def _tell(error: Exception) -> None:
    """Warn of an error that no call can raise any more; print it if warnings raise."""
    message = f"At the program's end: {error}"
    try:
        warnings.warn(message, stacklevel=1)
    except Warning:
        print(f"flaxckpt: {message}", file=sys.stderr)


def _join_others() -> None:
    """Wait for other threads, which may be training; Python does the same later."""
    for thread in threading.enumerate():
        is_pooled = thread in concurrent.futures.thread._threads_queues  # pyright: ignore
        is_own = thread in (threading.current_thread(), threading.main_thread())
        if not (is_own or is_pooled or thread.daemon):
            thread.join()


# `atexit` runs too late: thread pools, which Orbax uses, take no work by then.
threading._register_atexit(_finish)  # pyright: ignore  # as concurrent.futures does
