"""`flaxckpt.watch` beside a run, and the run's end mark."""

import itertools
import shutil
import signal
import threading
import time

import numpy as np
import pytest
from object_stores import environment
from subprocesses import program

import flaxckpt
from flaxckpt import (
    CheckpointLockedError,
    CheckpointNotFoundError,
    CheckpointPathError,
    CheckpointWriteError,
    ModelCheckpoint,
    SettingError,
    watch,
)
from flaxckpt._checkpoints import watch as _watch

TREE = {"w": np.ones(3)}


def save(ckpt, *epochs):
    for epoch in epochs:
        ckpt.save({"w": np.full(3, epoch)}, epoch, logs={"val_loss": float(-epoch)})
    ckpt.wait()


def run(filepath, *epochs, finish=True, **settings):
    with ModelCheckpoint(filepath, **settings) as ckpt:
        save(ckpt, *epochs)
        if finish:
            ckpt.finish()


def epochs(infos):
    return [info.epoch for info in infos]


def followed(directory):
    """A watch that gives up, for a test that would hang."""
    return watch(directory, poll_secs=0.01, timeout_secs=30)


def until_the_end(seen):
    """What is left of a watch that the end of the run ends, and not the time."""
    began = time.monotonic()
    left = epochs(seen)
    assert time.monotonic() - began < 15
    return left


def now(directory):
    """What a watch yields at once."""
    return epochs(watch(directory, timeout_secs=0))


@pytest.fixture(params=["disk", "store"])
def root(request, tmp_path):
    return tmp_path if request.param == "disk" else request.getfixturevalue("s3")


# ---- what is yielded -----------------------------------------------------------------


def test_what_is_there_and_what_comes(root):
    with ModelCheckpoint(f"{root}/{{epoch}}") as ckpt:
        save(ckpt, 0, 1)
        seen = followed(root)
        assert epochs(itertools.islice(seen, 2)) == [0, 1]
        save(ckpt, 2)
        info = next(seen)
        assert info == ckpt.latest
        assert flaxckpt.load(info)["w"][0] == 2
        save(ckpt, 3)
        ckpt.finish()
        assert until_the_end(seen) == [3]


def test_each_that_replaces_one_in_place(root):
    with ModelCheckpoint(f"{root}/same") as ckpt:
        seen = followed(root)
        found = []
        for epoch in range(3):
            save(ckpt, epoch)
            found.append(next(seen))
    assert epochs(found) == [0, 1, 2]
    assert {str(info.path) for info in found} == {f"{root}/same"}
    with pytest.raises(CheckpointNotFoundError, match="was replaced"):
        flaxckpt.load(found[0])
    assert flaxckpt.load(found[2])["w"][0] == 2


def test_one_that_moves_aside_is_the_same(tmp_path):
    with (
        pytest.warns(UserWarning, match="took the place"),
        ModelCheckpoint(tmp_path / "best", save_best_only=True) as ckpt,
    ):
        ckpt.save(TREE, 0, logs={"val_loss": 0.5})
        ckpt.wait()
        seen = followed(tmp_path)
        assert next(seen).path.name == "best"
        ckpt.save(TREE, 1, logs={"val_loss": 0.75})
        ckpt.wait()
        assert len(ckpt.checkpoints) == 2
        assert next(seen).path.name == "best"
        ckpt.finish()
    assert until_the_end(seen) == []


def test_the_slot_is_one_too(tmp_path):
    with ModelCheckpoint(
        tmp_path / "best", save_best_only=True, save_last=True
    ) as ckpt:
        state = ckpt.init()
        for epoch, loss in enumerate([0.5, 0.75]):
            state = ckpt.update(state, TREE, {"val_loss": loss}, epoch)
        ckpt.finish()
    names = [info.path.name for info in followed(tmp_path)]
    assert names == ["best", "last"]


def test_what_is_deleted_before_its_turn_is_passed_by(root):
    run(f"{root}/{{epoch}}", 0, 1, 2)
    seen = followed(root)
    assert next(seen).epoch == 0
    flaxckpt.delete(f"{root}/2")
    assert until_the_end(seen) == [2]


