"""What is written over is nobody else's, and who reads meanwhile sees one or the other."""

import contextlib
import errno
import gc
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import warnings
import weakref

import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

import flaxckpt
from flaxckpt import ModelCheckpoint
from flaxckpt._checkpoints import load as _load
from flaxckpt._checkpoints import write as _write
from flaxckpt._disk import disk_area as _commit
from flaxckpt._disk import exchange as _exchange
from flaxckpt._runtime import patience as _patience


@pytest.fixture
def files(monkeypatch):
    """A file for each array, as large ones have."""
    monkeypatch.setattr(_write, "_LARGE_LEAF", 0)


def tree_of(epoch):
    return {"w": jnp.full((300, 300), epoch, jnp.float32), "n": np.full(10, epoch)}


@pytest.mark.parametrize(
    "settings", [{}, {"max_to_keep": 2}], ids=["replaced", "deleted"]
)
def test_the_files_of_old_checkpoints_are_used_for_new_ones(tmp_path, files, settings):
    name = "{epoch}" if settings else "best"
    with ModelCheckpoint(tmp_path / name, "loss", mode="max", **settings) as ckpt:
        places = []
        for epoch in range(9):
            path = ckpt.save(tree_of(epoch), epoch, logs={"loss": epoch})
            ckpt.wait()
            (data,) = (path / "state/w").glob("c*")
            places.append(data.stat().st_ino)
            assert (flaxckpt.load(path)["w"] == epoch).all()
        assert len(set(places[3:])) == len(set(places[-3:])) <= 3
        # One directory beside the checkpoints, and none in the end.
        queue = ckpt._saves.queue
        with queue._changed:  # what is deleted after `wait` has returned
            queue._changed.wait_for(lambda: not queue._is_busy)
        assert len([n for n in os.listdir(tmp_path) if n.startswith(".")]) == 2
    assert not [n for n in os.listdir(tmp_path) if n.startswith(".")]


def test_another_structure_does_not_get_the_files_of_the_one_before(tmp_path, files):
    with ModelCheckpoint(tmp_path / "best") as ckpt:
        for epoch in range(12):
            tree = tree_of(epoch)
            if epoch % 3:
                tree["more"] = jnp.full(7 * epoch, epoch, jnp.int8)
            path = ckpt.save(tree, epoch)
            ckpt.wait()
            flaxckpt.verify(path)
            found = flaxckpt.load(path)
            assert found.keys() == tree.keys()
            assert all((found[name] == epoch).all() for name in tree)


def fifo(path):
    os.mkfifo(path)


def bound_socket(path):
    with socket.socket(socket.AF_UNIX) as one, contextlib.chdir(path.parent):
        one.bind(path.name)  # the names of sockets are short


def directory(path):
    path.mkdir()
    (path / "more").write_bytes(b"x")


def link_to_a_device(path):
    path.symlink_to("/dev/full")


@pytest.mark.parametrize("put", [fifo, bound_socket, directory, link_to_a_device])
@pytest.mark.parametrize(
    "settings", [{}, {"max_to_keep": 1}], ids=["replaced", "deleted"]
)
def test_what_is_no_plain_file_in_an_old_checkpoint_is_replaced(
    tmp_path, files, put, settings
):
    """A FIFO would keep the save waiting for ever."""
    name = "{epoch}" if settings else "best"
    with ModelCheckpoint(tmp_path / name, **settings) as ckpt:
        for epoch in range(8):
            path = ckpt.save(tree_of(epoch), epoch)
            ckpt.wait()
            assert (flaxckpt.load(path)["w"] == epoch).all()
            if epoch in (2, 3):
                for each in ("state/w/c.0.0", "state/w/zarr.json", "flaxckpt.json"):
                    (path / each).unlink()
                    put(path / each)


