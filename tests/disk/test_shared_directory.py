"""Directories in which others may write: the lock, permissions, what lies about."""

import hashlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest

import flaxckpt
from flaxckpt import (
    CheckpointError,
    CheckpointLockedError,
    CheckpointPathError,
    ModelCheckpoint,
)
from flaxckpt._disk.lock import FileLock

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="plays several users")
HERE = socket.gethostname()
ALICE, BOB, GROUP = 4101, 4102, 4100


def tree_of(epoch):
    return {"w": np.full(1000, epoch), "n": epoch}


# Reads a line of JSON, [code, arguments], runs it, and answers with [output, error]. All
# that is to be imported is, before the user is another one: who may not read it.
SERVE = """
import contextlib, io, json, os, sys, tempfile, traceback, warnings
import absl.logging
absl.logging.set_verbosity("fatal")
import numpy as np
import flaxckpt
from flaxckpt._disk.lock import FileLock
lock = FileLock()
uid, umask, saves = map(int, sys.argv[1:])
tree = {"w": np.ones(3), "n": 1, "s": "text"}
if saves:
  with tempfile.TemporaryDirectory() as here:
    with flaxckpt.ModelCheckpoint(here + "/{epoch}", compress=True) as ckpt:
        path = ckpt.save(tree, 0)
        ckpt.wait()
        ckpt.restore(tree, which=path)
    with flaxckpt.ModelCheckpoint(here + "/x") as ckpt:
        path = ckpt.save(tree, 0)
    flaxckpt.verify(path)
if os.geteuid() == 0:
    os.setgroups([4100])
    os.setgid(4100)
    os.setuid(uid)
os.umask(umask)
for line in sys.stdin:
    code, args = json.loads(line)
    said, failed = io.StringIO(), ""
    with contextlib.redirect_stdout(said):
        try:
            exec(code, {**globals(), "args": args})
        except BaseException:
            failed = traceback.format_exc()
    print(json.dumps([said.getvalue(), failed]), flush=True)
"""


