"""Looking again at what a writer deletes and replaces meanwhile, but not for ever."""

import itertools
import time
from collections.abc import Iterator

LOOKS = 20  # at least so many
SECS = 10.0  # and at least for so long
PAUSE_SECS = 0.01  # between two looks at what seems to be damaged


def looks() -> Iterator[int]:
    """Count the looks that a reader takes until it gives up, from 1.

    A small checkpoint may be replaced more often in a second than a busy machine lets
    a reader run, so a number alone does not bound the looks; a large one takes long to
    read, so a time alone does not either.
    """
    until = time.monotonic() + SECS
    for number in itertools.count(1):
        yield number
        if number >= LOOKS and time.monotonic() >= until:
            return


def pause() -> None:
    """Let whoever deletes or copies something by hand get on with it."""
    time.sleep(PAUSE_SECS)