@pytest.mark.parametrize("gone", ["new", "new/state"])
def test_an_old_directory_that_is_a_link_is_not_written_over(tmp_path, files, gone):
    elsewhere = tmp_path / "elsewhere"
    with ModelCheckpoint(tmp_path / "runs/best") as ckpt:
        for epoch in range(3):
            ckpt.save(tree_of(epoch), epoch)
            ckpt.wait()
        queue = ckpt._saves.queue
        with queue._changed:  # what is deleted after `wait` has returned
            queue._changed.wait_for(lambda: not queue._is_busy)
        (spare,) = (tmp_path / "runs").glob(".flaxckpt-*-*")
        (spare / gone).rename(elsewhere)
        (spare / gone).symlink_to(elsewhere)
        before = sorted(elsewhere.rglob("*"))
        path = ckpt.save(tree_of(3), 3)
        ckpt.wait()
        assert (flaxckpt.load(path)["w"] == 3).all()
    assert sorted(elsewhere.rglob("*")) == before


@pytest.mark.parametrize("verify", [True, False])
def test_who_reads_while_it_is_written_gets_one_checkpoint(tmp_path, files, verify):
    """Never parts of two, and no error."""
    stop, progress = threading.Event(), threading.Event()
    seen, problems = set(), []

    def read():
        while not stop.is_set():
            try:
                found = flaxckpt.load(tmp_path / "best", verify=verify)
                values = {*np.unique(found["w"]).tolist(), *found["n"].tolist()}
                assert len(values) == 1, values
                seen.update(values)
            except Exception as error:
                problems.append(error)
                stop.set()
            progress.set()

    with ModelCheckpoint(tmp_path / "best", sync=False) as ckpt:
        ckpt.save(tree_of(0), 0)
        ckpt.wait()
        reader = threading.Thread(target=read)
        reader.start()
        for epoch in range(1, 90):
            ckpt.save(tree_of(epoch), epoch)
            if epoch % 4 == 0:
                ckpt.wait()  # else many reads may see one save, on a busy machine
                progress.clear()
                assert progress.wait(60) or stop.is_set()
        stop.set()
        reader.join()
    assert not problems
    assert len(seen) > 5


def test_reading_what_is_always_replaced_ends(tmp_path, files, monkeypatch):
    with ModelCheckpoint(tmp_path / "best", sync=False) as ckpt:
        ckpt.save(tree_of(0), 0)
        ckpt.wait()
        read = _load.load_tree

        def replaced(*args, **kwargs):
            ckpt.save(tree_of(1), 1)
            ckpt.wait()
            return read(*args, **kwargs)

        monkeypatch.setattr(_load, "load_tree", replaced)
        monkeypatch.setattr(_patience, "SECS", 0)
        with pytest.raises(flaxckpt.CheckpointError, match="was replaced 20 times"):
            flaxckpt.load(tmp_path / "best")


# ---- what is on its way out --------------------------------------------------------------


def test_a_link_to_an_archive_is_removed_and_not_followed(tmp_path, files):
    archive = tmp_path / "archive"
    archive.mkdir()
    with ModelCheckpoint(tmp_path / "runs/{epoch}", max_to_keep=1) as ckpt:
        for epoch in range(2):
            ckpt.save(tree_of(epoch), epoch)
            ckpt.wait()
        (tmp_path / "runs/2").rename(archive / "2")
        (tmp_path / "runs/2").symlink_to(archive / "2")
        for epoch in range(2, 6):
            ckpt.save(tree_of(epoch), epoch)
            ckpt.wait()
            assert (flaxckpt.load(archive / "2")["w"] == 1).all()
    assert os.listdir(tmp_path / "runs") == ["6"]
    assert not (tmp_path / "runs/6").is_symlink()


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "renames"])
@pytest.mark.parametrize("back", [True, False], ids=["", "not even back"])
def test_an_exchange_that_the_disk_does_not_take_is_taken_back(
    tmp_path, files, monkeypatch, exchange, back
):
    if not exchange:
        monkeypatch.setattr(_exchange, "_exchange", lambda one, other: False)
    with ModelCheckpoint(tmp_path / "best") as ckpt:
        for epoch in range(3):
            ckpt.save(tree_of(epoch), epoch)
            ckpt.wait()
        with monkeypatch.context() as patch:
            sync, replace = ckpt._series.area._sync_directory, _exchange.replace
            replaced = []

            def note(written, target, sync_directory):
                if replaced and not back:
                    raise OSError(errno.EIO, "injected")
                replaced.append(written)
                replace(written, target, sync if len(replaced) == 1 else sync_directory)

            def fail(directory):
                if replaced:
                    raise OSError(errno.EIO, "injected")
                sync(directory)

            patch.setattr(_commit, "replace", note)
            patch.setattr(ckpt._series.area, "_sync_directory", fail)
            ckpt.save(tree_of(3), 3)
            with pytest.raises(flaxckpt.CheckpointWriteError, match="injected"):
                ckpt.wait()
        found = flaxckpt.load(tmp_path / "best")
        assert (found["w"] == (2 if back else 3)).all()
        if not back:  # what was there is not deleted before something is on disk
            (aside,) = tmp_path.glob(".flaxckpt-*-*/new")
            assert (flaxckpt.load(aside)["w"] == 2).all()
        ckpt.save(tree_of(4), 4)
        ckpt.wait()
        assert (flaxckpt.load(tmp_path / "best")["w"] == 4).all()
    assert os.listdir(tmp_path) == ["best"]


