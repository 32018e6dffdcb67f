"""The ways of writing that this process has already checked, by directory.

A checkpoint is looked at before it takes its place where its tree is written into a
directory for the first time, or for the first time in this way: a bug in what writes it
shows then, and not when it is to be restored.
"""

import functools
from collections import deque
from typing import Any

_REMEMBERED = 64


class Looks:
    """What was looked at, and all there."""

    def __init__(self) -> None:
        """Nothing was looked at yet."""
        self._seen: deque[tuple[Any, ...]] = deque(maxlen=_REMEMBERED)

    def is_new(self, *what: Any) -> bool:
        """Tell whether a look is due.

        Args:
            *what: The directory, the way of writing, the tree's layout, and where its
                leaves were: whatever compares as equal where the same files are to be
                there.
        """
        return what not in tuple(self._seen)  # which another thread may change

    def note(self, *what: Any) -> None:
        """Note what was looked at and all there; large layouts are kept once."""
        earlier = [each for other in tuple(self._seen) for each in other]
        kept = (next((one for one in earlier if one == each), each) for each in what)
        self._seen.appendleft(tuple(kept))


@functools.cache
def shared_looks() -> Looks:
    """Return what all objects of this process have looked at."""
    return Looks()
