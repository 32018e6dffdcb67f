"""Locks that neither an interrupt nor a fork leaves locked.

An interrupt (Ctrl-C) may come where a `with` statement ends, before it has unlocked;
and a forked process has none of the threads that had locked something. So the next call
of the same thread unlocks what it finds to be its own, and a child begins anew.
"""

import os
import threading
import weakref
from typing import Any

from flaxckpt._runtime.frames import is_nested

_made: list[weakref.ref[Any]] = []


def new_lock() -> Any:
    """Make a lock; the thread that has it may lock it again."""
    lock = threading.RLock()
    _made.append(weakref.ref(lock, _made.remove))
    return lock


def unlock_all() -> None:
    """Unlock what an interrupted call of this thread has left locked.

    Called where a call begins. Where that is within another call, which is under way,
    what this thread has locked is that one's, and stays.
    """
    own = [lock for lock in _all() if lock._is_owned()]
    if own and not is_nested():
        for lock in own:
            while lock._is_owned():
                lock.release()


def _all() -> list[Any]:
    return [lock for each in list(_made) if (lock := each()) is not None]


def _renew() -> None:
    for lock in _all():
        lock._at_fork_reinit()


os.register_at_fork(after_in_child=_renew)