def test_an_object_that_nobody_closed_leaves_no_spare(tmp_path, files):
    ckpt = ModelCheckpoint(tmp_path / "best")
    for epoch in range(4):
        ckpt.save(tree_of(epoch), epoch)
        ckpt.wait()
    area = weakref.ref(ckpt._series.area)
    assert list(tmp_path.glob(".flaxckpt-*-*"))
    ckpt._saves.close()  # its thread would hold on to it for two seconds
    thread = ckpt._saves.queue._thread
    del ckpt
    if thread is not None:
        thread.join()
    gc.collect()
    assert area() is None
    assert not list(tmp_path.glob(".flaxckpt-*-*"))


FORKING = """
    import os, signal, sys, threading, absl.logging
    absl.logging.set_verbosity("fatal")
    import numpy as np, flaxckpt
    ckpt = flaxckpt.ModelCheckpoint(sys.argv[1] + "/{epoch}", save_on_preemption=True)
    ckpt.save({"w": np.zeros(1)}, epoch=0)
    child = os.fork()
    if not child:
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        try:
            ckpt.save({"w": np.zeros(1)}, epoch=1)
        except flaxckpt.CheckpointLockedError:
            threading._shutdown()  # as at the end of multiprocessing's
            os._exit(7)
        os._exit(8)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    ckpt.save({"w": np.zeros(1)}, epoch=2)
    ckpt.close()
    print(status, sorted(os.listdir(sys.argv[1])))
"""


def test_a_forked_process_has_no_part_in_it(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(FORKING), tmp_path],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "XLA_FLAGS": ""},
    )
    assert done.stdout == "7 ['1', '3']\n", done.stderr


def test_an_opening_that_fails_leaves_no_lock(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    (tmp_path / "x").mkdir()
    ckpt = ModelCheckpoint(tmp_path / "{epoch}")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_commit.DiskArea, "_finish_replacements", interrupted)
        ckpt.save(tree_of(0), 0)
    assert not list(tmp_path.glob(".flaxckpt-*.lock"))
    ckpt.save(tree_of(0), 0)
    ckpt.close()


def test_a_removal_that_does_not_reach_the_disk_is_taken_back(tmp_path, monkeypatch):
    """Else a crash could bring the checkpoint back, half deleted."""
    with ModelCheckpoint(tmp_path / "{epoch}", max_to_keep=1) as ckpt:
        ckpt.save(tree_of(0), 0)
        ckpt.wait()
        with monkeypatch.context() as patch:
            commit = ckpt._series.area.commit

            def fail(_):
                raise OSError(errno.EIO, "injected")

            def commit_then_fail(*args):
                commit(*args)
                patch.setattr(ckpt._series.area, "_sync_directory", fail)

            patch.setattr(ckpt._series.area, "commit", commit_then_fail)
            ckpt.save(tree_of(1), 1)
            with pytest.raises(flaxckpt.CheckpointError, match="injected"):
                ckpt.wait()
        for epoch, info in enumerate(flaxckpt.list_checkpoints(tmp_path)):
            assert (flaxckpt.load(info.path)["w"] == epoch).all()
        assert epoch == 1
        ckpt.save(tree_of(2), 2)
        ckpt.wait()
        assert [info.path.name for info in ckpt.checkpoints] == ["3"]
    assert os.listdir(tmp_path) == ["3"]


