"""`Lines`: which saves may supersede which, if only improvements are saved."""

import numpy as np

from flaxckpt._decision.state import CheckpointState
from flaxckpt._saving.call import Call


class Lines:
    """Numbers lines of saves, each of which is better than the save before it.

    A save supersedes waiting saves of its own line only.
    """

    def __init__(self, *, best_only: bool, overwrite: bool) -> None:
        """Begin the first line; `Settings` has the arguments."""
        self._best_only, self._overwrite = best_only, overwrite
        self._line = 0
        self._head: CheckpointState | None = None  # the state returned last

    def number(self, call: Call) -> None:
        """Number a call's line.

        A call goes on with the line if its state is the one returned last, unless it
        saves without a new best. A save by hand has a line of its own: it supersedes no
        save, and none supersedes it.
        """
        if call.by_hand and self._best_only and not self._overwrite:
            call.line = self._line + 1
            self._line += 2
        if call.state is None or call.before is None or not self._spares(call):
            return
        goes_on = _are_same(call.before, self._head)
        if not goes_on or (call.saves and not call.improves):
            self._line += 1
        call.line = self._line
        self.move_head(call)

    def move_head(self, call: Call) -> None:
        """Note the state of a call, as it is by now, as the one returned last."""
        if self._spares(call):
            self._head = call.state

    def _spares(self, call: Call) -> bool:
        """Tell whether a call may not replace a better checkpoint."""
        state = call.state
        by_policy = state is not None and state.save_best_only and not call.by_hand
        return by_policy and not self._overwrite


def _are_same(one: CheckpointState, other: CheckpointState | None) -> bool:
    """Tell whether two states are known to have the same best."""
    if other is None:
        return False
    if one.best_value is other.best_value:
        return True
    bests = one.best_value, one.has_best, other.best_value, other.has_best
    return all(isinstance(one, np.generic) for one in bests) and bests[:2] == bests[2:]