def test_what_is_replaced_before_its_turn_comes_as_it_is_then(tmp_path):
    run(tmp_path / "{epoch}", 0, 1)
    seen = followed(tmp_path)
    assert next(seen).epoch == 0
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        ckpt.save({"w": np.full(3, 7)}, 1, logs={"val_loss": 7.0})
        ckpt.finish()
    (info,) = seen
    assert info.logs == {"val_loss": 7.0}
    assert flaxckpt.load(info)["w"][0] == 7


def test_damage_is_told_once_and_ends_nothing(tmp_path):
    run(tmp_path / "{epoch}", 0, 1)
    (tmp_path / "1/flaxckpt.json").write_text("{")
    with pytest.warns(UserWarning, match="Left out: ") as told:
        assert epochs(watch(tmp_path, poll_secs=0.01, timeout_secs=0.1)) == [1]
    assert len(told) == 1


def test_a_name_is_made_durable_before_it_is_yielded(tmp_path, monkeypatch):
    run(tmp_path / "{epoch}", 0)
    synced = []
    monkeypatch.setattr(_watch, "sync_path", synced.append)
    assert now(tmp_path) == [0]
    assert synced == [tmp_path]


def test_a_directory_that_cannot_be_synced(tmp_path, monkeypatch):
    def refuse(path):
        raise OSError("read-only")

    run(tmp_path / "{epoch}", 0)
    monkeypatch.setattr(_watch, "sync_path", refuse)
    assert now(tmp_path) == [0]


def test_records_are_not_read_again(tmp_path, monkeypatch):
    from flaxckpt._disk import listing

    run(tmp_path / "{epoch}", 0, 1, finish=False)
    seen = followed(tmp_path)
    assert epochs(itertools.islice(seen, 2)) == [0, 1]
    run(tmp_path / "{epoch}", 2)
    read, names = listing.read_record, []
    monkeypatch.setattr(
        listing, "read_record", lambda path: names.append(path.name) or read(path)
    )
    assert until_the_end(seen) == [2]
    assert "3" in names
    assert "1" not in names


def test_deleted_faster_than_they_can_be_read(tmp_path, monkeypatch):
    from flaxckpt._runtime.patience import BusyError

    listed, looks = _watch.listed, itertools.count()

    def busy(*args):
        if next(looks) == 1:
            raise BusyError.of("somewhere")
        return listed(*args)

    monkeypatch.setattr(_watch, "listed", busy)
    seen = followed(tmp_path)
    run(tmp_path / "{epoch}", 0)
    assert until_the_end(seen) == [0]


# ---- when it ends --------------------------------------------------------------------


def test_it_waits_for_a_directory_and_no_longer_than_it_may(tmp_path):
    began = time.monotonic()
    assert list(watch(tmp_path / "new", poll_secs=60, timeout_secs=0.2)) == []
    assert 0.2 <= time.monotonic() - began < 30


def test_the_time_of_the_caller_does_not_count(tmp_path):
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        save(ckpt, 0)
        seen = watch(tmp_path, poll_secs=0.01, timeout_secs=0.5)
        assert next(seen).epoch == 0
        time.sleep(0.6)
        threading.Timer(0.1, save, (ckpt, 1)).start()
        assert next(seen).epoch == 1


def test_a_run_that_has_saved_nothing(root):
    with ModelCheckpoint(f"{root}/{{epoch}}") as ckpt:
        ckpt.finish()
    assert until_the_end(followed(root)) == []


def test_what_was_saved_just_before_the_end_is_not_missed(tmp_path, monkeypatch):
    """The run saves and ends after a look that has found nothing."""
    has_ended, is_over = _watch._Watch.has_ended, []

    def late(self):
        if not is_over:
            is_over.append(True)
            run(tmp_path / "{epoch}", 1)
        return has_ended(self)

    run(tmp_path / "{epoch}", 0, finish=False)
    monkeypatch.setattr(_watch._Watch, "has_ended", late)
    assert until_the_end(followed(tmp_path)) == [0, 1]


