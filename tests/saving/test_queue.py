"""The queue of jobs: which job a call gets, in which order jobs run, what is raised."""

import threading

import pytest
from subprocesses import program

from flaxckpt import CheckpointWriteError
from flaxckpt._saving import queue as _queue
from flaxckpt._saving.at_exit import UNHEARD
from flaxckpt._saving.job import Job
from flaxckpt._saving.queue import JobQueue


class Gate:
    """A job that the background thread runs until it is opened."""

    def __init__(self, queue):
        self.begun, self.go = threading.Event(), threading.Event()
        submit(queue, None, self._run)
        assert self.begun.wait(60)

    def _run(self):
        self.begun.set()
        assert self.go.wait(60)


def submit(queue, key, run, *, limit=9, memory=None, after=lambda: None):
    job = queue.claim(key, limit)
    job.then = Job(key, "path", run, after, content=key, memory=memory)
    queue.submit(job)
    return job


def test_jobs_run_in_the_order_in_which_they_were_submitted():
    queue, order = JobQueue(), []
    gate = Gate(queue)
    for number in range(5):
        submit(queue, number, lambda number=number: order.append(number))
    gate.go.set()
    queue.close()
    assert order == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("keys", "runs"),
    [
        ("ab", "ab"),
        ("aa", "A"),
        ("aba", "bA"),  # the second goes to the end
        ("abab", "AB"),
        ((None, None), (None, None)),  # never superseded
    ],
)
def test_a_job_takes_the_place_of_a_waiting_one_of_its_key(keys, runs):
    queue, order, seen = JobQueue(), [], set()
    gate = Gate(queue)
    for key in keys:
        name = key.upper() if key in seen and key is not None else key
        seen.add(key)
        submit(queue, key, lambda name=name: order.append(name))
    gate.go.set()
    queue.close()
    assert order == list(runs)


def test_the_job_under_way_is_not_taken():
    queue, order = JobQueue(), []
    begun, go = threading.Event(), threading.Event()

    def first():
        begun.set()
        assert go.wait(60)
        order.append("first")

    submit(queue, "a", first)
    assert begun.wait(60)
    submit(queue, "a", lambda: order.append("second"))
    go.set()
    queue.close()
    assert order == ["first", "second"]


def test_no_more_jobs_than_the_limit():
    queue = JobQueue()
    gate = Gate(queue)
    assert queue.claim("a", 1, wait=False) is None
    threading.Timer(0.1, gate.go.set).start()
    job = queue.claim("a", 1)
    assert job.waited > 0
    queue.give_back(job)
    queue.close()


def test_a_job_that_is_given_back_is_as_if_it_was_never_claimed():
    queue, order = JobQueue(), []
    gate = Gate(queue)
    submit(queue, "a", lambda: order.append("a"))
    waiting = queue.claim("a", 9)
    new = queue.claim("b", 9)
    for job in (waiting, new):
        queue.give_back(job)
    gate.go.set()
    queue.close()
    assert order == ["a"]


def test_a_call_gives_back_what_an_interrupted_call_of_its_thread_has_claimed():
    queue = JobQueue()
    queue.claim("a", 9)
    queue.wait()
    assert queue.claim("b", 1, wait=False) is not None


def test_the_memory_of_a_job_goes_to_the_next_new_one():
    queue = JobQueue()
    submit(queue, "a", lambda: None, memory="copies")
    queue.wait()
    assert queue.claim("b", 9).memory == "copies"
    assert queue.claim("c", 9).memory is None
    queue.close()


def fails(text):
    def run():
        raise OSError(28, text)

    return run


def test_errors_are_raised_once_and_together():
    queue = JobQueue()
    for text in ("one", "two", "three"):
        submit(queue, None, fails(text))
    with pytest.raises(CheckpointWriteError, match="one") as caught:
        queue.wait()
    assert [str(n) for n in caught.value.__notes__] == [
        "And: Saving 'path' failed: OSError: [Errno 28] two.",
        "And: Saving 'path' failed: OSError: [Errno 28] three.",
    ]
    queue.check()
    queue.close()


