"""Who reads beside a writer that deletes and replaces never sees nothing, or damage."""

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest

import flaxckpt
from flaxckpt import ModelCheckpoint, _restoring
from flaxckpt._checkpoints import load as _load
from flaxckpt._checkpoints import undisturbed as _undisturbed
from flaxckpt._disk import exchange as _exchange
from flaxckpt._disk import listing as _listing
from flaxckpt._disk import record as _record
from flaxckpt._object_store import objects as _objects
from flaxckpt._object_store import pointer as _pointer
from flaxckpt._runtime import patience as _patience

FULL = os.environ.get("FLAXCKPT_FAULTS") == "full"
ROUNDS = 400 if FULL else 40


def tree_of(epoch):
    return {"w": np.full(300, epoch), "epoch": epoch}


# ---- real processes ----------------------------------------------------------------------

# Each saves as fast as it can until its input ends, after it has said that one is there.
WRITER = """
    import select, sys
    import numpy as np
    import flaxckpt
    from flaxckpt._disk import exchange as _exchange

    directory, filepath, exchange, settings = sys.argv[1:]
    if exchange == "renames":
        _exchange._exchange = lambda one, other: False
    settings = eval(settings)
    with flaxckpt.ModelCheckpoint(f"{directory}/{filepath}", "loss", **settings) as ckpt:
        state = ckpt.init()
        for epoch in range(10**9):
            # Better at each third epoch: the state moves between the slot and the best.
            loss = 1 / (epoch + 1) if epoch % 3 == 0 else 1e9
            tree = {"w": np.full(300, epoch), "epoch": epoch}
            state = ckpt.update(state, tree, {"loss": loss}, epoch)
            ckpt.wait()
            if epoch == 0:
                print("there", flush=True)
            if select.select([sys.stdin], [], [], 0)[0]:
                break
"""
CASES = {
    "one kept": ("{epoch}", {"max_to_keep": 1}),
    "best and last": ("best", {"save_best_only": True, "save_last": True}),
    "in its place": ("best", {}),
}


@contextlib.contextmanager
def writing(directory, filepath, exchange, settings):
    code = textwrap.dedent(WRITER)
    arguments = [str(directory), filepath, exchange, repr({**settings, "sync": False})]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "XLA_FLAGS": ""},
        text=True,
    )
    try:
        assert process.stdout.readline() == "there\n"
        yield process
        assert process.poll() is None
        process.communicate("end", timeout=60)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("exchange", ["exchange", "renames"])
@pytest.mark.parametrize("case", CASES)
def test_a_reader_beside_a_writer_always_finds_one(tmp_path, case, exchange):
    filepath, settings = CASES[case]
    is_series = filepath == "{epoch}"
    with (
        warnings.catch_warnings(),
        writing(tmp_path, filepath, exchange, settings),
        ModelCheckpoint(tmp_path / filepath, "loss", **settings) as ckpt,
    ):
        warnings.simplefilter("error")
        newest = 0
        for _ in range(ROUNDS):
            found = ckpt.restore()
            assert found.tree["epoch"] == found.epoch
            assert (found.tree["w"] == found.epoch).all()
            # Never older than what was there before.
            assert found.epoch >= newest
            newest = ckpt.latest.epoch
            assert newest >= found.epoch
            best = ckpt.best
            assert best is not None
            assert ckpt.checkpoints
            listed = flaxckpt.list_checkpoints(tmp_path)
            assert max(info.epoch for info in listed) >= newest
            assert ckpt.restore(which="best").epoch >= best.epoch
            if not is_series:
                for read in (flaxckpt.load, flaxckpt.load_weights):
                    tree = read(tmp_path / "best")
                    assert (tree["w"] == tree["epoch"]).all()
                flaxckpt.verify(tmp_path / "best")


def test_the_object_s_own_listing_while_its_thread_deletes(tmp_path):
    with (
        warnings.catch_warnings(),
        ModelCheckpoint(tmp_path / "{epoch}", max_to_keep=1, sync=False) as ckpt,
    ):
        warnings.simplefilter("error")
        ckpt.save(tree_of(0), 0)
        ckpt.wait()
        seen = 0
        for epoch in range(1, 2 * ROUNDS):
            ckpt.save(tree_of(epoch), epoch)
            latest = ckpt.latest
            assert seen <= latest.epoch <= epoch
            seen = latest.epoch
            assert ckpt.checkpoints
            assert flaxckpt.list_checkpoints(tmp_path)


# ---- a writer that strikes at each step of a reader --------------------------------------


