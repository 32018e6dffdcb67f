"""Where a run goes on, and what it goes on with."""

from collections.abc import Sequence
from typing import Any

from flaxckpt.errors import SettingError


class Start(int):
    """Where a run goes on: an epoch or a global step, for `range(start, ...)`.

    Attributes:
        epoch: Zero-based epoch to go on in; None if the run counts global steps.
        batch: Zero-based batch to go on with in that epoch; 0 at its beginning.
        step: The global step to go on with, one after the last that was saved; None if
            the run counts epochs. In a new run epoch, batch and step are 0.
        is_new: Whether the run is new: nothing was restored.
    """

    epoch: int | None
    batch: int
    step: int | None
    is_new: bool

    def __new__(
        cls,
        epoch: int | None = 0,
        batch: int = 0,
        step: int | None = 0,
        *,
        is_new: bool = False,
    ) -> "Start":
        """Make an int of the epoch, or of the step if there is no epoch."""
        made = super().__new__(cls, (step or 0) if epoch is None else epoch)
        made.epoch, made.batch, made.step, made.is_new = epoch, batch, step, is_new
        return made

    @classmethod
    def after(cls, epoch: int | None, batch: int | None, step: int) -> "Start":
        """Return where a run goes on after a save."""
        if epoch is None:
            return cls(None, 0, step + 1)
        if batch is None:
            return cls(epoch + 1, 0, None)
        return cls(epoch, batch + 1, None)

    def batch_in(self, epoch: int) -> int:
        """Return the batch with which an epoch begins: 0 but in the first one."""
        return self.batch if epoch == self.epoch else 0

    def __str__(self) -> str:
        return str(int(self))

    def __repr__(self) -> str:
        if self.epoch is None:
            return f"Start(step={self.step})"
        return f"Start(epoch={self.epoch}, batch={self.batch})"


def iterators_in(data: Any) -> list[Any]:
    """Return the iterators of `data`, which is None, an iterator or several.

    Raises:
        SettingError: If one is no iterator.
    """
    several = data if isinstance(data, list | tuple) else [data]
    iterators = [each for each in several if each is not None]
    for each in iterators:
        if not hasattr(each, "__next__"):
            advice = "it is no iterator over batches. Pass iter(...) of it."
            raise SettingError("data", f"<{type(each).__name__}>", advice)
    return iterators


def skip_ahead(iterators: Sequence[Any], start: Start, leaves: Sequence[Any]) -> None:
    """Take from iterators the batches that a run has seen, and drop them.

    Args:
        iterators: The iterators. One that is a leaf of the tree has its state already.
        start: Where the run goes on.
        leaves: The leaves of the tree.

    Raises:
        SettingError: If an iterator ends before that.
    """
    number = start.batch if start.step is None else start.step
    for each in iterators:
        if any(each is leaf for leaf in leaves):
            continue
        for done in range(number):
            try:
                next(each)
            except StopIteration:
                advice = f"it ended after {done} batches, and the run has seen {number}"
                raise SettingError(
                    "data", f"<{type(each).__name__}>", f"{advice}."
                ) from None
