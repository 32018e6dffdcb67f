"""Saves in the background: one after the other, none lost, no error unheard."""

import concurrent.futures.thread
import os
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flaxckpt._background import stand_back
from flaxckpt._failures import in_one_line
from flaxckpt._unchecked import stay_unchecked
from flaxckpt.errors import CheckpointError, CheckpointWriteError

_IDLE_SECS = 2.0
_MOST_ERRORS = 20


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
    """

    key: Any = None
    path: str = ""
    run: Callable[[], None] = _nothing
    after: Callable[[], None] = _nothing
    content: Any = None
    memory: Any = None


class Writer:
    """Runs jobs in order on a thread of its own, a bounded number at a time.

    A job is claimed, filled, and submitted. One that fails is remembered, and its error
    raised by the next call of `wait`, `check` or `close`, once; those of other jobs
    that failed by then are notes on it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._claimed = 0
        self._is_busy = False
        self._memory: list[Any] = []
        self._errors: list[CheckpointError] = []
        self._more_errors = self._ended = 0
        self._warnings: list[str] = []
        self._thread: threading.Thread | None = None

    def claim(self, key: Any, limit: int, *, wait: bool = True) -> Job | None:
        """Get a job to fill: a waiting one of the same key, or a new one.

        Args:
            key: Of the job; see `Job`.
            limit: How many jobs there may be, with this one.
            wait: Whether to wait until there are fewer than that.

        Returns:
            The job, which is not in the queue any more; None if there are too many.
        """
        with self._changed:
            for job in self._waiting:
                if key is not None and job.key == key:
                    self._waiting.remove(job)
                    self._claimed += 1
                    return job
            if not wait and self._count() >= limit:
                return None
            self._changed.wait_for(lambda: self._count() < limit)
            self._claimed += 1
            return Job(key, memory=self._memory.pop() if self._memory else None)

    def submit(self, job: Job) -> None:
        """Put a claimed job into the queue."""
        with self._changed:
            self._claimed -= 1
            if self._thread is None:
                thread = threading.Thread(
                    target=self._work, name="flaxckpt", daemon=True
                )
                thread.start()  # which may fail, and then nothing has changed
                self._thread = thread
            self._waiting.append(job)
            _UNHEARD.add(self)
            self._changed.notify_all()

    def give_back(self, job: Job) -> None:
        """Return a claimed job as it was claimed, because it could not be filled."""
        if job.run is not _nothing:
            self.submit(job)
            return
        with self._changed:
            self._claimed -= 1
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until all jobs are done.

        Raises:
            CheckpointError: If one failed; once.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and self._running is None)
        self.check()
        _UNHEARD.discard(self)

    def check(self) -> None:
        """Raise the errors of jobs that have failed by now, without waiting."""
        while self._warnings:
            warnings.warn(self._warnings.pop(0), stacklevel=4)
        if not self._errors:
            return
        with self._changed:
            (first, *others), more = self._errors, self._more_errors
            self._errors.clear()
            self._more_errors = self._ended = 0
        for other in others:
            first.add_note(f"And: {_briefly(other)}")
        if more:
            first.add_note(f"And {more} more.")
        raise first

    def end_program(self) -> None:
        """Raise an error that has ended no program yet; `wait` raises it, too."""
        with self._changed:
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
        with self._changed:
            self._note(translated(error, path))
            _UNHEARD.add(self)
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
        try:
            self.wait()
        finally:
            with self._changed:
                self._changed.wait_for(lambda: not self._is_busy)
                self._memory.clear()

    def is_idle(self) -> bool:
        """Tell whether there is no job but the one that the caller has claimed."""
        with self._changed:
            return self._count() == 1

    def _count(self) -> int:
        return len(self._waiting) + self._claimed + (self._running is not None)

    def _work(self) -> None:
        stand_back()
        stay_unchecked()
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: self._waiting, _IDLE_SECS):
                    self._thread = None
                    return
                job = self._running = self._waiting.popleft()
                self._is_busy = True
            error = _error_of(job)
            with self._changed:
                if error is not None:
                    self._note(error)
                if error is None and job.memory is not None:  # of use
                    self._memory.append(job.memory)
                self._running = None
                self._changed.notify_all()
            self._do_after(job)
            del job
            with self._changed:
                self._is_busy = False
                self._changed.notify_all()

    def _do_after(self, job: Job) -> None:
        try:
            job.after()
        except BaseException as error:
            with self._changed:
                self._note(translated(error, job.path))
                _UNHEARD.add(self)


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


def ending(error: BaseException) -> CheckpointError:
    """Return an error to end a program with, for another one that is kept."""
    return CheckpointError(f"{type(error).__name__}: {error}")


def before_end(function: Callable[[], None]) -> None:
    """Have a function called where the program ends, before what waits is written."""
    if function not in _BEFORE_END:
        _BEFORE_END.append(function)


_BEFORE_END: list[Callable[[], None]] = []
_UNHEARD: set[Writer] = set()
os.register_at_fork(after_in_child=_UNHEARD.clear)  # the threads are the parent's


def _finish() -> None:
    """End well where the program ends without `wait` or `close`."""
    _join_others()
    for function in _BEFORE_END:
        try:
            function()
        except Exception as error:
            warnings.warn(f"At the program's end: {error}", stacklevel=1)
    for writer in list(_UNHEARD):
        try:
            writer.close()
        except CheckpointError as error:
            warnings.warn(f"At the program's end: {error}", stacklevel=1)


def _join_others() -> None:
    """Wait for other threads, which may be training, as Python does soon after."""
    for thread in threading.enumerate():
        is_pooled = thread in concurrent.futures.thread._threads_queues  # pyright: ignore
        is_own = thread in (threading.current_thread(), threading.main_thread())
        if not (is_own or is_pooled or thread.daemon):
            thread.join()


# `atexit` runs too late: no thread pool takes work by then, and Orbax has some.
threading._register_atexit(_finish)  # pyright: ignore  # as concurrent.futures does
