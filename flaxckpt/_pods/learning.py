"""How several processes learn the form in which Orbax stores their tree."""

import contextlib
import errno
import fcntl
import os
import tempfile
from collections.abc import Generator
from pathlib import Path

from flaxckpt._disk.alias import DESCRIPTORS
from flaxckpt._object_store.scratch import scratch
from flaxckpt._pods.agreement import translated_for_all
from flaxckpt._processes.messages import Round

_GAP = 16  # other threads may open files meanwhile, and get the lowest numbers


@contextlib.contextmanager
def one_path(exchange: Round, shared: Path | None) -> Generator[Path]:
    """Yield a plain path of a directory, the same in all processes, for Orbax.

    It is that of a descriptor, which has the same number in all.

    Args:
        exchange: With the other processes.
        shared: The directory; None for a new one of each process's own.
    """
    with contextlib.ExitStack() as stack:
        try:
            directory = shared or stack.enter_context(scratch())
            descriptor = os.open(directory, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            exchange.tell("last", max(map(int, os.listdir(DESCRIPTORS))))
        except OSError as error:
            where = str(shared or tempfile.gettempdir())
            exchange.tell("last", translated_for_all(error, where))
            raise
        number = max(exchange.hear_all("last")) + _GAP
        try:
            # Never onto a number that another thread's file has got meanwhile.
            found = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, number)
            stack.callback(os.close, found)
            if found != number:
                raise OSError(errno.EAGAIN, f"descriptor {number} was just taken")
            exchange.tell("ready", None)
        except OSError as error:
            exchange.tell("ready", translated_for_all(error, DESCRIPTORS))
            raise
        exchange.hear_all("ready")
        yield Path(DESCRIPTORS, str(number))


def exchanged_with_all(exchange: Round, files: dict[str, str]) -> dict[str, str]:
    """Tell all of files, and return those of all; of two, that of the first process."""
    exchange.tell("files", files)
    found: dict[str, str] = {}
    for each in reversed(exchange.hear_all("files")):
        found |= each
    return found