def test_two_filepaths_in_one_directory_end_each_for_itself(root):
    first, second = (ModelCheckpoint(f"{root}/{name}{{epoch}}") for name in "ab")
    with first, second:
        save(first, 0)
        save(second, 1)
        first.finish()
        assert (first.finished, second.finished) == (True, False)
        seen = followed(root)
        assert epochs(itertools.islice(seen, 2)) == [0, 1]
        threading.Timer(0.3, save, (second, 2)).start()
        assert next(seen).epoch == 2  # the other one's mark has not ended it
        second.finish()
        assert until_the_end(seen) == []


def test_of_a_directory_between_the_root_and_the_checkpoints(tmp_path):
    """The mark is in the root, and not where the watch looks."""
    run(tmp_path / "{epoch}/some/{epoch}", 0, 1)
    assert until_the_end(followed(tmp_path / "2")) == [1]


def test_of_a_directory_above_the_roots(root):
    run(f"{root}/a/{{epoch}}", 0)
    run(f"{root}/b/c/{{epoch}}", 1)
    assert until_the_end(followed(root)) == [0, 1]
    run(f"{root}/a/{{epoch}}", 2, finish=False)
    assert now(root) == [0, 1, 2]
    assert until_the_end(followed(f"{root}/b")) == [1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"poll_secs": 0}, "poll_secs=0 cannot work: pass a number of seconds above"),
        ({"poll_secs": "1"}, "poll_secs='1' cannot work"),
        ({"timeout_secs": -1}, "timeout_secs=-1 cannot work: pass a number of seconds"),
        ({"timeout_secs": float("nan")}, "timeout_secs=nan cannot work"),
    ],
)
def test_settings_that_cannot_work(tmp_path, settings, message):
    with pytest.raises(SettingError, match=message):
        watch(tmp_path, **settings)


