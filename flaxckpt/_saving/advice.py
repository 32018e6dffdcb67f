"""Warnings about how a loop calls `update`, each given once."""

import warnings

from flaxckpt._decision.logs import Logs, find, left_out
from flaxckpt._runtime.frames import outside
from flaxckpt._settings import Settings


class Advice:
    """The warnings of one `ModelCheckpoint`."""

    def __init__(self, settings: Settings) -> None:
        """Take the settings; nothing has been said yet."""
        self._settings = settings
        self._said_same = self._said_no_best = False
        self._left_out: set[str] = set()  # names in logs

    def of_same_state(self) -> None:
        """Warn that the loop has passed the state of the call before again."""
        if not self._said_same:
            self._said_same = True
            warnings.warn(
                "update got the same state as in the call before, so the decision of "
                "that call is lost, and each call may save. "
                "Write state = ckpt.update(state, ...).",
                stacklevel=outside(),
            )

    def of_left_out(self, logs: Logs) -> None:
        """Warn of each metric that no record keeps."""
        new = {
            name: problem
            for name, problem in left_out(logs).items()
            if name not in self._left_out
        }
        if new:
            self._left_out |= new.keys()
            each = ", ".join(f"{name!r} {problem}" for name, problem in new.items())
            warnings.warn(
                f"Not all of logs is saved with a checkpoint: {each}, and a record "
                "keeps numbers and text. Reduce it to a scalar, or leave it out.",
                stacklevel=outside(),
            )

    def of_no_best(self, logs: Logs) -> None:
        """Warn if retention cannot know the best checkpoint, which it spares."""
        if self._settings.policy is None or self._said_no_best or not logs:
            return
        name = self._settings.monitor
        if find(logs, name) not in logs:
            problem = f"logs has no {name!r}, only {', '.join(map(repr, logs))}"
        elif self._settings.fresh.mode == "auto":
            problem = f"whether {name!r} is better low or high is not known: pass mode"
        else:
            return
        self._said_no_best = True
        warnings.warn(
            f"{problem}. So it is not known which checkpoint is the best, and it is "
            "not kept beside those that max_to_keep or preserve keep.",
            stacklevel=outside(),
        )
