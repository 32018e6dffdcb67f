"""Saves in the background: one after the other, none lost, no error unheard."""

import contextlib
import itertools
import os
import threading
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flaxckpt._direct.threads import stand_back
from flaxckpt._runtime.failures import in_one_line
from flaxckpt._runtime.frames import is_nested, outside
from flaxckpt._runtime.locks import new_lock, unlock_all
from flaxckpt._runtime.unchecked import stay_unchecked
from flaxckpt._saving.at_exit import UNHEARD, ending
from flaxckpt.errors import CheckpointError, CheckpointWriteError

_IDLE_SECS = 2.0
_MOST_ERRORS = 20
# Who has a job, if it is not a thread that has claimed it.
_NOBODY, _WRITER, _PROGRAM = 0, -1, -2


def _nothing() -> None:
    return


@dataclass(eq=False)
class Job:
    """A save that waits for its turn, or is under way.

    Attributes:
        key: What it writes: a newer job with the same key makes this one superfluous.
            None for a job that nothing replaces.
        path: Where it writes, for errors.
        run: Does it.
        after: What to do afterwards, for which `wait` does not wait.
        content: What a claimed job that was waiting already has to write.
        memory: What it works on, None for nothing that the next job could use when this
            one is done.
        then: What it does instead, once that is filled; None for no change.
        is_filled: Tells whether there is all that it has to write.
        holder: The thread that has claimed it, or one of the values above.
        number: Its place among those that wait.
    """

    key: Any = None
    path: str = ""
    run: Callable[[], None] = _nothing
    after: Callable[[], None] = _nothing
    content: Any = None
    memory: Any = None
    then: "Job | None" = None
    is_filled: Callable[[], bool] = bool
    holder: int = _NOBODY
    number: int = 0

    def change(self) -> None:
        """Become what `then` says. If that is interrupted, it can be done again."""
        then = self.then
        if then is not None:
            self.key, self.path, self.content = then.key, then.path, then.content
            self.run, self.after, self.memory = then.run, then.after, then.memory
            self.then = None


