"""Look again at checkpoints that a writer changes meanwhile, but not for ever."""

import itertools
import time
from collections.abc import Iterator

LOOKS = 20  # at least so many
SECS = 10.0  # and at least for so long
PAUSE_SECS = 0.01  # between two looks at a checkpoint that seems damaged


def looks() -> Iterator[int]:
    """Count the looks that a reader takes until it gives up, from 1.

    A number alone is no good limit: on a busy machine, a small checkpoint may be
    replaced at each of the looks. Nor is a time alone: one look at a large checkpoint
    takes long. So a reader gives up after `LOOKS` looks and `SECS` seconds.
    """
    until = time.monotonic() + SECS
    for number in itertools.count(1):
        yield number
        if number >= LOOKS and time.monotonic() >= until:
            return


def pause() -> None:
    """Give somebody who deletes or copies a checkpoint by hand time to go on."""
    time.sleep(PAUSE_SECS)