class User:
    """A process of a user of the group, if this one may be another; else of oneself."""

    def __init__(self, uid, umask=0o022, *, saves=True):
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(uid), str(umask), str(int(saves))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "XLA_FLAGS": ""},
        )
        self.pid = self.process.pid

    def run(self, code, *args):
        """Run code there, and return what it prints."""
        request = json.dumps([textwrap.dedent(code), list(map(str, args))])
        print(request, file=self.process.stdin, flush=True)
        said, failed = json.loads(self.process.stdout.readline())
        assert not failed, failed
        return said

    def kill(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def bob():
    user = User(BOB)
    yield user
    user.kill()


@pytest.fixture
def shared():
    """A directory that a group shares: what is made in it belongs to the group."""
    directory = Path(tempfile.mkdtemp(prefix="flaxckpt-shared-", dir="/tmp"))
    if os.geteuid() == 0:
        os.chown(directory, -1, GROUP)
    directory.chmod(0o2770)
    yield directory
    shutil.rmtree(directory)


# ---- the lock ----------------------------------------------------------------------------

SAVE = """
try:
    with flaxckpt.ModelCheckpoint(args[0] + "/{epoch}") as ckpt:
        ckpt.save({"w": np.ones(3)}, epoch=int(args[1]))
except flaxckpt.CheckpointLockedError as error:
    print(error.pid)
else:
    print(*sorted(os.listdir(args[0])))
"""


@needs_root
@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_another_user_goes_on_after_a_kill(shared, bob, umask):
    """While its owner lives the lock holds, and once it is killed it is free."""
    alice = User(ALICE, umask, saves=False)
    try:
        lock = shared / f".flaxckpt-{hashlib.sha256(b'{epoch}').hexdigest()[:8]}.lock"
        alice.run("from pathlib import Path; lock.acquire(Path(args[0]))", lock)
        assert bob.run(SAVE, shared, 1) == f"{alice.pid}\n"
    finally:
        alice.kill()
    assert lock.stat().st_uid == ALICE
    assert bob.run(SAVE, shared, 1) == "2\n"


@needs_root
def test_a_lock_taken_over_is_the_new_owner_s(shared, bob):
    lock = shared / "x.lock"
    lock.write_text(json.dumps({"host": HERE, "pid": 2**22 + 1}))
    os.chown(lock, ALICE, GROUP)
    lock.chmod(0o644)
    code = """
    from pathlib import Path
    path = Path(args[0])
    lock.acquire(path)
    print(path.stat().st_uid, path.read_text(), sorted(os.listdir(path.parent)))
    """
    owner = json.dumps({"host": HERE, "pid": bob.pid})
    try:
        assert bob.run(code, lock) == f"{BOB} {owner} ['x.lock']\n"
        with pytest.raises(CheckpointLockedError, match=f"process {bob.pid} on"):
            FileLock().acquire(lock)
    finally:
        bob.run("from pathlib import Path; lock.release(Path(args[0]))", lock)
    assert not lock.exists()


@needs_root
def test_where_nobody_else_may_replace_the_lock_it_is_held_as_it_is(shared, bob):
    """In a directory with the sticky bit, as /tmp has it."""
    shared.chmod(0o3770)
    lock = shared / "x.lock"
    lock.write_text("{}")
    os.chown(lock, ALICE, GROUP)
    os.chown(shared, ALICE, GROUP)
    code = """
    from pathlib import Path
    lock.acquire(Path(args[0]))
    print(sorted(os.listdir(Path(args[0]).parent)), flush=True)
    """
    try:
        assert bob.run(code, lock) == "['x.lock']\n"
        with pytest.raises(CheckpointLockedError):
            FileLock().acquire(lock)
    finally:
        bob.run("from pathlib import Path; lock.release(Path(args[0]))", lock)
    assert lock.read_text() == "{}"


def precious(tmp_path):
    file = tmp_path / "precious"
    file.write_text("a thesis")
    return file


def make(kind, path, tmp_path):
    """Put something in the place of a file."""
    match kind:
        case "link":
            path.symlink_to(precious(tmp_path))
        case "link to nothing":
            path.symlink_to(tmp_path / "nothing")
        case "hard link":
            os.link(precious(tmp_path), path)
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "socket":
            made = socket.socket(socket.AF_UNIX)
            here = os.getcwd()
            os.chdir(path.parent)  # the names of sockets are short
            try:
                made.bind(path.name)
            finally:
                os.chdir(here)
                made.close()
        case "device":
            if os.geteuid() != 0:
                pytest.skip("only root makes devices")
            os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero
        case "loop":
            path.symlink_to(path)


KINDS = ("link", "link to nothing", "hard link", "fifo", "directory", "socket",
         "device", "loop")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_lock_is_not_touched(tmp_path, kind):
    runs = tmp_path / "runs"
    with ModelCheckpoint(runs / "{epoch}") as ckpt:
        ckpt.save(tree_of(0), 0)
        ckpt.wait()
        (lock,) = runs.glob("*.lock")
    make(kind, lock, tmp_path)
    ckpt = ModelCheckpoint(runs / "{epoch}")
    with pytest.raises(CheckpointPathError, match=r"\.lock' is .*Remove it"):
        ckpt.save(tree_of(1), 1)
    assert os.path.lexists(lock)
    assert not (tmp_path / "nothing").exists()
    if kind in ("link", "hard link"):
        assert (tmp_path / "precious").read_text() == "a thesis"
    shutil.rmtree(lock) if kind == "directory" else lock.unlink()
    ckpt.save(tree_of(1), 1)  # and then it goes on
    ckpt.close()
    assert sorted(os.listdir(runs)) == ["1", "2"]
    if kind in ("link", "hard link"):
        assert (tmp_path / "precious").read_text() == "a thesis"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"\xef\xbb\xbf{}",
        b"null",
        b"[1, 2]",
        b'"text"',
        b"[" * 4000,
        *(
            json.dumps({"host": HERE, "pid": pid}).encode()
            for pid in (10**30, -1, 0, -(2**63), 2**31, 1.5, "7", None, [7], True)
        ),
        b'{"host": "%s", "pid": NaN}' % HERE.encode(),
        b'{"host": "%s", "pid": 1e999}' % HERE.encode(),
        b'{"host": "%s", "pid": %s}' % (HERE.encode(), b"9" * 3000),
        json.dumps({"host": 7, "pid": 7}).encode(),
        json.dumps({"host": {"a": 1}, "pid": 7}).encode(),
        json.dumps({"host": "x" * 300, "pid": 7}).encode(),
        json.dumps({"host": "\x1b[2J", "pid": 7}).encode(),
        json.dumps({"pid": 7}).encode(),
    ],
)
def test_an_absurd_lock_is_that_of_nobody_known(tmp_path, content):
    path, lock = tmp_path / "x.lock", FileLock()
    path.write_bytes(content)
    assert lock.acquire(path)
    lock.release(path)
    assert not path.exists()
    # And while another process holds it, that is an error like any other.
    path.write_bytes(content)
    holder = subprocess.Popen(
        ["flock", str(path), "-c", "echo held; read x"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(CheckpointLockedError, match="by another process"):
            lock.acquire(path)
    finally:
        holder.communicate()
    assert path.read_bytes() == content


def test_a_lock_that_is_replaced_while_it_is_held_is_left_alone(tmp_path):
    path, lock = tmp_path / "x.lock", FileLock()
    lock.acquire(path)
    path.unlink()
    path.write_text("somebody else's")
    lock.release(path)
    assert path.read_text() == "somebody else's"


@needs_root
def test_a_lock_that_its_own_user_cannot_write_is_replaced(shared, bob):
    said = bob.run(
        """
        from pathlib import Path
        path = Path(args[0])
        path.write_text("{}")
        path.chmod(0o444)
        lock.acquire(path)
        print(path.read_text())
        lock.release(path)
        """,
        shared / "x.lock",
    )
    assert json.loads(said)["pid"] == bob.pid
    assert not os.listdir(shared)


BEST = """
ckpt = flaxckpt.ModelCheckpoint(args[0], "loss", mode="min", save_best_only=True)
try:
    ckpt.update(ckpt.init(), {"w": np.ones(3)}, {"loss": float(args[1])}, epoch=0)
    ckpt.wait()
    print("saved")
except flaxckpt.CheckpointLockedError as error:
    print(error.pid)
if "close" in args:
    ckpt.close()
lock.kept = ckpt
"""


def best_only(path):
    return ModelCheckpoint(path, "loss", mode="min", save_best_only=True)


def improve(ckpt, loss, state=None):
    state = ckpt.init() if state is None else state
    state = ckpt.update(state, tree_of(0), {"loss": loss}, epoch=0)
    ckpt.wait()
    queue = ckpt._saves.queue
    with queue._changed:  # what is deleted after `wait` has returned
        queue._changed.wait_for(lambda: not queue._is_busy)
    return state


@pytest.fixture
def other():
    user = User(0, saves=False)
    yield user
    user.kill()


def test_a_run_that_is_deleted_is_begun_anew(tmp_path):
    """By the object that wrote it, at its next save, and under a lock of its own."""
    path = tmp_path / "runs/best"
    with best_only(path) as ckpt:
        state = improve(ckpt, 0.5)
        for loss in (0.4, 0.3):
            shutil.rmtree(tmp_path / "runs")
            state = improve(ckpt, loss, state)
            assert flaxckpt.list_checkpoints(path)[0].logs["loss"] == loss
            (lock,) = (tmp_path / "runs").glob(".flaxckpt-*.lock")
            assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path / "runs") == ["best"]


def test_a_run_that_is_deleted_has_one_writer(tmp_path, other):
    path = tmp_path / "runs/best"
    with best_only(path) as one, best_only(path) as two:
        state = improve(one, 0.5)
        shutil.rmtree(tmp_path / "runs")
        improve(two, 0.45)
        assert int(other.run(BEST, path, 0.1)) == os.getpid()
        improve(one, 0.4, state)
        assert int(other.run(BEST, path, 0.1)) == os.getpid()
        assert flaxckpt.list_checkpoints(path)[0].logs["loss"] == 0.4


def test_who_finds_another_writer_in_a_run_that_was_deleted_is_told(tmp_path, other):
    path = tmp_path / "runs/best"
    with best_only(path) as ckpt:
        state = improve(ckpt, 0.5)
        shutil.rmtree(tmp_path / "runs")
        assert other.run(BEST, path, 0.1).strip() == "saved"
        with pytest.raises(CheckpointLockedError, match=f"by process {other.pid}"):
            improve(ckpt, 0.4, state)
        other.run("lock.kept.close()")
        improve(ckpt, 0.4, state)
        assert flaxckpt.list_checkpoints(path)[0].logs["loss"] == 0.1


def test_what_another_process_saved_meanwhile_is_not_replaced(tmp_path, other):
    """It has come and gone, and this process has another object that took the lock."""
    path = tmp_path / "runs/best"
    with best_only(path) as one, best_only(path) as two:
        state = improve(one, 0.5)
        shutil.rmtree(tmp_path / "runs")
        assert other.run(BEST, path, 0.1, "close").strip() == "saved"
        with pytest.warns(UserWarning, match="an earlier run with loss 0.1"):
            improve(two, 0.45)
        improve(one, 0.4, state)
        assert flaxckpt.list_checkpoints(path)[0].logs["loss"] == 0.1


def test_a_lock_that_is_deleted_during_a_save_ends_that_save(tmp_path, monkeypatch):
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        ckpt.save(tree_of(0), 0)
        ckpt.wait()
        area = ckpt._series.area
        commit = area.commit
        with monkeypatch.context() as patch:

            def deleted(*args):
                area.claim._path.unlink()
                commit(*args)

            patch.setattr(area, "commit", deleted)
            ckpt.save(tree_of(1), 1)
            with pytest.raises(flaxckpt.CheckpointWriteError, match="lock of these"):
                ckpt.wait()
        ckpt.save(tree_of(2), 2)
        ckpt.wait()
        assert [info.epoch for info in ckpt.checkpoints] == [0, 2]
    assert sorted(os.listdir(tmp_path)) == ["1", "3"]


def test_a_directory_has_one_lock_whatever_it_is_called(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "link").symlink_to("runs")
    with (
        ModelCheckpoint(tmp_path / "runs/{epoch}") as one,
        ModelCheckpoint(tmp_path / "link/{epoch}", max_to_keep=2) as other,
    ):
        for epoch in range(6):
            ckpt = (one, other)[epoch % 2]
            ckpt.save(tree_of(epoch), epoch)
            ckpt.wait()
        assert [info.epoch for info in one.checkpoints] == [4, 5]
    assert sorted(os.listdir(tmp_path / "runs")) == ["5", "6"]


@pytest.mark.parametrize("back", ["link", "directory"])
def test_a_link_that_leads_elsewhere_by_now_has_the_lock_of_there(tmp_path, back):
    runs = tmp_path / "runs"
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    runs.symlink_to("one")
    with ModelCheckpoint(runs / "{epoch}") as ckpt:
        ckpt.save(tree_of(0), 0)
        ckpt.wait()
        runs.unlink()
        if back == "link":
            runs.symlink_to("two")
        ckpt.save(tree_of(1), 1)
        ckpt.wait()
        assert len(list(runs.glob(".flaxckpt-*.lock"))) == 1
        assert not list((tmp_path / "one").glob(".flaxckpt-*.lock"))
    assert os.listdir(runs) == ["2"]
    assert "1" in os.listdir(tmp_path / "one")


# ---- what is written over ----------------------------------------------------------------

OVER = """
from pathlib import Path
path = Path(args[0], "best")
with flaxckpt.ModelCheckpoint(path) as ckpt:
    for epoch in range(6):
        ckpt.save({"w": np.full(2**19, epoch, np.float32)}, epoch)
        ckpt.wait()
        assert (flaxckpt.load(path)["w"] == epoch).all()
        if epoch == 3:
            for each in list(path.rglob("*")):
                if each.is_file():
                    each.chmod(0o444)
                elif args[1] == "all":
                    each.chmod(0o555)
print(*os.listdir(args[0]))
for each in Path(args[0]).rglob("*"):
    if each.is_dir():
        each.chmod(0o755)
"""


@needs_root
@pytest.mark.parametrize("what", ["files", "all"])
def test_what_this_user_cannot_write_is_made_anew(shared, bob, what):
    """Files are replaced; an old directory that cannot be changed is given up."""
    left = bob.run(OVER, shared, what).split()
    assert "best" in left
    assert what == "all" or left == ["best"]


# ---- permissions -------------------------------------------------------------------------

LOOK = """
from pathlib import Path
def tell(of):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            found = of()
        except flaxckpt.CheckpointError as error:
            found = error
    lines = [str(w.message) for w in told]
    kind = type(found).__name__
    if isinstance(found, flaxckpt.CheckpointError):
        lines.append(str(found))
    print(kind, "|", getattr(found, "epoch", None), "|", *lines)
root = Path(args[0])
newest = root / "3"
ckpt = flaxckpt.ModelCheckpoint(root / "{epoch}", "loss", mode="min")
tell(lambda: flaxckpt.load(newest))
tell(lambda: flaxckpt.load_weights(newest))
tell(lambda: flaxckpt.verify(newest))
tell(lambda: ckpt.restore(which=newest))
tell(lambda: ckpt.restore())
tell(lambda: ckpt.restore(which="best"))
tell(lambda: len(flaxckpt.list_checkpoints(root)))
"""


def readable(directory):
    for path, _, files in os.walk(directory):
        os.chmod(path, 0o755)
        for name in files:
            os.chmod(Path(path, name), 0o644)


def data_of(path):
    return max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)  # fmt: skip


