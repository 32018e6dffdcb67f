"""When a call is made: at an epoch, at a batch of an epoch, or at a global step."""

from typing import Any, NamedTuple

from flaxckpt._decision.scalars import LARGEST, LARGEST_STEP, index, whole
from flaxckpt.errors import SettingError


class Moment(NamedTuple):
    """When a call is made, as the caller counts; the values may be traced.

    Attributes:
        epoch: Zero-based epoch, i32[]; None if the call has a global step.
        batch: Zero-based batch within the epoch, i32[]; None at the end of the epoch.
        step: Global step, i32[]; None if the call has an epoch.
    """

    epoch: Any = None
    batch: Any = None
    step: Any = None

    def check(self) -> None:
        """Check that the call has an epoch or a step, and integers.

        Raises:
            SettingError: If not.
        """
        if self.step is None:
            if self.epoch is None:
                advice = "pass an epoch (and a batch), or step= for a global step."
                raise SettingError("epoch", None, advice)
        elif self.epoch is not None or self.batch is not None:
            name = "batch" if self.epoch is None else "epoch"
            advice = "pass step=, or an epoch (and a batch), not both."
            raise SettingError(name, getattr(self, name), advice)
        for name, value in self.given().items():
            index(name, value)

    def given(self) -> dict[str, Any]:
        """Return what the call has, by name."""
        return {name: each for name, each in self._asdict().items() if each is not None}

    def whole(self) -> "Moment":
        """Return it with ints; wait for a device that still computes them.

        Raises:
            SettingError: As `check`.
        """
        self.check()
        return Moment(
            **{name: whole(name, each) for name, each in self.given().items()}
        )

    @property
    def is_plain(self) -> bool:
        """Whether all is Python's ints, in their range."""
        if self.step is None:
            batch = 0 if self.batch is None else self.batch
            pair = self.epoch, batch
            return all(type(at) is int and 0 <= at < LARGEST for at in pair)
        return type(self.step) is int and 0 <= self.step <= LARGEST_STEP

    @property
    def shown(self) -> str:
        """What messages call it."""
        return f"Epoch {self.epoch + 1}" if self.step is None else f"Step {self.step}"

    @property
    def fields(self) -> dict[str, int]:
        """What a filepath shows of it: epoch and batch one-based, the step as given."""
        return {name: each + (name != "step") for name, each in self.given().items()}
