"""The lock by itself: who holds it, whose file it takes, and what interrupts leave."""

import contextlib
import json
import os
import shutil
import socket
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flaxckpt._disk import lock as _lock
from flaxckpt._disk import lock_file as _lock_file
from flaxckpt._disk.lock import FileLock
from flaxckpt.errors import CheckpointLockedError

HERE, NOBODY = socket.gethostname(), 2**22 + 1  # more than any process number
OWN = {"host": HERE, "pid": os.getpid()}
locks = st.sampled_from(LOCKS := (FileLock(), FileLock(), FileLock()))
lock, other = LOCKS[:2]


def release_all(path):
    for each in LOCKS:
        each.release(path)
    assert path not in _lock._held


@pytest.fixture
def path(tmp_path):
    yield tmp_path / "x.lock"
    release_all(tmp_path / "x.lock")


def is_free(path):
    with open(path, "rb", buffering=0) as file:  # as another process would
        return _lock_file.try_flock(file.fileno())


class Holding(RuleBasedStateMachine):
    """Holders of one process come and go, and somebody deletes or replaces the file."""

    def __init__(self):
        super().__init__()
        self.path = Path(tempfile.mkdtemp()) / "x.lock"
        self.holders, self.is_ours, self.is_settled = set(), False, False

    @rule(lock=locks)
    def acquire(self, lock):
        self.is_settled &= self.is_ours  # else another process may have left something
        assert lock.acquire(self.path) != self.is_settled
        self.holders.add(lock)
        self.is_ours = True

    @rule(lock=locks, give=st.sampled_from([FileLock.release, FileLock.drop]))
    def give_back(self, lock, give):
        was_there = self.path.exists()
        give(lock, self.path)
        self.holders.discard(lock)
        if not self.holders:
            assert self.path.exists() == (was_there and not self.is_ours)
            self.is_ours = False

    @precondition(lambda self: self.holders)
    @rule()
    def note_cleared(self):
        lock.note_cleared(self.path)
        self.is_settled = True

    @rule(is_replaced=st.booleans())
    def delete(self, is_replaced):
        self.path.unlink(missing_ok=True)
        if is_replaced:
            self.path.write_text("of somebody else, who has left much more than that")
        self.is_ours = False

    @invariant()
    def is_held_by_its_holders(self):
        assert lock.is_held(self.path, self.path) == self.is_ours
        assert (self.path in _lock._held) == bool(self.holders)
        assert not self.is_ours or json.loads(self.path.read_text()) == OWN
        assert not self.path.exists() or is_free(self.path) != self.is_ours

    def teardown(self):
        release_all(self.path)
        shutil.rmtree(self.path.parent)


Holding.TestCase.settings = settings(max_examples=100, stateful_step_count=30)
TestHolding = Holding.TestCase


def test_the_lock_is_where_its_file_is_by_any_path(path, tmp_path):
    lock.acquire(path)
    (tmp_path / "link").symlink_to(tmp_path)
    assert lock.is_held(path, tmp_path / "link/x.lock")
    assert not any(
        lock.is_held(path, tmp_path / at) for at in ("other", "x.lock/below")
    )


@contextlib.contextmanager
def guarded_elsewhere():
    taken, go = threading.Event(), threading.Event()

    def guard():
        with _lock._guard:
            taken.set()
            go.wait(60)

    thread = threading.Thread(target=guard)
    thread.start()
    taken.wait(60)
    try:
        yield
    finally:
        go.set()
        thread.join()


@pytest.mark.parametrize("by_whom", ["this thread", "another thread"])
def test_a_dropped_holder_waits_for_nothing_and_the_heart_gives_back(path, by_whom):
    lock.acquire(path)
    heart = _lock._held[path].heart
    with _lock._guard if by_whom == "this thread" else guarded_elsewhere():
        lock.drop(path)
        assert path.exists()
    heart.join(60)
    assert not path.exists()


def test_the_end_of_the_interpreter_waits_for_no_thread_that_stopped(path, monkeypatch):
    lock.acquire(path)
    monkeypatch.setattr(_lock, "_LAST_SECS", 0)
    with guarded_elsewhere(), monkeypatch.context() as patch:
        patch.setattr(_lock, "sys", SimpleNamespace(is_finalizing=lambda: True))
        lock.release(path)
        assert path.exists()


