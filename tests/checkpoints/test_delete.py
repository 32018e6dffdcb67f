"""`flaxckpt.delete`: what it deletes, what it refuses, and beside whom."""

import errno
import os
import shutil
import signal

import numpy as np
import pytest
from orbax.checkpoint import v1
from subprocesses import program

import flaxckpt
from flaxckpt import (
    CheckpointCorruptError,
    CheckpointLockedError,
    CheckpointNotFoundError,
    CheckpointPathError,
    ModelCheckpoint,
    SettingError,
)
from flaxckpt._checkpoints.found import root_of
from flaxckpt._object_store.objects import Objects

SAVES = """
    import sys, numpy as np, flaxckpt

    ckpt = flaxckpt.ModelCheckpoint(sys.argv[1])
    for epoch in range(2):
        ckpt.save({"w": np.full(3, epoch)}, epoch)
    ckpt.wait()
    print("saved", flush=True)
    sys.stdin.readline()
"""


def save(filepath, numbers=(0, 1, 2), **settings):
    with ModelCheckpoint(filepath, **settings) as ckpt:
        for number in numbers:
            ckpt.save({"w": np.full(3, number)}, number, logs={"val_loss": number})


def epochs(directory):
    return [info.epoch for info in flaxckpt.list_checkpoints(directory)]


@pytest.mark.parametrize("depth", ["{epoch}", "a/{epoch}/b"])
@pytest.mark.parametrize("kind", ["info", "path", "text", "relative"])
def test_one_is_deleted_and_nothing_is_left_of_it(tmp_path, monkeypatch, kind, depth):
    save(tmp_path / depth)
    info = flaxckpt.list_checkpoints(tmp_path)[1]
    monkeypatch.chdir(tmp_path)
    given = {
        "info": info,
        "path": info.path,
        "text": f"{info.path}/",
        "relative": os.path.relpath(info.path),
    }
    flaxckpt.delete(given[kind])
    assert epochs(tmp_path) == [0, 2]
    assert not info.path.exists()
    assert not list(tmp_path.rglob(".*"))


def test_the_root_directory_is_not_the_working_directory(tmp_path, monkeypatch):
    save(tmp_path / "{epoch}")
    monkeypatch.chdir(flaxckpt.list_checkpoints(tmp_path)[0].path)
    with pytest.raises(CheckpointNotFoundError, match="No checkpoint"):
        flaxckpt.delete("/")
    assert epochs(tmp_path) == [0, 1, 2]


@pytest.mark.parametrize("kind", ["info", "url"])
def test_one_in_a_store(url, kind):
    save(f"{url}/{{epoch}}")
    info = flaxckpt.list_checkpoints(url)[1]
    flaxckpt.delete(info if kind == "info" else f"{url}/2/")
    assert epochs(url) == [0, 2]
    left = Objects(url).keys_below("")
    assert not [key for key in left if "2" in key.split("/")]
    assert not [key for key in left if "doubtful" in key or "lock" in key]
    with pytest.raises(CheckpointNotFoundError):
        flaxckpt.delete(info)


def test_one_at_the_top_of_a_bucket(s3):
    bucket, name = s3.rsplit("/", 1)
    save(f"{bucket}/{name}-{{epoch}}", [0, 1])
    flaxckpt.delete(f"{bucket}/{name}-1")
    with pytest.raises(CheckpointNotFoundError):
        flaxckpt.delete(f"{bucket}/{name}-1")
    assert flaxckpt.load(f"{bucket}/{name}-2")["w"][0] == 1
    flaxckpt.delete(f"{bucket}/{name}-2")


def test_the_slot_and_one_aside_and_one_that_was_moved(tmp_path):
    with ModelCheckpoint(
        tmp_path / "best", save_best_only=True, save_last=True
    ) as ckpt:
        state = ckpt.update(ckpt.init(), {"w": np.ones(2)}, {"val_loss": 1.0}, 0)
        ckpt.update(state, {"w": np.ones(2)}, {"val_loss": 2.0}, 1)
    (tmp_path / "kept").mkdir()
    shutil.copytree(tmp_path / "best", tmp_path / "kept/of-mine")
    flaxckpt.delete(tmp_path / "last")
    flaxckpt.delete(tmp_path / "kept/of-mine")
    assert epochs(tmp_path) == [0]
    assert not list(tmp_path.rglob(".*"))