def test_what_cannot_be_watched(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(CheckpointPathError, match="is a file"):
        next(watch(tmp_path / "file"))
    with pytest.raises(SettingError, match="pass the path of a directory"):
        watch(3)


# ---- the mark ------------------------------------------------------------------------


def test_the_mark_tells_the_next_run_and_goes_with_its_first_save(root):
    filepath = f"{root}/{{epoch}}"
    ckpt = ModelCheckpoint(filepath)
    assert not ckpt.finished
    run(filepath, 0)
    with ModelCheckpoint(filepath) as ckpt:
        assert ckpt.finished
        assert ckpt.restore().epoch == 0
        assert ckpt.finished
        save(ckpt, 1)
        assert not ckpt.finished
        ckpt.finish()
        ckpt.finish()
        assert ckpt.finished
        save(ckpt, 2)
        assert not ckpt.finished


def test_the_mark_is_gone_before_the_checkpoint_is_there(tmp_path, monkeypatch):
    """Otherwise a watch could end between the two."""
    from flaxckpt._disk import disk_area

    run(tmp_path / "{epoch}", 0)
    put, seen = disk_area.DiskArea._put, []

    def look(self, written, target, own):
        seen.append(self.is_finished)
        return put(self, written, target, own)

    monkeypatch.setattr(disk_area.DiskArea, "_put", look)
    run(tmp_path / "{epoch}", 1)
    assert seen == [False]


def test_a_run_whose_save_has_failed_has_not_ended(tmp_path):
    ckpt = ModelCheckpoint(tmp_path / "{epoch}")
    save(ckpt, 0)
    shutil.rmtree(tmp_path / "1")
    (tmp_path / "2").write_text("in the way")
    with pytest.raises(CheckpointPathError):
        ckpt.save(TREE, 1)

    def fail(info):
        raise ValueError("boom")

    ckpt.close()
    with ModelCheckpoint(tmp_path / "{epoch}", on_saved=fail) as ckpt:
        ckpt.save(TREE, 0)
        with pytest.raises(CheckpointWriteError):
            ckpt.finish()
        assert not ckpt.finished
        ckpt.finish()
        assert ckpt.finished


def test_another_process_writes_there(tmp_path):
    code = """
        import sys, numpy as np, flaxckpt

        ckpt = flaxckpt.ModelCheckpoint(sys.argv[1])
        ckpt.save({"w": np.ones(3)}, 0)
        ckpt.wait()
        print("saved", flush=True)
        sys.stdin.readline()
    """
    with program(code, tmp_path / "{epoch}") as writer:
        assert writer.stdout.readline() == "saved\n"
        with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
            with pytest.raises(CheckpointLockedError):
                ckpt.finish()
            assert not ckpt.finished
        writer.communicate("end\n")


def test_a_mark_that_cannot_be_written(tmp_path):
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        save(ckpt, 0)
        ckpt.finish()
        (mark,) = tmp_path.glob(".flaxckpt-*.finished")
        mark.unlink()
        mark.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(CheckpointPathError, match="takes no mark of the run's end"):
            ckpt.finish()
        assert not (tmp_path / "elsewhere").exists()


# ---- beside a real run ---------------------------------------------------------------

TRAINS = """
    import sys, numpy as np, flaxckpt

    filepath, last, keep = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) or None
    with flaxckpt.ModelCheckpoint(filepath, max_to_keep=keep) as ckpt:
        tree, state, start = ckpt.resume({"w": np.zeros(2000), "n": np.zeros((), int)})
        for epoch in range(start, last):
            tree = {"w": tree["w"] + 1, "n": np.asarray(epoch + 1)}
            state = ckpt.update(state, tree, {"loss": 1.0}, epoch)
            ckpt.wait()
            print(epoch, flush=True)
        ckpt.finish()
"""


class Watcher(threading.Thread):
    """Follows a run, loads all that it sees, and keeps what was wrong."""

    def __init__(self, directory):
        super().__init__()
        self.directory, self.seen, self.loaded = directory, [], []
        self.wrong = []

    def run(self):
        try:
            for info in watch(self.directory, poll_secs=0.001, timeout_secs=60):
                self.seen.append(info)
                self.look(info)
        except BaseException as error:
            self.wrong.append(error)

    def look(self, info):
        try:
            tree = flaxckpt.load(info)
        except (
            CheckpointNotFoundError
        ):  # retention has deleted it, or a save replaced it
            return
        self.loaded.append(info.epoch)
        if tree["n"] != info.epoch + 1 or (tree["w"] != info.epoch + 1).any():
            self.wrong.append(info)


@pytest.mark.parametrize(
    ("name", "keep"), [("{epoch}", 0), ("{epoch}", 1), ("same", 0)], ids=str
)
def test_beside_a_run_that_is_killed_and_goes_on(tmp_path, name, keep):
    """Each is seen once and whole; the killed run's end is no end."""
    watcher = Watcher(tmp_path / "run")
    watcher.start()
    with program(TRAINS, tmp_path / "run" / name, 10**6, keep) as training:
        while len(watcher.seen) < 7:
            assert training.poll() is None, training.stderr.read()
            assert watcher.is_alive(), watcher.wrong
            training.stdout.readline()
        training.send_signal(signal.SIGKILL)
        training.communicate()
    last = watcher.seen[-1].epoch + 20
    with program(TRAINS, tmp_path / "run" / name, last, keep) as training:
        _, errors = training.communicate()
        assert training.returncode == 0, errors
    watcher.join(60)
    assert not watcher.is_alive()
    assert watcher.wrong == []
    times = [info.time for info in watcher.seen]
    assert times == sorted({*times})  # each once, in order
    assert watcher.seen[-1].epoch == last - 1 == watcher.loaded[-1]
    if not keep and name == "{epoch}":  # nothing is deleted: none is missed
        assert epochs(watcher.seen) == [*range(last)] == watcher.loaded


def test_beside_a_run_in_a_store(s3):
    with environment(JAX_PLATFORMS="cpu"):
        watcher = Watcher(s3)
        watcher.start()
        with program(TRAINS, f"{s3}/{{epoch}}", 6, 0) as training:
            _, errors = training.communicate()
            assert training.returncode == 0, errors
        watcher.join(60)
    assert watcher.wrong == []
    assert epochs(watcher.seen) == [*range(6)] == watcher.loaded