class Writer:
    """Runs jobs in order on a thread of its own, a bounded number at a time.

    A job is claimed, filled, and submitted. One that fails is remembered, and its error
    raised by the next call of `wait`, `check` or `close`, once; those of other jobs
    that failed by then are notes on it.

    An interrupt (Ctrl-C) may end a call at any line. So each step is one assignment,
    all jobs are in one list from the claim to the end, and each says who has it. What a
    call has claimed and not submitted, the next call of the same thread gives back.

    In a process that was forked from the one that made it, it does nothing.
    """

    def __init__(self) -> None:
        self._lock = new_lock()
        self._changed = threading.Condition(self._lock)
        self._jobs: list[Job] = []
        self._numbers = itertools.count(1)
        self._is_busy = False
        self._memory: list[Any] = []
        self._errors: list[CheckpointError] = []
        self._more_errors = self._ended = 0
        self._warnings: list[str] = []
        self._thread: threading.Thread | None = None
        self._process = os.getpid()

    @property
    def is_inherited(self) -> bool:
        """Whether it was made by the process that this one was forked from."""
        return self._process != os.getpid()

    def claim(self, key: Any, limit: int, *, wait: bool = True) -> Job | None:
        """Get a job to fill: a waiting one of the same key, or a new one.

        Args:
            key: Of the job; see `Job`.
            limit: How many jobs there may be, with this one.
            wait: Whether to wait until there are fewer than that.

        Returns:
            The job, which is not in the queue any more; None if there are too many.
        """
        own = threading.get_ident()
        self.take_back()
        with self._lock:
            for job in self._waiting:
                if key is not None and job.key == key:
                    job.holder = own
                    return job
            if not wait and len(self._jobs) >= limit:
                return None
            if len(self._jobs) >= limit:
                if self._own():  # which this call is made from within
                    raise CheckpointError(
                        "A save was asked for within another call of the same object, "
                        "as by a signal handler, and would wait for it for ever. Set a "
                        "flag there, and save from the loop."
                    )
                self._start()
            self._changed.wait_for(lambda: len(self._jobs) < limit)
            memory = self._memory.pop() if self._memory else None
            job = Job(key, memory=memory, holder=own)
            self._jobs.append(job)
            return job

    def hold(self, job: Job) -> None:
        """Have a claimed job be that of a program, whichever thread calls next."""
        job.holder = _PROGRAM

    def submit(self, job: Job) -> None:
        """Put a claimed job into the queue."""
        UNHEARD.add(self)
        with self._lock:
            self._start()  # which may fail, and then nothing has changed
            job.change()
            job.number = next(self._numbers)
            job.holder = _NOBODY
            self._changed.notify_all()

    def give_back(self, job: Job) -> None:
        """Return a claimed job: with what was filled, or else as it was claimed."""
        if job.then is not None and job.then.is_filled():
            job.change()
        with self._lock:
            if job.run is _nothing:
                if job in self._jobs:
                    self._jobs.remove(job)
            else:
                job.then = None
                job.number = job.number or next(self._numbers)
                job.holder = _NOBODY
                UNHEARD.add(self)
                with contextlib.suppress(RuntimeError):  # `wait` tries again
                    self._start()
            self._changed.notify_all()

    def take_back(self) -> None:
        """Give back what an interrupted call of this thread has left.

        Not what another call has claimed that is still under way; see `is_nested`.
        """
        unlock_all()
        left = self._own()
        if left and not is_nested():
            for job in left:
                self.give_back(job)

    def _own(self) -> list[Job]:
        own = threading.get_ident()
        return [job for job in self._jobs if job.holder == own]

    def _start(self) -> None:
        """Start the thread, unless it is there.

        An interrupt may come between the steps. So the thread is noted before it
        starts, and one that is not the one noted ends before it takes a job.
        """
        if self._thread is None or not self._thread.is_alive():
            thread = threading.Thread(target=self._work, name="flaxckpt", daemon=True)
            self._thread = thread
            thread.start()

    @property
    def _waiting(self) -> list[Job]:
        waiting = [job for job in self._jobs if job.holder == _NOBODY]
        return sorted(waiting, key=lambda job: job.number)

    def wait(self) -> None:
        """Wait until all jobs are done.

        Raises:
            CheckpointError: If one failed; once.
        """
        if self.is_inherited:
            return
        self.take_back()
        with self._lock:
            if self.is_working():
                self._start()
            self._changed.wait_for(lambda: not self.is_working())
        self.check()
        UNHEARD.discard(self)

    def check(self) -> None:
        """Raise the errors of jobs that have failed by now, without waiting."""
        if not (self._errors or self._warnings) or self.is_inherited:
            return
        while self._warnings:
            warnings.warn(self._warnings.pop(0), stacklevel=outside())
        if not self._errors:
            return
        with self._lock:
            told, more = len(self._errors), self._more_errors
            first, *others = self._errors
        notes = [f"And: {_briefly(other)}" for other in others]
        notes += [f"And {more} more."] * bool(more)
        if notes:
            first.__notes__ = notes
        try:
            raise first
        except CheckpointError:  # not if an interrupt comes instead: it is unheard then
            with self._lock:
                self._errors = self._errors[told:]
                self._more_errors = self._ended = 0
            raise

    def end_program(self) -> None:
        """Raise an error that has ended no program yet; `wait` raises it, too."""
        with self._lock:
            first, self._ended = self._ended, len(self._errors)
            if first < self._ended:
                raise ending(self._errors[first])

    def warn(self, message: str) -> None:
        """Have a warning given by the next call of `wait`, `check` or `close`."""
        self._warnings.append(message)

    def fail(self, error: BaseException, path: str, *, ends: bool = False) -> None:
        """Have an error raised as that of a job that failed.

        Args:
            error: What went wrong before there was a job.
            path: Where it was to write.
            ends: Whether it ends a program, too.
        """
        with self._lock:
            self._note(translated(error, path))
            UNHEARD.add(self)
            if ends:
                self._ended = len(self._errors)

    def _note(self, error: CheckpointError) -> None:
        """Remember an error, but nothing that was saved: its frames hold on to that."""
        each: BaseException | None = error
        seen: set[int] = set()
        while each is not None and id(each) not in seen:
            seen.add(id(each))
            traceback.clear_frames(each.__traceback__)
            each = each.__cause__ or each.__context__
        if len(self._errors) < _MOST_ERRORS:
            self._errors.append(error)
        else:
            self._more_errors += 1

    def close(self) -> None:
        """Wait for all jobs and what is done after them, and forget the memory.

        Raises:
            CheckpointError: If a job failed.
        """
        if self.is_inherited:
            return
        try:
            self.wait()
        finally:
            with self._lock:
                self._changed.wait_for(lambda: not self._is_busy)
                self._memory.clear()

    def abandon(self) -> None:
        """Forget what nobody saves with any more; errors are told at the end.

        Takes no lock, for it is called where Python collects garbage. No job is there.
        """
        self._memory.clear()
        if not (self._errors or self._warnings):
            UNHEARD.discard(self)

    def is_idle(self) -> bool:
        """Tell whether there is no job but the one that the caller has claimed."""
        return len(self._jobs) == 1

    def is_working(self) -> bool:
        """Tell whether a job waits for its turn, or is under way."""
        return any(job.holder in (_NOBODY, _WRITER) for job in self._jobs)

    def _work(self) -> None:
        stand_back()
        stay_unchecked()
        own = threading.current_thread()
        while True:
            with self._lock:
                self._changed.wait_for(
                    lambda: self._waiting or self._thread is not own, _IDLE_SECS
                )
                if self._thread is not own:
                    return
                if not self._waiting:
                    self._thread = None
                    return
                job = self._waiting[0]
                job.holder, self._is_busy = _WRITER, True
            error = _error_of(job)
            with self._lock:
                if error is not None:
                    self._note(error)
                if error is None and job.memory is not None:  # of use
                    self._memory.append(job.memory)
                self._jobs.remove(job)
                self._changed.notify_all()
            self._do_after(job)
            del job, error
            with self._lock:
                self._is_busy = False
                self._changed.notify_all()

    def _do_after(self, job: Job) -> None:
        try:
            job.after()
        except BaseException as error:
            with self._lock:
                self._note(translated(error, job.path))
                UNHEARD.add(self)


def _error_of(job: Job) -> CheckpointError | None:
    """Run a job, and return its error."""
    try:
        job.run()
    except BaseException as error:
        return translated(error, job.path)
    finally:
        job.run, job.content = _nothing, None  # they hold on to trees
    return None


def translated(error: BaseException, path: str, where: str = "") -> CheckpointError:
    """Return an error as one of ours.

    Args:
        error: What went wrong.
        path: The checkpoint that was to be written.
        where: To say behind what went wrong.
    """
    if isinstance(error, CheckpointError):
        return error
    failure = CheckpointWriteError(path, f"{in_one_line(error)}{where}")
    failure.__cause__ = error
    return failure


def _briefly(error: CheckpointError) -> str:
    """Return what a note says of an error, behind another one that says the rest."""
    if isinstance(error, CheckpointWriteError):
        return f"Saving {error.path!r} failed: {error.cause}."
    return str(error)
