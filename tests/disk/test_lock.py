"""One writer at a time: the lock of a directory."""

import json
import os
import shutil
import socket
import threading
import time
from concurrent import futures

import numpy as np
import pytest
from subprocesses import program

from flaxckpt import CheckpointLockedError, ModelCheckpoint
from flaxckpt._disk import lock as _lock
from flaxckpt._disk import staging as _staging


def names(infos):
    return [info.path.name for info in infos]


def tree_of(epoch):
    return {"w": np.full(4, epoch, np.float32)}


HOLDER = """
    import sys, absl.logging
    absl.logging.set_verbosity("fatal")
    import numpy as np, flaxckpt
    ckpt = flaxckpt.ModelCheckpoint(sys.argv[1] + "/{epoch}")
    ckpt.save({"w": np.zeros(1)}, epoch=0)
    ckpt.wait()
    print("saved", flush=True)
    sys.stdin.readline()
    ckpt.close()
    print("closed", flush=True)
    sys.stdin.readline()
"""


def test_a_second_writer_is_told_of_the_first(tmp_path):
    holder = program(HOLDER, tmp_path)
    try:
        assert holder.stdout.readline() == "saved\n"
        ckpt = ModelCheckpoint(tmp_path / "{epoch}")
        assert names(ckpt.checkpoints) == ["1"]  # reading is free
        assert ckpt.restore().epoch == 0
        with pytest.raises(CheckpointLockedError) as caught:
            ckpt.update(ckpt.init(), tree_of(1), {}, 1)
        assert str(caught.value) == (
            f"The checkpoints in {str(tmp_path)!r} are being written by process "
            f"{holder.pid} on {socket.gethostname()}. End that one, or choose another "
            "filepath. Processes of one run call jax.distributed.initialize() first."
        )
        assert names(ckpt.checkpoints) == ["1"]
        with ModelCheckpoint(tmp_path / "other-{epoch}") as other:
            other.save(tree_of(0), epoch=0)  # another series
        print(file=holder.stdin, flush=True)
        assert holder.stdout.readline() == "closed\n"
        ckpt.update(ckpt.init(), tree_of(1), {}, 1)
        ckpt.close()
        assert sorted(os.listdir(tmp_path)) == ["1", "2", "other-1"]
    finally:
        holder.kill()
        holder.communicate()


def test_the_lock_of_a_killed_process_is_stale(tmp_path):
    holder = program(HOLDER, tmp_path)
    assert holder.stdout.readline() == "saved\n"
    holder.kill()
    holder.communicate()
    assert [name for name in os.listdir(tmp_path) if name.endswith(".lock")]
    leftover = next(n for n in os.listdir(tmp_path) if n.endswith(".lock"))[:-5] + "-x"
    (tmp_path / leftover).mkdir()  # as it would leave in the middle of a save
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        ckpt.save(tree_of(1), epoch=1)
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_objects_of_one_process_share_the_lock(tmp_path):
    first, second = (ModelCheckpoint(tmp_path / "{epoch}") for _ in range(2))
    first.save(tree_of(0), epoch=0)
    second.save(tree_of(1), epoch=1)
    first.close()
    assert [name for name in os.listdir(tmp_path) if name.endswith(".lock")]
    second.close()
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(_lock, "HEARTBEAT_SECS", 0.05)
    monkeypatch.setattr(_lock, "WATCH_SECS", 0.3)


def test_a_lock_that_another_thread_gives_back_now_is_not_held(tmp_path, monkeypatch):
    path, lock, is_still = tmp_path / "lock", _lock.FileLock(), _lock.is_still
    lock.acquire(path)
    assert lock.is_held(path, path)

    def is_still_there(path, descriptor):
        _lock._held[path].file.close()  # by the other thread
        return is_still(path, descriptor)

    monkeypatch.setattr(_lock, "is_still", is_still_there)
    assert not lock.is_held(path, path)
    lock.release(path)