def test_the_series_root_of_one_that_was_moved(tmp_path):
    save(tmp_path / "run/{epoch}/b", [0])
    shutil.copytree(tmp_path / "run/1", tmp_path / "kept/1")
    shutil.copytree(tmp_path / "run/1/b", tmp_path / "kept/mine/b")
    roots = [root_of(info) for info in flaxckpt.list_checkpoints(tmp_path)]
    kept = tmp_path / "kept"
    assert set(roots) == {f"{tmp_path}/run", f"{kept}", f"{kept}/mine"}
    flaxckpt.delete(kept / "mine/b")
    assert epochs(tmp_path) == [0, 0]


# ---- what is refused -----------------------------------------------------------------


def test_an_empty_text_is_not_the_working_directory(tmp_path, monkeypatch):
    """A variable of the shell that is not set, say."""
    save(tmp_path / "run", [0])
    monkeypatch.chdir(tmp_path / "run")
    for call in (
        flaxckpt.delete,
        flaxckpt.load,
        lambda path: flaxckpt.ModelCheckpoint("x").restore(which=path),
    ):
        with pytest.raises(SettingError, match="''"):
            call("")
    assert epochs(tmp_path) == [0]
    assert len(flaxckpt.list_checkpoints("")) == 1  # as of os.path.dirname("{epoch}")


def test_what_is_no_checkpoint_of_flaxckpt(tmp_path):
    save(tmp_path / "run/{epoch}", [0])
    v1.save(tmp_path / "plain", {"w": np.ones(2)})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointNotFoundError, match=r"\(checkpoints near it: 1\)"):
        flaxckpt.delete(tmp_path / "run")
    for name in ("mine", "mine/thesis.txt", "missing"):
        with pytest.raises(CheckpointNotFoundError):
            flaxckpt.delete(tmp_path / name)
    for name in ("plain", "run/1/state"):
        with pytest.raises(CheckpointPathError, match="no checkpoint of flaxckpt, so"):
            flaxckpt.delete(tmp_path / name)
    with pytest.raises(SettingError, match="pass a checkpoint, or its path"):
        flaxckpt.delete(3)
    (tmp_path / "run/1/flaxckpt.json").write_text("{")
    with pytest.raises(CheckpointCorruptError):
        flaxckpt.delete(tmp_path / "run/1")
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_no_checkpoint_in_a_store(s3):
    save(f"{s3}/{{epoch}}", [0])
    Objects(s3).write("plain/_CHECKPOINT_METADATA", b"{}")
    for name in ("", "/3", "/1/state"):
        with pytest.raises(CheckpointNotFoundError):
            flaxckpt.delete(f"{s3}{name}")
    with pytest.raises(CheckpointPathError, match="plain Orbax"):
        flaxckpt.delete(f"{s3}/plain")
    assert epochs(s3) == [0]


def test_one_with_another_in_it(tmp_path):
    save(tmp_path / "{epoch}", [0])
    shutil.copytree(tmp_path / "1", tmp_path / "1/inner")
    with pytest.raises(CheckpointPathError):
        flaxckpt.delete(tmp_path / "1")
    assert flaxckpt.load(tmp_path / "1")["w"][0] == 0


@pytest.mark.parametrize("where", ["disk", "store"])
def test_an_info_does_not_stand_for_what_has_replaced_it(tmp_path, request, where):
    root = tmp_path if where == "disk" else request.getfixturevalue("s3")
    save(f"{root}/same", [0])
    (old,) = flaxckpt.list_checkpoints(root)
    save(f"{root}/same", [1])
    with pytest.raises(
        CheckpointNotFoundError, match="was replaced since it was listed"
    ):
        flaxckpt.delete(old)
    assert epochs(root) == [1]
    flaxckpt.delete(old.path)
    assert epochs(root) == []


def test_one_that_is_replaced_while_it_is_deleted(tmp_path, monkeypatch):
    """The lock is taken after a first look, and may bring another one."""
    from flaxckpt._disk import disk_area

    save(tmp_path / "same", [0])
    opens = disk_area.DiskArea.open

    def late(self, *clear_up):
        monkeypatch.setattr(disk_area.DiskArea, "open", opens)
        save(tmp_path / "same", [1])
        opens(self, *clear_up)

    monkeypatch.setattr(disk_area.DiskArea, "open", late)
    with pytest.raises(CheckpointNotFoundError, match="was replaced"):
        flaxckpt.delete(tmp_path / "same")
    assert epochs(tmp_path) == [1]