class Striking:
    """Calls `strike` before a reader's look at the disk number `at`, counted from 1."""

    def __init__(self, monkeypatch, strike, at):
        self.count, self._at, self._strike = 0, at, strike
        self._is_striking = False
        for module, name in (
            (os, "scandir"),
            (os, "stat"),
            (os, "open"),
            (os.path, "exists"),
            (os.path, "isdir"),
        ):
            monkeypatch.setattr(module, name, self._wrapped(getattr(module, name)))
        import io

        monkeypatch.setattr(io, "open", self._wrapped(io.open))

    def _wrapped(self, look):
        def looking(*args, **kwargs):
            if threading.current_thread() is threading.main_thread():
                self._step()
            return look(*args, **kwargs)

        return looking

    def _step(self):
        if self._is_striking:
            return
        self.count += 1
        if self.count == self._at:
            self._is_striking = True
            self._strike()
            self._is_striking = False


def each_step(monkeypatch, prepare, strike, read, check):
    """Read once for each of a reader's looks, and strike at that one."""
    for at in itertools.count():
        prepare()
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("error")
            striking = Striking(patch, strike, at)
            found = read()
        check(found)
        if at > striking.count:
            break
    assert at > 3
    return at


def next_one(tmp_path, newest):
    """What a writer with `max_to_keep=1` does at its next save."""

    def strike():
        epoch = newest[0]
        shutil.copytree(tmp_path / "kept", tmp_path / ".flaxckpt-x-new")
        (tmp_path / ".flaxckpt-x-new").rename(tmp_path / "runs" / str(epoch + 1))
        (tmp_path / "runs" / str(epoch)).rename(tmp_path / f".flaxckpt-x-{epoch}")
        shutil.rmtree(tmp_path / f".flaxckpt-x-{epoch}")
        newest[0] += 1

    return strike


@pytest.fixture
def kept(tmp_path):
    """A checkpoint to copy, and a series of one checkpoint."""
    with ModelCheckpoint(tmp_path / "runs/{epoch}", "loss") as ckpt:
        path = ckpt.save(tree_of(7), 0, logs={"loss": 0.5})
    shutil.copytree(path, tmp_path / "kept")
    return ckpt


READS = {
    "restore": lambda ckpt, directory: ckpt.restore(),
    "restore the best": lambda ckpt, directory: ckpt.restore(which="best"),
    "latest": lambda ckpt, directory: ckpt.latest,
    "best": lambda ckpt, directory: ckpt.best,
    "checkpoints": lambda ckpt, directory: ckpt.checkpoints[-1],
    "list_checkpoints": lambda ckpt, directory: flaxckpt.list_checkpoints(directory)[
        -1
    ],
}


@pytest.mark.parametrize("read", READS)
def test_what_is_deleted_at_any_step_is_listed_again(tmp_path, kept, monkeypatch, read):
    newest = [1]
    each_step(
        monkeypatch,
        prepare=lambda: None,
        strike=next_one(tmp_path, newest),
        read=lambda: READS[read](kept, tmp_path / "runs"),
        check=lambda found: found.epoch == 0 or pytest.fail(str(found)),
    )
    assert newest[0] > 3


READS_IN_PLACE = {
    **READS,
    "load": lambda ckpt, directory: flaxckpt.load(directory / "best"),
    "load_weights": lambda ckpt, directory: flaxckpt.load_weights(directory / "best"),
    "verify": lambda ckpt, directory: flaxckpt.verify(directory / "best"),
}


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "renames"])
@pytest.mark.parametrize("read", READS_IN_PLACE)
def test_what_is_replaced_at_any_step_is_read_once_more(
    tmp_path, monkeypatch, read, exchange
):
    runs = tmp_path / "runs"
    with ModelCheckpoint(runs / "best", "loss") as ckpt:
        path = ckpt.save(tree_of(7), 0, logs={"loss": 0.5})
    shutil.copytree(path, tmp_path / "kept")
    if not exchange:
        monkeypatch.setattr(_exchange, "_exchange", lambda *_: False)

    def strike():
        staging = runs / ".flaxckpt-x-new"
        staging.mkdir()
        shutil.copytree(tmp_path / "kept", staging / "new")
        _exchange.replace(staging / "new", runs / "best", lambda _: None)
        shutil.rmtree(staging)

    each_step(
        monkeypatch,
        prepare=lambda: None,
        strike=strike,
        read=lambda: READS_IN_PLACE[read](ckpt, runs),
        check=lambda found: (
            read == "verify" or found is not None or pytest.fail(str(found))
        ),
    )


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "renames"])
@pytest.mark.parametrize("read", READS_IN_PLACE)
def test_a_save_by_hand_and_a_better_one_change_places_at_any_step(
    tmp_path, monkeypatch, read, exchange
):
    runs = tmp_path / "runs"
    with ModelCheckpoint(runs / "best", "loss", save_best_only=True) as ckpt:
        state = ckpt.init()
        for epoch, loss in enumerate((0.5, 0.9)):
            state = ckpt.update(state, tree_of(7), {"loss": loss}, epoch, force=True)
    if not exchange:
        monkeypatch.setattr(_exchange, "_exchange", lambda *_: False)

    def strike():
        _exchange.swap(runs / "best.aside", runs / "best", lambda _: None)

    epoch = {"restore": 1, "latest": 1, "restore the best": 0, "best": 0}.get(read)

    def check(found):
        listed = {info.epoch for info in flaxckpt.list_checkpoints(runs)}
        assert listed == {0, 1}
        if read in ("checkpoints", "list_checkpoints"):
            assert found.epoch == 1  # the newest
        elif epoch is not None:
            assert found.epoch == epoch

    each_step(
        monkeypatch,
        prepare=lambda: None,
        strike=strike,
        read=lambda: READS_IN_PLACE[read](ckpt, runs),
        check=check,
    )


