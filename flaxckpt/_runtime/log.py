"""Lines about the saves: they go to the logger `flaxckpt`, or to standard output.

Somebody who has given the logger a handler or a level gets the lines there. So does
somebody who has configured the root logger to take lines of the level INFO. For all
others the lines are printed.
"""

import logging
import sys
from typing import Any

LOGGER = logging.getLogger("flaxckpt")


def log_line(line: str) -> None:
    """Log a line, or print it if no logging is configured for it; never both.

    The logger's own level counts, and the levels above it do not: `verbose=1` has asked
    for the line.
    """
    if LOGGER.level > logging.INFO or LOGGER.manager.disable >= logging.INFO:
        return
    is_wanted_above = LOGGER.hasHandlers() and LOGGER.isEnabledFor(logging.INFO)
    if LOGGER.handlers or is_wanted_above:
        origin = LOGGER.name, logging.INFO, __file__, 0
        LOGGER.handle(LOGGER.makeRecord(*origin, line, (), None))
    else:
        _print(f"{line}\n")


def _print(text: str) -> None:
    """Print in one piece, because other threads print, too, and above tqdm's bars.

    Rich takes over `sys.stdout` while it shows a bar, so it needs no help.
    """
    bars: Any = getattr(sys.modules.get("tqdm"), "tqdm", None)
    if getattr(bars, "_instances", None):
        bars.write(text, end="")
        sys.stdout.flush()
    else:
        print(text, end="", flush=True)
