"""Where a run goes on, and what it goes on with."""

import sys
from typing import Any

import jax

from flaxckpt._trees.ties import MODULE, VARIABLE, PyTree, role_of


class Start(int):
    """Where a run goes on: an epoch or a global step, for `range(start, ...)`.

    Attributes:
        epoch: Zero-based epoch to go on in; None if the run counts global steps.
        batch: Zero-based batch to go on with in that epoch; 0 at its beginning.
        step: The global step to go on with, one after the last that was saved; None if
            the run counts epochs. In a new run epoch, batch and step are 0.
    """

    epoch: int | None
    batch: int
    step: int | None

    def __new__(
        cls, epoch: int | None = 0, batch: int = 0, step: int | None = 0
    ) -> "Start":
        """Make an int of the epoch, or of the step if there is no epoch."""
        made = super().__new__(cls, (step or 0) if epoch is None else epoch)
        made.epoch, made.batch, made.step = epoch, batch, step
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


def put_into(given: PyTree, found: PyTree) -> PyTree:
    """Put restored values into the NNX objects of a tree, in place.

    Args:
        given: The tree with the objects.
        found: A tree of the same structure.

    Returns:
        `found`, with the objects of `given` in place of its own.
    """
    if "flax.nnx" not in sys.modules:
        return found
    nnx: Any = sys.modules["flax.nnx"]

    def put(mine: PyTree, new: PyTree) -> PyTree:
        if role_of(mine) not in (MODULE, VARIABLE):
            return new
        nnx.update({"object": mine}, nnx.state({"object": new}))
        return mine

    return jax.tree.map(put, given, found, is_leaf=lambda node: bool(role_of(node)))