@pytest.mark.parametrize("step", ["set aside", "replaced"])
def test_between_two_renames_the_one_set_aside_counts(tmp_path, monkeypatch, step):
    """The reader's look falls between the writer's renames, at any of its steps."""
    runs = tmp_path / "runs"
    with ModelCheckpoint(runs / "best", "loss") as ckpt:
        path = ckpt.save(tree_of(7), 0, logs={"loss": 0.5})
    aside = runs / ".flaxckpt-replaced-best"

    def prepare():
        if step == "replaced" and not aside.exists():
            path.rename(aside)
        if step == "set aside" and aside.exists():
            aside.rename(path)

    def strike():
        if step == "set aside":
            path.rename(aside)
        else:
            aside.rename(path)

    for read in ("restore", "latest", "best", "list_checkpoints"):
        each_step(
            monkeypatch,
            prepare,
            strike,
            read=lambda: READS[read](ckpt, runs),  # noqa: B023
            check=lambda found: found.epoch == 0 or pytest.fail(str(found)),
        )


@pytest.mark.parametrize("way", ["into the slot", "out of the slot"])
@pytest.mark.parametrize("read", ["restore", "latest", "list_checkpoints"])
def test_a_state_that_moves_between_slot_and_series_is_not_missed(
    tmp_path, monkeypatch, read, way
):
    runs = tmp_path / "runs"
    settings = {"save_best_only": True, "save_last": True}
    with ModelCheckpoint(runs / "best", "loss", **settings) as ckpt:
        state = ckpt.init()
        for epoch, loss in enumerate((0.5, 0.9, 0.4)):
            state = ckpt.update(state, tree_of(epoch), {"loss": loss}, epoch)
            ckpt.wait()
            hidden = shutil.ignore_patterns(".flaxckpt-*")
            shutil.copytree(runs, tmp_path / f"after {epoch}", ignore=hidden)
    first = 1 if way == "out of the slot" else 0

    def take(name, epoch):
        """Have what was there after an epoch, as a save puts it there."""
        there = tmp_path / f"after {epoch}" / name
        if there.exists():
            shutil.copytree(there, tmp_path / ".flaxckpt-new")
            if (runs / name).exists():
                _exchange._exchange(tmp_path / ".flaxckpt-new", runs / name)
                shutil.rmtree(tmp_path / ".flaxckpt-new")
            else:
                (tmp_path / ".flaxckpt-new").rename(runs / name)
        elif (runs / name).exists():
            (runs / name).rename(tmp_path / ".flaxckpt-old")
            shutil.rmtree(tmp_path / ".flaxckpt-old")

    def prepare():
        take("best", first)
        take("last", first)

    def strike():
        take("best", first + 1)  # what is new is there before the slot is emptied
        take("last", first + 1)

    each_step(
        monkeypatch,
        prepare,
        strike,
        read=lambda: READS[read](ckpt, runs),
        check=lambda found: found.epoch >= first or pytest.fail(f"went back: {found}"),
    )