@pytest.fixture
def three(shared):
    with ModelCheckpoint(shared / "{epoch}", "loss", mode="min") as ckpt:
        for epoch in range(3):
            ckpt.save(tree_of(epoch), epoch, logs={"loss": 1.0 - epoch / 10})
            ckpt.wait()
    readable(shared)
    shared.chmod(0o755)
    yield shared
    readable(shared)


@pytest.mark.parametrize(
    "denied", ["", "flaxckpt.json", "flaxckpt_leaves.json", "state", "data",
               "state/manifest.ocdbt"]
)  # fmt: skip
def test_no_permission_is_no_damage(three, bob, denied):
    newest = three / "3"
    what = data_of(newest / "state") if denied == "data" else newest / denied
    what.chmod(0)
    lines = bob.run(LOOK, three).splitlines()
    listing = lines.pop()
    assert len(lines) == 6
    for line in lines:
        assert line.startswith("CheckpointPathError"), line
        assert "cannot be read: Permission denied" in line
        assert "PASSED OVER" not in line
        assert "damaged" not in line
        assert "Load another one" not in line
    is_listed = denied not in ("", "flaxckpt.json")
    assert ("cannot be read: Permission denied" in listing) != is_listed
    what.chmod(0o755)
    assert " | 2 |" in bob.run(LOOK, three).splitlines()[4]