def test_after_a_failure_the_jobs_behind_it_run():
    queue, order = JobQueue(), []
    submit(queue, None, fails("full"), memory="copies")
    submit(queue, None, lambda: order.append("behind"))
    with pytest.raises(CheckpointWriteError, match="full"):
        queue.close()
    assert order == ["behind"]
    assert queue.claim("a", 9).memory is None  # its copies are not used again


def test_what_follows_a_job_is_not_waited_for_but_its_error_is_told():
    queue, go = JobQueue(), threading.Event()

    def after():
        assert go.wait(60)
        raise OSError(5, "sweep")

    submit(queue, None, lambda: None, after=after)
    queue.wait()
    go.set()
    with pytest.raises(CheckpointWriteError, match="sweep"):
        queue.close()
        queue.check()


def test_the_program_s_end_knows_a_queue_with_work_or_with_an_error(monkeypatch):
    monkeypatch.setattr(_queue, "_IDLE_SECS", 0.2)
    queue = JobQueue()
    gate = Gate(queue)
    assert queue in UNHEARD
    submit(queue, None, fails("full"))
    gate.go.set()
    queue._thread.join(60)  # it has been idle for long
    assert queue in UNHEARD
    with pytest.raises(CheckpointWriteError, match="full"):
        queue.wait()
    queue.wait()
    assert queue not in UNHEARD


def test_a_save_that_begins_when_a_wait_ends_is_known_to_the_program_s_end(monkeypatch):
    queue, go, others = JobQueue(), threading.Event(), []
    waited_for = threading.Event()

    class Unheard(set):
        def discard(self, one):
            if not others and threading.current_thread() is threading.main_thread():
                work = queue, None, lambda: go.wait(60)
                others.append(threading.Thread(target=submit, args=work))
                others[0].start()
                others[0].join(0.5)  # as long as it takes, if it need not wait
            super().discard(one)

    unheard = Unheard()
    monkeypatch.setattr(_queue, "UNHEARD", unheard)
    submit(queue, None, lambda: waited_for.wait(60))
    threading.Timer(0.2, waited_for.set).start()  # this thread is in `wait` by then
    queue.wait()
    others[0].join()
    assert queue in unheard
    go.set()
    queue.close()
    assert queue not in unheard


def test_the_program_does_not_end_before_what_follows_a_job():
    """Its arrays are deleted then, and Python may not end in the middle of that."""
    done = program("""
        import time
        from flaxckpt._saving.job import Job
        from flaxckpt._saving.queue import JobQueue

        queue = JobQueue()
        job = queue.claim(None, 1)
        after = lambda: (time.sleep(1), print("swept", flush=True))
        job.then = Job(None, "path", lambda: None, after)
        queue.submit(job)
        queue.wait()
        print("waited", flush=True)
    """)
    assert done.communicate(timeout=60) == ("waited\nswept\n", "")


def test_a_job_need_not_wait_for_a_thread_that_stands_by():
    queue, ran_on = JobQueue(), []
    queue.stand_by()
    thread = queue._thread
    assert thread.is_alive()
    submit(queue, None, lambda: ran_on.append(threading.current_thread()))
    queue.wait()
    assert ran_on == [thread]
    queue.close()


def test_close_ends_the_thread_and_a_later_job_gets_another():
    queue, ran = JobQueue(), []
    submit(queue, None, lambda: ran.append(1))
    thread = queue._thread
    queue.close()
    thread.join(_queue._IDLE_SECS / 2)
    assert not thread.is_alive()
    submit(queue, None, lambda: ran.append(2))
    queue.close()
    assert ran == [1, 2]


def test_close_leaves_the_thread_to_a_job_that_is_still_claimed():
    queue, ran_on = JobQueue(), []
    queue.stand_by()
    thread, job = queue._thread, queue.claim(None, 9)
    queue.hold(job)
    queue.close()
    job.then = Job(None, "path", lambda: ran_on.append(threading.current_thread()))
    queue.submit(job)
    queue.wait()
    assert ran_on == [thread]
    queue.close()
