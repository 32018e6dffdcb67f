"""`Job`: one save that waits for its turn or is under way, and how its errors read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flaxckpt._runtime.failures import in_one_line
from flaxckpt.errors import CheckpointError, CheckpointWriteError

# Holders of a job, besides the thread that has claimed it.
NOBODY, QUEUE, PROGRAM = 0, -1, -2


def nothing() -> None:
    return


@dataclass(eq=False)
class Job:
    """A save that waits for its turn, or is under way.

    Attributes:
        key: Stands for what the job writes. A newer save with an equal key claims the
            job while it waits. None if no save may.
        path: The path that errors name.
        run: Does the work.
        after: What to do afterwards; `wait` does not wait for it.
        content: What the job writes; a call that claims a waiting job adds to it.
        memory: Copies whose memory the next job can use after this one; None for none.
        then: The job that this one becomes once its copies are filled; None for none.
        is_filled: Tells whether the copies are filled.
        tell: Calls `on_saved` once the work is done, and returns the errors. `wait`
            waits for this, and `claim` does not.
        holder: The thread that has claimed the job, or one of the values above.
        number: Its place among the waiting jobs.
        waited: How long the call that has claimed it waited for it, in seconds.
    """

    key: Any = None
    path: str = ""
    run: Callable[[], None] = nothing
    after: Callable[[], None] = nothing
    content: Any = None
    memory: Any = None
    then: "Job | None" = None
    is_filled: Callable[[], bool] = bool
    tell: Callable[[], Sequence[CheckpointError]] = tuple
    holder: int = NOBODY
    number: int = 0
    waited: float = 0.0

    def change(self) -> None:
        """Become the job `then`. If an interrupt ends this, it can be done again."""
        then = self.then
        if then is not None:
            self.key, self.path, self.content = then.key, then.path, then.content
            self.run, self.tell, self.after = then.run, then.tell, then.after
            self.memory = then.memory
            self.then = None


def error_of(job: Job) -> CheckpointError | None:
    """Run a job, and return its error."""
    try:
        job.run()
    except BaseException as error:
        return translated(error, job.path)
    finally:
        job.run, job.content = nothing, None  # they hold on to trees
    return None


def translated(error: BaseException, path: str, where: str = "") -> CheckpointError:
    """Return an error as one of flaxckpt's.

    Args:
        error: What went wrong.
        path: The checkpoint that was to be written.
        where: Text that follows the error in the message.
    """
    if isinstance(error, CheckpointError):
        return error
    failure = CheckpointWriteError(path, f"{in_one_line(error)}{where}")
    failure.__cause__ = error
    return failure