def test_somebody_else_s_directory_is_in_nobody_s_way(three, bob):
    """`lost+found`, say: it is named, and left alone."""
    (three / "lost+found").mkdir(mode=0)
    code = """
    root = args[0]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        print(len(flaxckpt.list_checkpoints(root)), len(told), told[0].message)
        try:
            flaxckpt.load(root + "/nothing")
        except flaxckpt.CheckpointNotFoundError as error:
            print(*error.found)
        ckpt = flaxckpt.ModelCheckpoint(root + "/{epoch}")
        print(ckpt.restore().epoch)
        print(len(ckpt.checkpoints))
        ckpt = flaxckpt.ModelCheckpoint(root + "/new-{epoch}/{loss}")
        print(ckpt.restore())
    """
    lines = bob.run(code, three).splitlines()
    assert lines[0].startswith("3 1 Left out of the listing: ")
    assert "lost+found" in lines[0]
    assert "cannot be read: Permission denied" in lines[0]
    assert lines[1:] == ["1 2 3", "2", "3", "None"]


def test_what_cannot_be_listed_is_said(three, bob):
    for mode in (0o000, 0o300, 0o400):
        three.chmod(mode)
        code = """
        for of in (flaxckpt.list_checkpoints, flaxckpt.load, flaxckpt.verify,
                   lambda path: flaxckpt.ModelCheckpoint(path + "/{epoch}").restore()):
            try:
                of(args[0])
            except flaxckpt.CheckpointError as error:
                print(type(error).__name__)
        """
        found = bob.run(code, three).split()
        assert "CheckpointCorruptError" not in found
        assert found[0] == found[-1] == "CheckpointPathError"
    three.chmod(0o755)


