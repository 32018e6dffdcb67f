"""The ways of writing that this process has already checked, by directory.

The writer checks a checkpoint before it takes its place, the first time that such a
tree is written into a directory in such a way. A bug in the writer then shows at the
save, and not at the restore.
"""

import functools
from collections import deque
from typing import Any

_REMEMBERED = 64


class Looks:
    """The kinds of checkpoints that were checked, and were complete."""

    def __init__(self) -> None:
        """Begin with no kinds."""
        self._seen: deque[tuple[Any, ...]] = deque(maxlen=_REMEMBERED)

    def is_new(self, *what: Any) -> bool:
        """Tell whether a checkpoint of this kind has to be checked.

        Args:
            *what: The directory, the way of writing, the tree's layout, and its leaves'
                placements. They are equal for checkpoints that must have the same
                files.
        """
        return what not in tuple(self._seen)  # a copy: another thread may append to it

    def note(self, *what: Any) -> None:
        """Note that a checkpoint was complete; keep each large layout only once."""
        earlier = [each for other in tuple(self._seen) for each in other]
        kept = (next((one for one in earlier if one == each), each) for each in what)
        self._seen.appendleft(tuple(kept))


@functools.cache
def shared_looks() -> Looks:
    """Return the one `Looks` of this process, which all objects share."""
    return Looks()
