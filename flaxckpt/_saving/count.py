"""`Count`: the batches of a run, where no state counts them."""

from flaxckpt._decision.moment import Moment
from flaxckpt._disk.info import CheckpointInfo


class Count:
    """Counts the batches of saves by hand, by which retention policies go.

    It counts as `save_freq=N` does, from one such save to the next.
    """

    def __init__(self) -> None:
        """Begin a run that has seen nothing."""
        self._epoch, self._batch, self._seen = -1, -1, 0

    def go_on(self, info: CheckpointInfo) -> None:
        """Go on from a checkpoint, if its call had a batch, and nothing is counted."""
        if not self._seen and info.epoch is not None and info.batch is not None:
            self._epoch, self._batch = info.epoch, info.batch
            self._seen = max(info.step, info.batch + 1)

    def note(self, at: Moment) -> int:
        """Count the batches up to a moment; return how many the run has seen.

        Args:
            at: The moment, of ints, with an epoch and a batch.
        """
        if at[:2] != (self._epoch, self._batch):
            is_new = at.epoch != self._epoch or at.batch <= self._batch
            self._seen += at.batch + 1 if is_new else at.batch - self._batch
            self._epoch, self._batch = at.epoch, at.batch
        return self._seen