# ---- what lies about ---------------------------------------------------------------------


def deep(path):
    """Make directories more deeply nested than a path can name, or Python recurse."""
    here = os.open(path, os.O_RDONLY)
    for _ in range(1100):
        os.mkdir("abc", dir_fd=here)
        below = os.open("abc", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


def clutter(root):
    """Put into a directory what there may be, of others or by accident."""
    (root / "loop").symlink_to(root / "loop")
    (root / "one").symlink_to(root / "other")
    (root / "other").symlink_to(root / "one")
    (root / "self").symlink_to(root)
    (root / "nothing").symlink_to(root / "nowhere")
    os.mkfifo(root / "fifo")
    os.mkdir(os.fsencode(root) + b"/caf\xe9")
    (Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9")) / "x").write_text("x")
    (root / ("n" * 255)).mkdir()
    (root / ".hidden").mkdir()
    (root / ".flaxckpt-replaced-").mkdir()
    (root / ".flaxckpt-replaced-file").write_text("x")
    os.mkfifo(root / ".flaxckpt-replaced-fifo")
    (root / ".flaxckpt-replaced-loop2").symlink_to(root / ".flaxckpt-replaced-loop2")
    for name in ("with-fifos", ".flaxckpt-replaced-with-fifos"):
        (root / name).mkdir()
        for file in ("flaxckpt.json", "flaxckpt_leaves.json", "_CHECKPOINT_METADATA"):
            os.mkfifo(root / name / file)


@pytest.mark.parametrize("template", ["{epoch}", "run{epoch}/{loss}"])
def test_what_lies_beside_checkpoints_stops_nothing(tmp_path, template):
    root = tmp_path / "runs"
    root.mkdir()
    clutter(root)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for epoch in range(2):
            with ModelCheckpoint(root / template, "loss", mode="min") as ckpt:
                found = ckpt.restore() if epoch else None
                assert epoch == 0 or found.epoch == epoch - 1
                ckpt.save(tree_of(epoch), epoch, logs={"loss": -epoch})
                ckpt.wait()
                assert len(ckpt.checkpoints) == epoch + 1
        assert len(flaxckpt.list_checkpoints(root)) == 2
    with pytest.raises(flaxckpt.CheckpointNotFoundError):
        flaxckpt.load(root)
    for name in ("with-fifos", "fifo", "loop", "self", ".flaxckpt-replaced-fifo"):
        with pytest.raises(CheckpointError):
            flaxckpt.load(root / name)


@pytest.mark.parametrize("to", ["7", "8", "7/x"])
def test_a_link_in_a_circle_by_the_name_of_a_checkpoint_is_a_damaged_one(tmp_path, to):
    """The good ones beside it are taken; a link of another name says nothing."""
    root = tmp_path / "runs"
    root.mkdir()
    (root / "x").symlink_to(root / "x")
    with ModelCheckpoint(root / "{epoch}") as ckpt:
        with pytest.warns(UserWarning, match="Left out: .*x' cannot be read"):
            assert ckpt.restore() is None
        (root / "7").symlink_to(root / to)
        (root / "8").symlink_to(root / "7")
        with pytest.raises(flaxckpt.CheckpointCorruptError, match="7' is damaged: can"):
            ckpt.restore()
        ckpt.save(tree_of(0), 0)
        ckpt.wait()
        (root / "x").unlink()
        with pytest.warns(UserWarning, match="PASSED OVER: .*[78]' is damaged: cannot"):
            assert ckpt.restore().epoch == 0


@pytest.mark.parametrize("number", [0, 1])
def test_a_listing_ends_however_deep_it_goes(tmp_path, number):
    if number:
        with ModelCheckpoint(tmp_path / "x") as ckpt:
            ckpt.save(tree_of(0), 0)
    (tmp_path / "deep").mkdir()
    try:
        deep(tmp_path / "deep")
        with pytest.warns(UserWarning, match="File name too long"):
            assert len(flaxckpt.list_checkpoints(tmp_path)) == number
    finally:
        subprocess.run(["rm", "-rf", str(tmp_path / "deep")], check=True)


@pytest.mark.parametrize("damage", ["record", "table", "fifo", "empty"])
@pytest.mark.parametrize("of", ["own", "another"])
def test_a_damaged_checkpoint_set_aside_stops_nothing(tmp_path, damage, of):
    name = "best" if of == "own" else "other"
    with ModelCheckpoint(tmp_path / name) as ckpt:
        path = ckpt.save(tree_of(0), 0)
    aside = tmp_path / f".flaxckpt-replaced-{name}"
    path.rename(aside)
    match damage:
        case "record":
            (aside / "flaxckpt.json").write_text("{")
        case "table":
            (aside / "flaxckpt_leaves.json").write_text("{")
        case "fifo":
            (aside / "flaxckpt.json").unlink()
            os.mkfifo(aside / "flaxckpt.json")
        case _:
            shutil.rmtree(aside)
            aside.mkdir()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with ModelCheckpoint(tmp_path / "best") as ckpt:
            ckpt.save(tree_of(1), 1)
            ckpt.wait()
            assert ckpt.restore().epoch == 1
        if damage in ("record", "fifo"):
            assert any("is left as it is" in str(w.message) for w in told)
            assert aside.exists()
        assert [info.epoch for info in ckpt.checkpoints][-1:] == [1]


def test_a_checkpoint_may_be_a_link(tmp_path):
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        for epoch in range(2):
            path = ckpt.save(tree_of(epoch), epoch)
            ckpt.wait()
    latest = tmp_path / "latest"
    latest.symlink_to(path.name)
    flaxckpt.verify(latest)
    assert flaxckpt.load(latest)["n"] == 1
    assert flaxckpt.load_weights(latest)["n"] == 1
    assert ckpt.restore(which=latest).epoch == 1
    assert ckpt.restore().epoch == 1


def test_a_checkpoint_of_links_is_read(tmp_path):
    """As caches of downloads have them: each file is a link to one somewhere else."""
    with ModelCheckpoint(tmp_path / "x") as ckpt:
        for epoch in range(2):
            path = ckpt.save({**tree_of(epoch), "s": "text"}, epoch)
            ckpt.wait()
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate([p for p in path.rglob("*") if p.is_file()]):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    flaxckpt.verify(path)
    assert flaxckpt.load(path)["n"] == 1


def test_it_runs_from_a_source_tree(shared, bob):
    code = """
    from unittest import mock
    import importlib.metadata as metadata
    def version(name):
        raise metadata.PackageNotFoundError(name)
    flaxckpt._checkpoints.finish.versions.cache_clear()
    with mock.patch.object(metadata, "version", version):
        with flaxckpt.ModelCheckpoint(args[0] + "/x") as ckpt:
            path = ckpt.save({"w": np.ones(3)}, 0)
    flaxckpt._checkpoints.finish.versions.cache_clear()
    print(flaxckpt.load(path)["w"].sum())
    """
    assert bob.run(code, shared) == "3.0\n"
    record = json.loads((shared / "x/flaxckpt.json").read_text())
    assert record["versions"]["flaxckpt"] == "unknown"


# ---- the slot ----------------------------------------------------------------------------


@needs_root
def test_a_private_slot_of_somebody_else_stops_nothing(shared, bob):
    (shared / "last").mkdir(mode=0o700)
    for first in (0, 2):
        bob.run(
            """
            with flaxckpt.ModelCheckpoint(
                args[0] + "/best", "loss", save_best_only=True, save_last=True
            ) as ckpt:
                found = ckpt.restore()
                state = ckpt.init() if found is None else found.state
                first = 0 if found is None else found.epoch + 1
                assert first == int(args[1]), first
                for epoch in range(first, first + 2):
                    tree = {"w": np.full(3, float(epoch))}
                    state = ckpt.update(state, tree, {"loss": 0.5 + epoch}, epoch)
            assert ckpt.latest.epoch == first + 1, ckpt.latest
            """,
            shared,
            first,
        )
