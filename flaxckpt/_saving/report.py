"""What a `ModelCheckpoint` counts of its saves."""

from dataclasses import dataclass


@dataclass
class SaveCounts:
    """What became of the saves of a `ModelCheckpoint`.

    Attributes:
        saved: Those that were written.
        direct: Those of them whose values were written straight from memory.
        by_orbax: Those whose values Orbax wrote.
        superseded: Those that were not, because a newer one to the same path came
            while they waited for their turn.
        delayed: Calls that waited for earlier saves, since there were as many under
            way as `max_in_flight` allows.
        delayed_secs: How long they waited, in all.
        failed: Those that could not be written. `wait`, `close` or a later call raises
            the error of the first; those of others are notes on it.
        linked_bytes: How much of frozen leaves did not have to be written again.
    """

    saved: int = 0
    direct: int = 0
    by_orbax: int = 0
    superseded: int = 0
    delayed: int = 0
    delayed_secs: float = 0.0
    failed: int = 0
    linked_bytes: int = 0
