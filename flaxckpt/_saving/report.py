"""`SaveCounts`: what a `ModelCheckpoint` counts of its saves."""

from dataclasses import dataclass


@dataclass
class SaveCounts:
    """What became of the saves of a `ModelCheckpoint`.

    Attributes:
        saved: Saves that were written.
        direct: Saves whose values flaxckpt wrote straight from memory.
        by_orbax: Saves whose values Orbax wrote.
        superseded: Saves that were not written, because a newer save to the same path
            came while they waited for their turn.
        delayed: Calls that waited because `max_in_flight` saves were under way.
        delayed_secs: How long these calls waited in all, in seconds.
        failed: Saves that failed. `wait`, `close` or a later call raises the first
            error, with the others as notes.
        linked_bytes: Bytes of frozen leaves that were linked, not written again.
    """

    saved: int = 0
    direct: int = 0
    by_orbax: int = 0
    superseded: int = 0
    delayed: int = 0
    delayed_secs: float = 0.0
    failed: int = 0
    linked_bytes: int = 0
