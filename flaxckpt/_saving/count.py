"""`Count`: the batches of a run, where the decision does not count them."""

from flaxckpt._decision.moment import Moment
from flaxckpt._disk.info import CheckpointInfo


class Count:
    """Counts the batches of calls that go by the clock, or save by hand.

    Retention policies go by this number. It counts as `save_freq=N` does.
    """

    def __init__(self) -> None:
        """Begin a run that has seen nothing."""
        self._epoch, self._batch, self._seen = -1, -1, 0

    def go_on(self, info: CheckpointInfo) -> None:
        """Go on from a checkpoint, if its call had a batch."""
        if info.epoch is not None and info.batch is not None:
            self._epoch, self._batch, self._seen = info.epoch, info.batch, info.step

    def note(self, at: Moment) -> int:
        """Count the batches up to a moment; return how many the run has seen.

        Without a batch, nothing is counted; where there never was one, epochs count.

        Args:
            at: The moment, of ints, with an epoch.
        """
        epoch, batch = at.epoch, at.batch
        if batch is not None and (epoch, batch) != (self._epoch, self._batch):
            is_new = epoch != self._epoch or batch <= self._batch
            self._seen += batch + 1 if is_new else batch - self._batch
            self._epoch, self._batch = epoch, batch
        return self._seen or epoch + 1
