"""`Hooks`: the functions of `on_saved`, which are told of each checkpoint on disk."""

from collections.abc import Sequence

from flaxckpt._disk.info import CheckpointInfo, Hook
from flaxckpt._runtime.failures import in_one_line
from flaxckpt.errors import HookError


class Hooks:
    """The functions, and the checkpoints that they have yet to be told of.

    One thread notes the checkpoints, and calls the functions.
    """

    def __init__(self, functions: Sequence[Hook]) -> None:
        """Call nothing yet."""
        self._functions = functions
        self._saved: list[CheckpointInfo] = []

    def __bool__(self) -> bool:
        """Tell whether there are any functions."""
        return bool(self._functions)

    def note(self, info: CheckpointInfo) -> None:
        """Note a checkpoint that is on disk."""
        self._saved.append(info)

    def call(self) -> list[HookError]:
        """Call each function with each checkpoint that was noted, in order.

        Returns:
            An error for each call that raised; the other calls are made all the same.
        """
        errors: list[HookError] = []
        while self._saved:
            info = self._saved.pop(0)
            for function in self._functions:
                try:
                    function(info)
                except BaseException as error:
                    errors.append(_failed(function, info, error))
        return errors


def _failed(function: Hook, info: CheckpointInfo, error: BaseException) -> HookError:
    name = getattr(function, "__qualname__", type(function).__qualname__)
    failure = HookError(str(info.path), in_one_line(error), name)
    failure.__cause__ = error
    return failure