def test_a_lock_that_another_thread_takes_anew_now_is_held(tmp_path, monkeypatch):
    path, is_still = tmp_path / "lock", _lock.is_still
    lock, other = _lock.FileLock(), _lock.FileLock()
    lock.acquire(path)
    path.unlink()

    def is_still_there(at, descriptor):
        monkeypatch.setattr(_lock, "is_still", is_still)
        thread = threading.Thread(target=other.acquire, args=(path,))
        thread.start()
        thread.join()
        return is_still(at, descriptor)

    monkeypatch.setattr(_lock, "is_still", is_still_there)
    assert lock.is_held(path, path)
    lock.release(path)
    other.release(path)


def test_another_machine_s_lock_holds_while_its_heart_beats(tmp_path, quick):
    """Where the machines' kernels share no locks."""
    path, lock = tmp_path / "x.lock", _lock.FileLock()
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7}))
    stop = threading.Event()

    def beat():
        while not stop.wait(0.02):
            os.utime(path)

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with pytest.raises(CheckpointLockedError, match="process 7 on elsewhere"):
            lock.acquire(path)
    finally:
        stop.set()
        heart.join()
    assert lock.acquire(path)  # no sign of life any more
    assert json.loads(path.read_text())["pid"] == os.getpid()
    before = path.stat().st_mtime_ns
    until = time.monotonic() + 10
    while path.stat().st_mtime_ns == before:
        assert time.monotonic() < until
        time.sleep(0.01)
    lock.release(path)
    assert not path.exists()


def test_what_another_writer_left_is_cleared_up_once_a_deleted_lock_is_taken_anew(
    tmp_path,
):
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        ckpt.save(tree_of(0), epoch=0)
        ckpt.wait()
        (lock,) = tmp_path.glob(".flaxckpt-*.lock")
        lock.unlink()
        leftover = tmp_path / f"{lock.stem}-0123456789ab"
        leftover.mkdir()
        ckpt.save(tree_of(1), epoch=1)
        ckpt.wait()
        assert not leftover.exists()
        assert names(ckpt.checkpoints) == ["1", "2"]


def test_a_lock_taken_anew_waits_for_what_is_being_swept(tmp_path, monkeypatch):
    sweeping, rmtree = threading.Event(), shutil.rmtree

    def slow(*args, **kwargs):
        if not sweeping.is_set():
            sweeping.set()
            time.sleep(0.2)
        rmtree(*args, **kwargs)

    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        ckpt.save(tree_of(0), epoch=0)
        ckpt.wait()
        area = ckpt._series.area
        (lock,) = tmp_path.glob(".flaxckpt-*.lock")
        old = tmp_path / f"{lock.stem}-0123456789ab"
        old.mkdir()
        area._staging.trash.append(old)
        monkeypatch.setattr(_staging.shutil, "rmtree", slow)
        with futures.ThreadPoolExecutor() as pool:
            swept = pool.submit(area.sweep, spare=False)
            assert sweeping.wait(10)
            lock.unlink()
            area.open()
            swept.result()
        assert not old.exists()
        ckpt.save(tree_of(1), epoch=1)


def test_what_could_not_be_deleted_is_deleted_by_the_next_sweep(tmp_path, monkeypatch):
    failing, rmtree = [], shutil.rmtree

    def fails_once(path, **kwargs):
        if path in failing:
            failing.remove(path)
        else:
            rmtree(path, **kwargs)

    with ModelCheckpoint(tmp_path / "a") as ckpt:
        ckpt.save(tree_of(0), epoch=0)
    staging = ckpt._series.area._staging  # no thread sweeps any more
    old = staging.made()
    staging.trash.append(old)
    failing.append(old)
    monkeypatch.setattr(_staging.shutil, "rmtree", fails_once)
    staging.sweep(spare=False)
    assert old.exists()
    staging.sweep(spare=False)
    assert not old.exists()
    assert not staging.trash