# ---- what was being replaced, by renames, when its writer was killed ---------------------


def in_the_way(path, what):
    """Put something where a checkpoint was that is set aside."""
    match what:
        case "file":
            path.write_text("mine")
        case "link":
            path.symlink_to(path.parent / "nowhere")
        case _:
            path.mkdir()
            if what == "directory":
                (path / "mine").write_text("mine")


@pytest.mark.parametrize("what", ["empty", "directory", "file", "link", "orbax"])
def test_what_is_no_checkpoint_does_not_replace_one(tmp_path, what):
    """As a script's `os.makedirs` beside the only copy."""
    path, aside = tmp_path / "best", tmp_path / ".flaxckpt-replaced-best"
    ckpt = ModelCheckpoint(path)
    with ckpt:
        ckpt.save({"w": np.full(3, 7.0)}, 7)
    path.rename(aside)
    if what == "orbax":
        ocp.save(path, {"w": np.zeros(3)})
    else:
        in_the_way(path, what)

    def look():
        assert ModelCheckpoint(path).restore().epoch == 7
        assert ModelCheckpoint(path).latest.epoch == 7
        (info,) = flaxckpt.list_checkpoints(tmp_path)
        assert info.path == path
        for each in (path, info):
            assert (flaxckpt.load(each)["w"] == 7).all()
        flaxckpt.verify(path)

    if what == "orbax":  # is the one that is at the path
        assert (flaxckpt.load(path)["w"] == 0).all()
    else:
        look()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ckpt = ModelCheckpoint(path)
        if what == "empty":
            ckpt._series.area.open()
            assert not aside.exists()
            look()
            with ckpt:
                ckpt.save({"w": np.zeros(3)}, 8)
            assert ckpt.latest.epoch == 8
            assert not told
            return
        with pytest.raises(flaxckpt.CheckpointPathError):
            ckpt.save({"w": np.zeros(3)}, 8)
        ckpt._series.area.open()
        ckpt.close()
    (said,) = {str(each.message) for each in told}
    assert "is left as it is" in said
    assert "Move it away" in said
    assert aside.exists()
    if what == "orbax":
        shutil.rmtree(path)
    elif what == "directory":
        assert (path / "mine").read_text() == "mine"
        look()
        shutil.rmtree(path)
    else:
        look()
        path.unlink()
    ModelCheckpoint(path)._series.area.open()
    look()
    assert not aside.exists()


def test_retention_deletes_no_more_than_what_was_set_aside(tmp_path):
    path, aside = tmp_path / "1", tmp_path / ".flaxckpt-replaced-1"
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        ckpt.save({"w": np.zeros(3)}, 0)
    path.rename(aside)
    in_the_way(path, "directory")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with ModelCheckpoint(tmp_path / "{epoch}", max_to_keep=1) as ckpt:
            assert ckpt.latest.epoch == 0
            ckpt.save({"w": np.zeros(3)}, 1)
        assert [info.path.name for info in ckpt.checkpoints] == ["2"]
    assert not aside.exists()
    assert (path / "mine").read_text() == "mine"


@pytest.mark.parametrize("of", ["another series", "damaged"])
def test_what_was_set_aside_stays_beside_what_is_not_its_successor(tmp_path, of):
    aside, shown = tmp_path / ".flaxckpt-replaced-1", tmp_path / "1"
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        ckpt.save({"w": np.zeros(3)}, 0)
    shown.rename(aside)
    other = "{epoch:d}" if of == "another series" else "{epoch}"
    with ModelCheckpoint(tmp_path / "other" / other) as ckpt:
        ckpt.save({"w": np.ones(3)}, 0)
    (tmp_path / "other/1").rename(shown)
    if of == "damaged":
        (shown / "flaxckpt.json").write_text("{")
    with pytest.warns(UserWarning, match="is left as it is"):
        with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
            ckpt.save({"w": np.zeros(3)}, 1)
    assert (aside / "flaxckpt.json").exists()
