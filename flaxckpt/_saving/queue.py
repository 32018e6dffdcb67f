"""Jobs in the background: run one after another, none lost, and each error raised."""

import contextlib
import itertools
import os
import threading
import time
import traceback
import warnings
from collections import deque
from typing import Any

from flaxckpt._runtime.failures import chain_of
from flaxckpt._runtime.frames import is_nested, outside
from flaxckpt._runtime.locks import new_lock, unlock_all
from flaxckpt._runtime.threads import stand_back
from flaxckpt._runtime.unchecked import stay_unchecked
from flaxckpt._saving.at_exit import UNHEARD, error_at_exit
from flaxckpt._saving.job import (
    NOBODY,
    PROGRAM,
    QUEUE,
    Job,
    error_of,
    nothing,
    translated,
)
from flaxckpt.errors import CheckpointError, CheckpointWriteError, HookError

_IDLE_SECS = 10.0  # then an idle thread ends; to start another waits for a core
_HOOK_SECS = 0.5  # a hook that takes longer may wait for who waits for its object
_MOST_ERRORS = 20


class JobQueue:
    """Runs jobs in order on one background thread.

    A call claims a job, fills it and submits it; `claim` bounds the number of jobs. The
    next call of `wait`, `check` or `close` raises the error of a failed job, once. The
    errors of other jobs that have failed by then are notes on it.

    An interrupt (Ctrl-C) may end a call at any line. So each step is one assignment,
    one list has each job from the claim to the end, and each job names its holder. If a
    call has claimed a job and not submitted it, the next call of the same thread gives
    it back.

    In a process that was forked from the one that made the queue, `wait`, `check` and
    `close` do nothing.
    """

    def __init__(self) -> None:
        self._lock = new_lock()
        self._changed = threading.Condition(self._lock)
        self._jobs: list[Job] = []
        self._numbers = itertools.count(1)
        self._is_busy = self._is_telling = False
        self._memory = deque[Any]()
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
        """Claim a job to fill: a waiting one with an equal key, or a new one.

        Args:
            key: The job's key; see `Job`.
            limit: How many jobs there may be, this one included.
            wait: Whether to wait until there are fewer jobs than `limit`.

        Returns:
            The job, which waits no longer; None if there are too many jobs.

        Raises:
            CheckpointError: If the call runs within another call of the same thread,
                and would wait for the job of that call.
        """
        own = threading.get_ident()
        self.take_back()
        with self._lock:
            for job in self._waiting:
                if key is not None and job.key == key:
                    job.waited, job.holder = 0.0, own
                    return job
            waited = 0.0
            if len(self._jobs) >= limit:
                if not wait:
                    return None
                if self._own():  # of another call, within which this one runs
                    raise CheckpointError(
                        "A save was asked for within another call of the same object, "
                        "as by a signal handler, and would wait for it for ever. Set a "
                        "flag there, and save from the loop."
                    )
                self._start()
                start = time.perf_counter()
                self._changed.wait_for(lambda: len(self._jobs) < limit)
                waited = time.perf_counter() - start
            memory = self._memory.pop() if self._memory else None
            job = Job(key, memory=memory, holder=own, waited=waited)
            self._jobs.append(job)
            return job

    def stand_by(self) -> None:
        """Start the thread, so that a job need not wait for that.

        It ends if no job comes for `_IDLE_SECS`.
        """
        with self._lock, contextlib.suppress(RuntimeError):  # no thread can be started
            self._start()

    def hold(self, job: Job) -> None:
        """Keep a claimed job for a program, whatever call the thread makes next."""
        job.holder = PROGRAM

    def submit(self, job: Job) -> None:
        """Put a claimed job into the queue."""
        UNHEARD.add(self)
        with self._lock:
            self._start()  # first: if it fails, nothing has changed
            job.change()
            job.number = next(self._numbers)
            job.holder = NOBODY
            self._changed.notify_all()

    def give_back(self, job: Job) -> None:
        """Give up a claimed job: it waits if it has work to do, or else is removed."""
        if job.then is not None and job.then.is_filled():
            job.change()
        with self._lock:
            if job.run is nothing:
                if job in self._jobs:
                    self._jobs.remove(job)
            else:
                job.then = None
                job.number = job.number or next(self._numbers)
                job.holder = NOBODY
                UNHEARD.add(self)
                with contextlib.suppress(RuntimeError):  # `wait` tries again
                    self._start()
            self._changed.notify_all()

    def take_back(self) -> None:
        """Give back the jobs that an interrupted call of this thread has left.

        If this call runs within another one, the jobs are that call's, and stay; see
        `is_nested`.
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
        """Start the thread, unless it runs.

        An interrupt may come between the steps. So the thread is noted before it
        starts, and a thread that is not noted ends before it takes a job.
        """
        if self._thread is None or not self._thread.is_alive():
            thread = threading.Thread(target=self._work, name="flaxckpt", daemon=True)
            self._thread = thread
            thread.start()

    @property
    def _waiting(self) -> list[Job]:
        waiting = [job for job in self._jobs if job.holder == NOBODY]
        return sorted(waiting, key=lambda job: job.number)

    def wait(self) -> None:
        """Wait until all jobs are done, and `on_saved` is told of them.

        Raises:
            CheckpointError: If a job failed; each error is raised once.
        """
        if self.is_inherited:
            return
        self.refuse_hooks()
        self.take_back()
        with self._lock:
            if self.is_working():
                self._start()
            self._changed.wait_for(lambda: not (self.is_working() or self._is_telling))
        self.check()
        with self._lock:  # another thread may save now
            self._be_forgotten()

    def settle(self) -> None:
        """Wait until the jobs that there are now are done; their errors stay.

        A function of `on_saved` may itself wait for who calls this. So if one takes
        long, the jobs behind it are not waited for.
        """
        if self.is_inherited:
            return
        with self._lock:
            jobs = [job for job in self._jobs if job.holder in (NOBODY, QUEUE)]
            if jobs:
                self._start()
            is_done = False
            while not is_done:
                told = self._is_telling
                is_done = self._changed.wait_for(
                    lambda: not any(job in self._jobs for job in jobs), _HOOK_SECS
                )
                is_done = is_done or (told and self._is_telling)

    def is_on_its_thread(self) -> bool:
        """Tell whether the calling thread is the one that runs the jobs."""
        return threading.current_thread() is self._thread

    def refuse_hooks(self) -> None:
        """Check that no job makes this call, which would wait for that job for ever.

        Raises:
            CheckpointError: If a function of `on_saved` makes it.
        """
        if self.is_on_its_thread():
            raise CheckpointError(
                "A function of on_saved called its own ModelCheckpoint to save, to "
                "wait, to restore or to close, and would wait for itself for ever. "
                "Load what was saved by flaxckpt.load(info), and make those calls from "
                "the loop."
            )

    def check(self) -> None:
        """Give the warnings and raise the errors that there are by now."""
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
            own = getattr(first, "__notes__", [])
            first.__notes__ = [*(note for note in own if note not in notes), *notes]
        try:
            raise first
        except CheckpointError:  # an interrupt instead leaves the errors for later
            with self._lock:
                self._errors = self._errors[told:]
                self._more_errors = self._ended = 0
            raise

    def end_program(self) -> None:
        """Raise the first error that has ended no program; `wait` raises it, too."""
        with self._lock:
            first, self._ended = self._ended, len(self._errors)
            if first < self._ended:
                raise error_at_exit(self._errors[first])

    def warn(self, message: str) -> None:
        """Keep a warning for the next call of `wait`, `check` or `close`."""
        self._warnings.append(message)

    def fail(self, error: BaseException, path: str, *, ends: bool = False) -> None:
        """Keep an error as if a job had failed.

        Args:
            error: What went wrong before there was a job.
            path: The path that the error names.
            ends: Whether the caller ends a program with it, so `end_program` does not.
        """
        with self._lock:
            self._note(translated(error, path))
            UNHEARD.add(self)
            if ends:
                self._ended = len(self._errors)

    def _note(self, error: CheckpointError) -> None:
        """Keep an error, and clear its frames, which hold on to the trees."""
        for cause in chain_of(error):
            traceback.clear_frames(cause.__traceback__)
        if len(self._errors) < _MOST_ERRORS:
            self._errors.append(error)
        else:
            self._more_errors += 1

    def close(self) -> None:
        """Wait for all jobs and their `after`, and drop the memory.

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
                if not self._jobs:
                    self._thread = None  # so that it ends
                    self._changed.notify_all()
                self._be_forgotten()

    def abandon(self) -> None:
        """Drop the memory once the owner is collected; `at_exit` reports the errors.

        It takes no lock, because the garbage collector calls it. There is no job then,
        or the last one, whose thread has let go of the owner.
        """
        self._memory = deque[Any](maxlen=0)
        self._be_forgotten()

    def _be_forgotten(self) -> None:
        """Let the program's end pass this queue by, if it has nothing to do or to tell.

        The program may not end while the thread deletes arrays: JAX would abort it.
        """
        if not (self._is_busy or self._jobs or self._errors or self._warnings):
            UNHEARD.discard(self)

    def has_one_job(self) -> bool:
        """Tell whether the only job is the one that the caller has claimed."""
        return len(self._jobs) == 1

    def is_working(self) -> bool:
        """Tell whether a job waits for its turn or is under way."""
        return any(job.holder in (NOBODY, QUEUE) for job in self._jobs)

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
                job.holder, self._is_busy = QUEUE, True
            error = error_of(job)
            with self._lock:
                if error is not None:
                    self._note(error)
                if error is None and job.memory is not None:
                    self._memory.append(job.memory)
                self._jobs.remove(job)
                self._is_telling = True
                self._changed.notify_all()
            self._tell(job)
            self._do_after(job)
            del job, error
            with self._lock:
                self._is_busy = False
                self._be_forgotten()
                self._changed.notify_all()

    def _tell(self, job: Job) -> None:
        try:
            errors = job.tell()
        except BaseException as error:
            errors = [translated(error, job.path)]
        with self._lock:
            for each in errors:
                self._note(each)
            self._is_telling = False
            self._changed.notify_all()

    def _do_after(self, job: Job) -> None:
        try:
            job.after()
        except BaseException as error:
            with self._lock:
                self._note(translated(error, job.path))
                UNHEARD.add(self)


def _briefly(error: CheckpointError) -> str:
    """Return the text of a note about an error; the noted error has the advice."""
    if isinstance(error, CheckpointWriteError) and not isinstance(error, HookError):
        return f"Saving {error.path!r} failed: {error.cause}."
    return str(error)
