"""Whose code is on this thread's stack: the package's own, or its caller's."""

import sys


def outside() -> int:
    """Return the `stacklevel` by which a warning names the line of the user's code."""
    level, frame = 1, sys._getframe(1)
    while frame is not None and _is_ours(frame.f_globals.get("__name__")):
        level, frame = level + 1, frame.f_back
    return level


def is_nested() -> bool:
    """Tell whether the running call of the package was made during another one.

    A signal handler or a finalizer of the user may call the package while a call of the
    same thread is under way.
    """
    frame = sys._getframe(1)
    while frame is not None and _is_ours(frame.f_globals.get("__name__")):
        frame = frame.f_back
    while frame is not None and not _is_ours(frame.f_globals.get("__name__")):
        frame = frame.f_back
    return frame is not None


def _is_ours(module: object) -> bool:
    return str(module).partition(".")[0] == "flaxckpt"