# Whose file there is, whether there is flock, whether a heart beats, when it is taken.
AWAY, ALIVE, DEAD = ("elsewhere", 7), (HERE, os.getpid()), (HERE, NOBODY)
FOUND = [(AWAY, True, False, "later"), (AWAY, True, True, "never"),
         (AWAY, False, False, "later"), (AWAY, False, True, "never"),
         (ALIVE, True, True, "now"), (ALIVE, False, False, "later"),
         (ALIVE, False, True, "never"), (DEAD, True, True, "now"),
         (DEAD, False, True, "now"), (("", 7), False, True, "now")]  # fmt: skip


@pytest.mark.parametrize(("owner", "has_flock", "beats", "when"), FOUND)
def test_a_lock_is_taken_unless_its_owner_s_heart_beats(
    path, monkeypatch, owner, has_flock, beats, when
):
    path.write_text(left := json.dumps({"host": owner[0], "pid": owner[1]}))

    def sleep(secs):
        clock.now += secs
        if beats:
            os.utime(path, (clock.now, clock.now))

    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now, sleep=sleep)
    monkeypatch.setattr(_lock, "time", clock)
    if not has_flock:
        monkeypatch.setattr(_lock_file.fcntl, "flock", Mock(side_effect=OSError))
    if when == "never":
        with pytest.raises(CheckpointLockedError) as caught:
            lock.acquire(path)
        assert (caught.value.host, caught.value.pid) == owner
        assert path.read_text() == left
    else:
        assert lock.acquire(path)
        assert json.loads(path.read_text()) == OWN
        assert clock.now == (0 if when == "now" else _lock.WATCH_SECS)


@pytest.mark.parametrize("is_lost", [False, True])
@pytest.mark.parametrize("step", ["open_lock_file", "flock", "_watch", "is_still", "_sign"])  # fmt: skip
def test_an_interrupt_leaves_nothing_open_and_the_same_call_goes_on(
    path, monkeypatch, step, is_lost
):
    if is_lost:
        other.acquire(path)
        path.unlink()
    files, take, do = [], _lock._take, getattr(_lock, step)

    def interrupted(*args):
        do(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_lock, "_take", lambda *a: files.append(a[1]) or take(*a))
        patch.setattr(_lock, step, interrupted)
        lock.acquire(path)
    assert all(file.closed for opened in files for file in opened)
    assert lock.acquire(path)
    lock.release(path)
    assert lock.is_held(path, path) == path.exists() == is_lost


@pytest.mark.parametrize(("room", "step"), [(_lock_file, "made"), (_lock, "flock")])
def test_what_its_owner_takes_away_is_made_anew(path, monkeypatch, room, step):
    do = getattr(room, step)

    def late(*args):
        monkeypatch.setattr(room, step, do)
        path.touch()
        try:
            do(*args)
        finally:
            path.unlink()

    monkeypatch.setattr(room, step, late)
    assert lock.acquire(path)
    assert lock.is_held(path, path)


@pytest.mark.parametrize(
    ("step", "error"), [("made", PermissionError), ("rename", PermissionError),
                        ("rename", KeyboardInterrupt), (None, None)]
)  # fmt: skip
def test_another_user_s_lock_is_replaced_or_stays_and_nothing_is_left_beside_it(
    path, monkeypatch, step, error
):
    path.write_text("{}")
    fail = Mock(side_effect=error)
    monkeypatch.setattr(os, "geteuid", lambda: -1)
    with monkeypatch.context() as patch:
        if step:
            patch.setattr(_lock.os if step == "rename" else _lock, step, fail)
        with contextlib.suppress(KeyboardInterrupt):
            lock.acquire(path)
    assert os.listdir(path.parent) == ["x.lock"]
    assert json.loads(path.read_text()) == ({} if step else OWN)
    assert lock.is_held(path, path) == (error is not KeyboardInterrupt)
    assert is_free(path) == (error is KeyboardInterrupt)


def test_the_file_is_new_and_whoever_shares_the_directory_can_look(path):
    before = os.umask(0o077)
    _lock_file.made(path, opened := [])
    os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644
    with pytest.raises(FileExistsError):
        _lock_file.made(path, opened)
    (file,) = opened
    file.close()