@pytest.mark.direct
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 0.99])
@pytest.mark.parametrize("first", ["record", "values"])
def test_deleted_by_hand_at_any_step_is_not_damaged(
    tmp_path, monkeypatch, first, share
):
    """File by file, as rm does: a record may go before the table of leaves."""
    with ModelCheckpoint(tmp_path / "{epoch}", "loss") as ckpt:
        for epoch in range(2):
            ckpt.save(tree_of(epoch), epoch, logs={"loss": 0.5 - epoch})
    shutil.copytree(tmp_path / "2", tmp_path / ".kept")
    left = []

    def strike():
        """Delete a share of the files; the others in the reader's pause."""
        files = sorted(p for p in (tmp_path / "2").rglob("*") if p.is_file())
        if first == "values":
            files.reverse()
        left[:] = files
        for path in files[: max(1, int(share * len(files)))]:
            path.unlink()

    def rest():
        if left:
            shutil.rmtree(tmp_path / "2", ignore_errors=True)

    def prepare():
        left.clear()
        shutil.rmtree(tmp_path / "2", ignore_errors=True)
        shutil.copytree(tmp_path / ".kept", tmp_path / "2")

    monkeypatch.setattr(_listing, "pause", rest)
    monkeypatch.setattr(_undisturbed, "pause", rest)
    for read in ("restore", "list_checkpoints", "checkpoints"):
        each_step(
            monkeypatch,
            prepare,
            strike,
            read=lambda: READS[read](ckpt, tmp_path),  # noqa: B023
            check=lambda found: found.epoch in (0, 1) or pytest.fail(str(found)),
        )


# ---- what is damaged, and what is not there ----------------------------------------------


def test_damage_that_stays_is_damage(tmp_path):
    with ModelCheckpoint(tmp_path / "{epoch}", "loss") as ckpt:
        for epoch in range(2):
            ckpt.save(tree_of(epoch), epoch, logs={"loss": 0.5})
    (tmp_path / "2/flaxckpt.json").unlink()
    with pytest.warns(UserWarning, match="its record cannot be read") as caught:
        assert [info.epoch for info in flaxckpt.list_checkpoints(tmp_path)] == [0]
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="PASSED OVER: .*its record cannot be read"):
        assert ckpt.restore().epoch == 0
    with pytest.raises(flaxckpt.CheckpointCorruptError):
        flaxckpt.load(tmp_path / "2")


def test_what_is_replaced_for_ever_is_an_error_and_no_first_run(
    tmp_path, kept, monkeypatch
):
    monkeypatch.setattr(_patience, "SECS", 0)
    newest = [1]
    strike, read = next_one(tmp_path, newest), _record.read_record

    def deleted(path):
        if Path(path).name == str(newest[0]):
            strike()
        return read(path)

    monkeypatch.setattr(_listing, "read_record", deleted)
    for name in ("latest", "checkpoints", "list_checkpoints", "restore"):
        with pytest.raises(flaxckpt.CheckpointError, match="deleted faster than"):
            READS[name](kept, tmp_path / "runs")


def test_loaded_too_late_for_ever_is_an_error_and_no_first_run(
    tmp_path, kept, monkeypatch
):
    monkeypatch.setattr(_patience, "SECS", 0)
    strike, restore = next_one(tmp_path, [1]), _load.restore

    def late(*args, **kwargs):
        strike()
        return restore(*args, **kwargs)

    monkeypatch.setattr(_restoring, "restore", late)
    with pytest.raises(flaxckpt.CheckpointError, match="faster than they could be lo"):
        kept.restore()


def test_a_first_run_is_one(tmp_path):
    ckpt = ModelCheckpoint(tmp_path / "none/{epoch}", "loss")
    assert ckpt.restore() is None
    assert ckpt.latest is None
    assert ckpt.checkpoints == ()
    assert flaxckpt.list_checkpoints(tmp_path) == ()
    (tmp_path / "none/.flaxckpt-replaced-x").mkdir(parents=True)
    (tmp_path / "none/other").mkdir()
    assert ckpt.restore() is None
    assert flaxckpt.list_checkpoints(tmp_path / "none") == ()


# ---- object stores -----------------------------------------------------------------------


def test_in_a_store_what_is_deleted_after_the_listing_is_listed_again(s3, monkeypatch):
    """A pointer goes between the listing of pointers and their reading."""
    url = f"{s3}/{{epoch}}"
    reader = ModelCheckpoint(url, "loss")
    with ModelCheckpoint(url, "loss") as ckpt:
        ckpt.save(tree_of(0), 0, logs={"loss": 0.5})
    newest, strikes, keys_below = [1], [], _objects.Objects.keys_below
    objects = _objects.Objects(s3)

    def next_one():
        """Write the next pointer and delete the one before, as a writer does."""
        before, after = (_pointer.key_of(str(newest[0] + i)) for i in range(2))
        objects.write(after, objects.read(before).content)
        objects.delete(before)
        newest[0] += 1

    def struck(objects, directory):
        keys = keys_below(objects, directory)
        if strikes and directory in ("", _pointer.CURRENT):
            strikes.pop()
            next_one()
        return keys

    monkeypatch.setattr(_objects.Objects, "keys_below", struck)
    for read in READS:
        strikes.append(1)
        found = READS[read](reader, s3)
        assert found.path.name == str(newest[0]), read
        assert not strikes
