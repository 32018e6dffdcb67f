"""What several processes need to learn the form in which Orbax stores their tree."""

import contextlib
import errno
import fcntl
import functools
import os
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

from flaxckpt._checkpoints.together import learn_form
from flaxckpt._disk.alias import DESCRIPTORS, needs_no_alias
from flaxckpt._object_store.scratch import scratch
from flaxckpt._pods.agreement import translated_for_all
from flaxckpt._processes.messages import Round, is_leader
from flaxckpt._saving.parts import SaverParts
from flaxckpt._trees.layout import Layout
from flaxckpt.errors import CheckpointError

_GAP = 16  # other threads may open files meanwhile, and get the lowest numbers


def learn(
    exchange: Round, parts: SaverParts, layout: Layout, leaves: list[Any]
) -> None:
    """Have Orbax write a tree once, to learn the form of its files."""
    area = parts.series.area
    with contextlib.ExitStack() as stack:
        exchanged = None
        if area.is_mirror:
            directory = stack.enter_context(_one_path(exchange, None))
            exchanged = functools.partial(_exchanged_with_all, exchange)
        else:
            directory = _shared_directory(exchange, parts, stack)
            if not needs_no_alias(directory):
                directory = stack.enter_context(_one_path(exchange, directory))
        try:
            forms = parts.disk.way.forms
            learn_form(forms, directory / "learnt", layout, leaves, exchanged)
            exchange.tell("learnt", None)
        except Exception as error:
            failure = translated_for_all(error, parts.report.shown())
            for subject in ("files", "learnt"):
                exchange.tell(subject, failure, again=True)
            raise failure from error
        exchange.hear_all("learnt")  # before the directory is deleted
    if is_leader() and not area.is_mirror:
        area.sweep()


def _shared_directory(
    exchange: Round, parts: SaverParts, stack: contextlib.ExitStack
) -> Path:
    """Return a directory that process 0 makes and all processes see.

    Raises:
        CheckpointError: If process 0 cannot make it, or another does not see it.
    """
    if is_leader():
        try:
            parts.paths.take_lock(None)
            directory = str(stack.enter_context(parts.series.area.staging()))
        except (OSError, CheckpointError) as error:
            exchange.tell("where", translated_for_all(error, parts.report.shown()))
        else:
            exchange.tell("where", directory)
    directory = Path(exchange.hear("where"))
    exchange.tell("seen", directory.is_dir())
    seen = exchange.hear_all("seen")
    if not all(seen):
        blind = [str(index) for index, is_seen in enumerate(seen) if not is_seen]
        raise CheckpointError(
            f"{str(parts.series.root)!r} is not the same directory in all "
            f"processes: what process 0 has made there is not there in process "
            f"{', '.join(blind)}. Save on a file system that all of them share, or "
            "in an object store."
        )
    return directory


@contextlib.contextmanager
def _one_path(exchange: Round, shared: Path | None) -> Generator[Path]:
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


def _exchanged_with_all(exchange: Round, files: dict[str, str]) -> dict[str, str]:
    """Send files to all processes; return all files, process 0's where names clash."""
    exchange.tell("files", files)
    found: dict[str, str] = {}
    for each in reversed(exchange.hear_all("files")):
        found |= each
    return found
