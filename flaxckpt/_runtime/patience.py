"""Look again at checkpoints that a writer changes meanwhile, but not for ever."""

import itertools
import time
from collections.abc import Iterator

from flaxckpt.errors import CheckpointError

TRIES = 20  # at least so many
SECS = 10.0  # and at least for so long
PAUSE_SECS = 0.01  # between two looks at a checkpoint that seems damaged


class BusyError(CheckpointError):
    """A writer deletes checkpoints too fast; to users, a `CheckpointError`."""

    @classmethod
    def of(cls, directory: str) -> "BusyError":
        """Make the error of a listing; `directory` is where the checkpoints are."""
        return cls(
            f"The checkpoints in {directory} were deleted faster than they could be "
            "read. List them again, or keep more of them (max_to_keep)."
        )


def tries() -> Iterator[int]:
    """Count the tries of a reader until it gives up, from 1.

    A number alone is no good limit: on a busy machine, a small checkpoint may be
    replaced at each of the tries. Nor is a time alone: one try at a large checkpoint
    takes long. So a reader gives up after `TRIES` tries and `SECS` seconds.
    """
    until = time.monotonic() + SECS
    for number in itertools.count(1):
        yield number
        if number >= TRIES and time.monotonic() >= until:
            return


def pause() -> None:
    """Give somebody who deletes or copies a checkpoint by hand time to go on."""
    time.sleep(PAUSE_SECS)
