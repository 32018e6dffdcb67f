"""Locks that neither an interrupt nor a fork leaves locked.

An interrupt (Ctrl-C) may come at the end of a `with` statement, before the lock is
unlocked. So the thread's next call unlocks all locks that the thread still has. A
forked process has none of the threads that had locked a lock, so it resets all locks.
"""

import os
import threading
import weakref
from typing import Any

from flaxckpt._runtime.frames import is_nested

_made: list[weakref.ref[Any]] = []


def new_lock() -> Any:
    """Make a lock that its thread may lock again."""
    lock = threading.RLock()
    _made.append(weakref.ref(lock, _made.remove))
    return lock


def unlock_all() -> None:
    """Unlock the locks that an interrupted call of this thread has left locked.

    A call of the package begins with this. If it was made during another call, the
    thread's locks belong to that other call, and stay locked.
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
