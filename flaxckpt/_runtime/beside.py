"""Problems that come up while an error is raised: none takes the error's place."""

import warnings
from collections.abc import Callable

from flaxckpt._runtime.frames import outside
from flaxckpt.errors import CheckpointError


def warn_beside(error: BaseException, message: str) -> None:
    """Warn while an error is raised; where a filter forbids it, add a note instead."""
    try:
        warnings.warn(message, stacklevel=outside())
    except Warning:
        error.add_note(f"And: {message}")


def close_beside(error: BaseException, close: Callable[[], None]) -> None:
    """Close while an error ends the loop; what goes wrong is told beside the error."""
    said: set[str] = set()
    while True:
        try:
            return close()
        except Warning as warning:  # raised where a filter makes warnings errors
            notes = [f"And: {warning}", *getattr(warning, "__notes__", ())]
            new = [note for note in notes if note not in said]
            for note in new:
                error.add_note(note)
            said.update(new)
            if not new:  # some warnings come at every close
                return
        except CheckpointError as failure:
            if isinstance(error, CheckpointError):  # one traceback shows both
                return error.add_note(f"And: {failure}")
            return warn_beside(
                error,
                f"A save failed, too, while another error ended the loop: {failure}",
            )
