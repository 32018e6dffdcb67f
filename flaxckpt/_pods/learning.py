"""What several processes need to learn the form in which Orbax stores their tree."""

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
    """Yield a plain path of a directory for Orbax, the same in all processes.

    The path is `/proc/self/fd/N` of an open descriptor; the processes agree on N.

    Args:
        exchange: The messages of all processes.
        shared: The directory; None for a new one in each process.
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
            # `dup2` would close a file of another thread that has this number by now.
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
    """Send files to all processes; return all files, process 0's where names clash."""
    exchange.tell("files", files)
    found: dict[str, str] = {}
    for each in reversed(exchange.hear_all("files")):
        found |= each
    return found
