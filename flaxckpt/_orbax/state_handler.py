"""What Orbax calls to write a tree: the direct writer, or its own handler."""

import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flaxckpt._direct.form import Fingerprints
from flaxckpt._runtime.failures import is_of_the_machine
from flaxckpt._runtime.quiet import quiet
from flaxckpt._runtime.unchecked import unchecked
from flaxckpt._trees.ties import PyTree

with quiet():  # it logs when it is imported
    from orbax.checkpoint import v1


@dataclass
class Task:
    """The tree of one save, and what became of it.

    Attributes:
        tree: Returns the tree as Orbax stores it.
        write: Writes the tree straight into a directory, empty as yet, and returns the
            fingerprints of what it wrote. None where Orbax has to write.
        fingerprints: What `write` returned; None if Orbax has written.
        fault: What `write` raised, if Orbax had to write after all.
    """

    tree: Callable[[], PyTree]
    write: Callable[[Path], Fingerprints] | None
    fingerprints: Fingerprints | None = None
    fault: Exception | None = None

    @property
    def is_direct(self) -> bool:
        """Whether the values were written straight from memory, not by Orbax."""
        return self.fingerprints is not None


class StateHandler(v1.handlers.CheckpointableHandler[Task, None]):
    """Writes a tree straight from memory, and has Orbax write where that fails."""

    async def save(self, directory: Any, checkpointable: Task) -> Awaitable[None]:
        """Begin to write; what is returned ends it, on a thread of Orbax's."""
        if checkpointable.write is None:
            return await _begin_by_orbax(directory, checkpointable)
        return _write(directory, checkpointable, checkpointable.write)

    async def load(self, directory: Any, abstract_checkpointable: Any = None) -> Any:
        """Load nothing: Orbax's own handler loads."""
        raise NotImplementedError

    async def metadata(self, directory: Any) -> Any:
        """Read nothing: Orbax's own handler reads metadata."""
        raise NotImplementedError

    def is_handleable(self, checkpointable: Any) -> bool:
        """Tell whether it can save this."""
        return isinstance(checkpointable, Task)

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool | None:
        """Tell whether it can load into this: never."""
        del abstract_checkpointable
        return False


# Orbax notes a handler's name in the checkpoint, and looks for it when it loads.
StateHandler.__module__ = v1.handlers.PyTreeHandler.__module__
StateHandler.__qualname__ = v1.handlers.PyTreeHandler.__qualname__


async def _begin_by_orbax(directory: Any, task: Task) -> Awaitable[None]:
    return await v1.handlers.PyTreeHandler().save(directory, task.tree())


async def _write(
    directory: Any, task: Task, write: Callable[[Path], Fingerprints]
) -> None:
    path = Path(await directory.await_creation())
    try:
        with unchecked():  # Orbax has a thread of its own for this
            task.fingerprints = write(path)
    except Exception as fault:
        if is_of_the_machine(fault):
            raise  # Orbax would meet with it as well
        # Without the frames, which hold the tree.
        task.fault = fault.with_traceback(None)
        for entry in path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        with unchecked():
            await (await _begin_by_orbax(directory, task))