def test_one_that_cannot_be_renamed(tmp_path, monkeypatch):
    save(tmp_path / "{epoch}", [0])
    rename = type(tmp_path).rename

    def refuse(self, target):
        if self == tmp_path / "1":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return rename(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", refuse)
    with pytest.raises(CheckpointPathError, match=r"Permission denied\. It is whole"):
        flaxckpt.delete(tmp_path / "1")
    assert epochs(tmp_path) == [0]
    assert not list(tmp_path.rglob(".*"))


# ---- beside a writer -----------------------------------------------------------------


@pytest.mark.parametrize("where", ["disk", "store"])
def test_another_process_writes_there(tmp_path, request, where):
    root = tmp_path if where == "disk" else request.getfixturevalue("s3")
    with program(SAVES, f"{root}/{{epoch}}") as writer:
        try:
            assert writer.stdout.readline() == "saved\n"
            with pytest.raises(CheckpointLockedError, match=f"process {writer.pid} "):
                flaxckpt.delete(f"{root}/1")
            assert epochs(root) == [0, 1]
        finally:
            writer.communicate("end\n")
    flaxckpt.delete(f"{root}/1")
    assert epochs(root) == [1]


def test_the_writer_was_killed(tmp_path):
    with program(SAVES, tmp_path / "{epoch}") as writer:
        assert writer.stdout.readline() == "saved\n"
        writer.send_signal(signal.SIGKILL)
    flaxckpt.delete(tmp_path / "1")
    assert epochs(tmp_path) == [1]


@pytest.mark.parametrize("where", ["disk", "store"])
def test_the_writing_process_itself(tmp_path, request, where):
    """The object learns of it: retention and the best go by what is there."""
    root = tmp_path if where == "disk" else request.getfixturevalue("s3")
    with ModelCheckpoint(f"{root}/{{epoch}}", max_to_keep=2) as ckpt:
        for number in range(2):
            ckpt.save({"w": np.ones(2)}, number, logs={"val_loss": float(number)})
        ckpt.wait()
        flaxckpt.delete(ckpt.best)
        assert [info.epoch for info in ckpt.checkpoints] == [1]
        ckpt.save({"w": np.ones(2)}, 2, logs={"val_loss": 5.0})
        ckpt.wait()
        assert [info.epoch for info in ckpt.checkpoints] == [1, 2]
        assert ckpt.best.epoch == 1


def test_a_function_of_on_saved_deletes(tmp_path):
    seen = []

    def keep_even(info):
        seen.append(info.epoch)
        if info.epoch % 2:
            flaxckpt.delete(info)

    save(tmp_path / "{epoch}", range(4), on_saved=keep_even)
    assert seen == [0, 1, 2, 3]
    assert epochs(tmp_path) == [0, 2]


KILLED = """
    import os, pathlib, signal, sys, flaxckpt
    from flaxckpt._disk import staging

    rename, number = pathlib.Path.rename, int(sys.argv[2])
    calls = 0

    def counted(call):
        def run(*args, **kwargs):
            global calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        return run

    import flaxckpt._disk.disk_area as area
    pathlib.Path.rename = counted(rename)
    os.unlink = counted(os.unlink)
    os.rmdir = counted(os.rmdir)
    area.sync_path = counted(area.sync_path)
    flaxckpt.delete(sys.argv[1])
"""


@pytest.mark.parametrize("number", [1, 2, 12])
def test_a_kill_leaves_it_whole_or_gone(tmp_path, number):
    """At a file operation, before the rename, after it, and amid the deletion."""
    save(tmp_path / "{epoch}", [0, 1])
    with program(KILLED, tmp_path / "1", number) as deletes:
        deletes.communicate()
    assert deletes.returncode == -signal.SIGKILL
    left = flaxckpt.list_checkpoints(tmp_path)
    assert [info.epoch for info in left] == ([0, 1] if number == 1 else [1])
    for info in left:
        flaxckpt.verify(info)
    save(tmp_path / "{epoch}", [2])  # the next writer clears up
    assert not list(tmp_path.rglob(".*"))
