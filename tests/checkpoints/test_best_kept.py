"""A worse best does not take the place of a better one, whatever a run knows."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import warnings
from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from multiprocess import pod
from never_ready import take_metrics_for_unknown
from orbax.checkpoint import v1 as ocp

import flaxckpt
from flaxckpt import CheckpointState, ModelCheckpoint, SettingError
from flaxckpt._checkpoints import series_writer as _series_writer
from flaxckpt._checkpoints.aside import choose_place, places_aside
from flaxckpt._disk import disk_area as _commit
from flaxckpt._disk import exchange as _exchange
from flaxckpt._object_store.objects import Objects

FULL = os.environ.get("FLAXCKPT_FAULTS") == "full"
OF_EARLIER = r"a checkpoint of an earlier run with val_loss"


def tree_of(loss):
    return {"w": np.full(3, float(loss))}


def train(path, losses, restore=False, state=None, **settings):
    """Run over epochs whose metric has these values; return what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with ModelCheckpoint(path, save_best_only=True, **settings) as ckpt:
            found = ckpt.restore() if restore else None
            state = found.state if found else state or ckpt.init()
            for epoch, loss in enumerate(losses):
                logs = {"val_loss": loss}
                state = ckpt.update(state, tree_of(loss), logs, epoch)
    return [str(each.message) for each in caught], float(state.best)


def there(directory):
    """What can be loaded from each of the checkpoints in a directory."""
    found = {}
    for info in flaxckpt.list_checkpoints(directory):
        if info.path.name == "last":
            continue
        loaded = float(flaxckpt.load(str(info.path))["w"][0])
        assert loaded == info.logs["val_loss"]
        found[info.path.name] = loaded
    return found


@pytest.fixture
def held(monkeypatch):
    """Have the first write wait, once it has arrived."""
    arrived, go = threading.Event(), threading.Event()
    write = _series_writer.write_checkpoint

    def wait_and_write(*args, **kwargs):
        arrived.set()
        assert go.wait(60)
        return write(*args, **kwargs)

    monkeypatch.setattr(_series_writer, "write_checkpoint", wait_and_write)
    yield arrived, go
    go.set()


def best_of(path, **settings):
    """What there is as the best, in all ways to ask for it."""
    ckpt = ModelCheckpoint(path, save_best_only=True, **settings)
    info, found = ckpt.best, ckpt.restore(which="best")
    assert str(found.path) == str(info.path)
    loaded = float(found.tree["w"][0])
    assert (
        float(flaxckpt.load(str(info.path))["w"][0]) == loaded == info.logs["val_loss"]
    )
    assert float(found.state.best) == np.float32(loaded)
    return loaded


# ---- a path without fields ---------------------------------------------------------------


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("save_last", [False, True])
def test_a_run_that_did_not_restore_replaces_only_what_it_beats(
    tmp_path, weights_only, save_last
):
    path = tmp_path / "best"
    settings = {"save_weights_only": weights_only, "save_last": save_last}
    settings["weights"] = lambda tree: tree
    assert train(path, [0.3, 0.2], **settings)[0] == []
    said, best = train(path, [0.5, 0.4], **settings)
    assert len(said) == 1
    assert f"{OF_EARLIER[:20]}" in said[0]
    where = f"saved aside, at {str(path) + '.aside'!r}, until it is at least as good"
    assert where in said[0]
    assert best == np.float32(0.4)
    assert best_of(path) == 0.2
    assert there(tmp_path) == {"best": 0.2, "best.aside": 0.4}
    assert ModelCheckpoint(path).latest.logs == {"val_loss": 0.4}
    said, _ = train(path, [0.25], **settings)
    assert len(said) == 1
    assert there(tmp_path) == {"best": 0.2, "best.aside": 0.25}
    train(path, [0.1], **settings)
    assert best_of(path) == 0.1
    assert there(tmp_path) == {"best": 0.1}  # and nothing aside


def test_overwrite_replaces_it(tmp_path):
    path = tmp_path / "best"
    train(path, [0.2])
    train(path, [0.5])
    assert there(tmp_path) == {"best": 0.2, "best.aside": 0.5}
    assert train(path, [0.6], overwrite=True)[0] == []
    assert there(tmp_path) == {"best": 0.6}
    for value in (1, "yes", None):
        with pytest.raises(SettingError, match=r"overwrite=.* pass True or False"):
            ModelCheckpoint(path, overwrite=value)


def test_a_run_that_went_back_keeps_the_better_one(tmp_path):
    """As after a kill between two objects' saves: the state is of before the best."""
    path = tmp_path / "best"
    state = CheckpointState.create(save_best_only=True, initial_value_threshold=0.5)
    train(path, [0.4, 0.2], state=state)
    said, _ = train(path, [0.3], state=state)
    assert len(said) == 1
    assert there(tmp_path) == {"best": 0.2, "best.aside": 0.3}
    train(path, [0.2], state=state)  # the very same once more
    assert there(tmp_path) == {"best": 0.2}


@pytest.mark.parametrize("metric", [0.3, 1 / 3, 1e-40, np.float64(0.1), 2**24 + 1])
def test_what_is_equal_as_it_is_compared_is_not_warned_of(tmp_path, metric):
    path = tmp_path / "best"
    train(path, [metric])
    as_float32 = float(np.float32(metric))
    for state in (None, ModelCheckpoint(path, save_best_only=True).restore().state):
        for value in (metric, as_float32, np.nextafter(metric, 0), metric):
            assert train(path, [value], state=state)[0] == []
    assert [*there(tmp_path)] == ["best"]
    with ModelCheckpoint(tmp_path / "{epoch}", max_to_keep=1) as ckpt:
        for epoch, value in enumerate([as_float32, np.nextafter(metric, 0), 1e9]):
            ckpt.save(tree_of(value), epoch, logs={"val_loss": value})
    assert ckpt.best.epoch == 0  # of equals the first, as the decision has it


def test_a_forced_save_goes_aside_and_one_by_hand_makes_way(tmp_path):
    path = tmp_path / "best"
    with ModelCheckpoint(path, save_best_only=True) as ckpt:
        state = ckpt.init()
        state = ckpt.update(state, tree_of(0.2), {"val_loss": 0.2}, 0)
        state = ckpt.update(state, tree_of(0.9), {"val_loss": 0.9}, 1, force=True)
        ckpt.wait()
        assert there(tmp_path) == {"best": 0.2, "best.aside": 0.9}
        assert ckpt.latest.epoch == 1
        ckpt.update(state, {"w": np.ones(3)}, {"val_loss": np.nan}, 2, force=True)
        ckpt.wait()
        assert (ckpt.best.epoch, ckpt.latest.epoch) == (0, 2)
        for epoch, value in enumerate([0.7, 0.8], start=3):
            path_given = ckpt.save(tree_of(value), epoch, logs={"val_loss": value})
            assert path_given == path
            if epoch == 3:
                with pytest.warns(UserWarning, match="which is kept at"):
                    ckpt.wait()
            ckpt.wait()
            (aside,) = there(tmp_path).keys() - {"best"}
            assert there(tmp_path) == {"best": value, aside: 0.2}
            assert ckpt.restore(which=path).epoch == epoch
            assert (ckpt.best.epoch, ckpt.latest.epoch) == (0, epoch)
            assert (flaxckpt.load(ckpt.best)["w"] == 0.2).all()
        ckpt.update(state, tree_of(0.1), {"val_loss": 0.1}, 5)
    assert there(tmp_path) == {"best": 0.1}


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "renames"])
def test_its_path_is_not_missing_while_it_is_written(tmp_path, monkeypatch, exchange):
    """Nor after a kill or an error at any step; and what was better is somewhere."""
    if not exchange:
        monkeypatch.setattr(_exchange, "_exchange", lambda *_: False)
    path, run = tmp_path / "best", {"logs": {"val_loss": 0.7}}
    train(path, [0.2])
    with ModelCheckpoint(path, save_best_only=True) as ckpt:
        series, seen = ckpt._series, []
        area = series.area
        commit, sync = area.commit, area._sync_directory

        def look():
            assert float(flaxckpt.load(path)["w"][0]) in (0.2, 0.7)
            assert 0.2 in there(tmp_path).values()
            seen.append(there(tmp_path))

        def look_and_commit(*arguments, **settings):
            look()
            commit(*arguments, **settings)
            look()

        def look_and_sync(directory):
            if directory == tmp_path:
                look()
            sync(directory)

        area.commit, area._sync_directory = look_and_commit, look_and_sync

        def no_room(*arguments, **settings):
            raise OSError(errno.ENOSPC, "No space left on device")

        def fail(*arguments, **settings):
            raise OSError(errno.EIO, "Input/output error")

        area.commit = no_room
        ckpt.save(tree_of(0.7), 1, **run)
        with pytest.raises(flaxckpt.CheckpointWriteError, match="No earlier"):
            ckpt.wait()
        assert there(tmp_path) == {"best": 0.2}
        area.commit = look_and_commit
        with monkeypatch.context() as patch:
            patch.setattr(_commit, "swap", fail)
            for _ in range(4):  # of which the second one takes a place more
                ckpt.save(tree_of(0.7), 1, **run)
                with pytest.raises(flaxckpt.CheckpointWriteError, match="No earlier"):
                    ckpt.wait()
        found = there(tmp_path)  # as after a kill
        assert found.pop("best") == 0.2
        assert [*found.values()] == [0.7, 0.7]
        assert ckpt.best.logs == {"val_loss": 0.2}
        ckpt.save(tree_of(0.7), 1, **run)
        with pytest.warns(UserWarning, match="which is kept at"):
            ckpt.wait()
        found = there(tmp_path)
        assert found.pop("best") == 0.7
        assert [*found.values()] == [0.2]
        assert len(seen) >= 6
        infos = ckpt._saves._parts.disk._ledger.infos
        assert {str(info.path) for info in infos.values()} == {*infos}
        assert {*infos} == {str(info.path) for info in ckpt.checkpoints}
        assert ckpt._saves._parts.disk.best_value() == np.float32(0.2)
    assert best_of(path) == 0.2
    assert not [each for each in tmp_path.iterdir() if "replaced" in each.name]


@pytest.mark.parametrize("which", ["first", "second", "third"])
def test_one_of_the_renames_fails(tmp_path, monkeypatch, which):
    """Then what is at the path, and the better one, are found all the same."""
    monkeypatch.setattr(_exchange, "_exchange", lambda *_: False)
    path, run = tmp_path / "best", {"logs": {"val_loss": 0.7}}
    train(path, [0.2])
    rename, left = os.rename, [which == "first", which == "second", which == "third"]

    def fail_at_one(*names):
        """Of those in one directory, which is what is there to stay."""
        if all(Path(each).parent == tmp_path for each in names) and left:
            if left.pop(0):
                left.clear()
                raise OSError(errno.EIO, "Input/output error")
        rename(*names)

    with ModelCheckpoint(path, save_best_only=True) as ckpt:
        with monkeypatch.context() as patch:
            patch.setattr(_exchange.os, "rename", fail_at_one)
            ckpt.save(tree_of(0.7), 1, **run)
            with pytest.raises(flaxckpt.CheckpointWriteError):
                ckpt.wait()
        at_path = 0.7 if which == "third" else 0.2
        found = there(tmp_path)
        assert found == {"best": at_path, "best.aside": 0.2 if at_path == 0.7 else 0.7}
        assert flaxckpt.load(path)["w"][0] == at_path
        assert ckpt.best.logs == {"val_loss": 0.2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with ModelCheckpoint(path, save_best_only=True) as ckpt:
            ckpt.save(tree_of(0.7), 1, **run)
    found = there(tmp_path)
    assert found.pop("best") == 0.7
    assert [*found.values()] == [0.2]
    assert not [each for each in tmp_path.iterdir() if "replaced" in each.name]


def test_one_by_hand_over_what_was_deleted_meanwhile(tmp_path):
    path = tmp_path / "best"
    train(path, [0.2])
    with ModelCheckpoint(path, save_best_only=True) as ckpt:
        area = ckpt._series.area
        swap = area.swap

        def delete_and_swap(new, path):
            shutil.rmtree(path)
            swap(new, path)

        area.swap = delete_and_swap
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ckpt.save(tree_of(0.7), 1, logs={"val_loss": 0.7})
            ckpt.wait()
        assert there(tmp_path) == {"best": 0.7}
        assert [*ckpt._saves._parts.disk._ledger.infos] == [str(path)]
        assert ckpt.best.logs == {"val_loss": 0.7}


def test_one_by_hand_makes_way_in_an_object_store(url):
    with ModelCheckpoint(f"{url}/best", save_best_only=True) as ckpt:
        state = ckpt.init()
        state = ckpt.update(state, tree_of(0.2), {"val_loss": 0.2}, 0)
        ckpt.wait()
        ckpt.update(state, tree_of(0.5), {"val_loss": 0.5}, 1, force=True)
        ckpt.wait()
        assert there(url) == {"best": 0.2, "best.aside": 0.5}
        for epoch, value in enumerate([0.7, 0.8], start=2):
            path = ckpt.save(tree_of(value), epoch, logs={"val_loss": value})
            assert str(path) == f"{url}/best"
            if epoch == 2:
                with pytest.warns(UserWarning, match="which is kept at"):
                    ckpt.wait()
            ckpt.wait()
            (aside,) = there(url).keys() - {"best"}
            assert there(url) == {"best": value, aside: 0.2}
            assert (ckpt.best.epoch, ckpt.latest.epoch) == (0, epoch)
            assert (flaxckpt.load(ckpt.best)["w"] == 0.2).all()
            flaxckpt.verify(ckpt.best.path)
    with ModelCheckpoint(f"{url}/best", save_best_only=True) as ckpt:
        assert float(ckpt.restore(which="best").tree["w"][0]) == pytest.approx(0.2)
        ckpt.update(state, tree_of(0.1), {"val_loss": 0.1}, 4)
    assert there(url) == {"best": 0.1}
    objects = Objects(url)
    (pointer,) = objects.keys_below(".flaxckpt-current")
    at = json.loads(objects.read(pointer).content)["at"]
    files = [key for key in objects.keys_below("") if not key.startswith(".flaxckpt-")]
    assert files
    assert all(key.startswith(f"{at}/") for key in files)  # none is left over


def test_without_best_only_each_save_replaces_the_last(tmp_path):
    with ModelCheckpoint(tmp_path / "best") as ckpt:
        state = ckpt.init()
        for epoch, loss in enumerate([0.2, 0.5, 0.3]):
            state = ckpt.update(state, tree_of(loss), {"val_loss": loss}, epoch)
            ckpt.wait()
            assert there(tmp_path) == {"best": loss}


def test_a_better_one_that_waits_is_not_superseded(tmp_path):
    """By one that was forced, or of a state that knows less."""
    path, state = tmp_path / "best", None
    with ModelCheckpoint(path, save_best_only=True, max_in_flight=8) as ckpt:
        fresh = state = ckpt.init()
        for loss, given_state, force in [
            (0.5, None, False),
            (0.2, None, False),
            (0.9, None, True),
            (0.4, fresh, False),
            (0.3, None, False),
        ]:
            state = given_state or state
            logs = {"val_loss": loss}
            state = ckpt.update(state, tree_of(loss), logs, 0, force=force)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ckpt.wait()
    assert best_of(path) == 0.2


def test_a_best_of_zero_that_waits_is_not_superseded(tmp_path, held):
    """By one of a state that has no best: its value is a zero that means nothing."""
    arrived, go = held
    with ModelCheckpoint(tmp_path / "best", save_best_only=True, max_in_flight=8) as c:
        fresh = state = c.init()
        state = c.update(state, tree_of(0.5), {"val_loss": 0.5}, 0)
        assert arrived.wait(60)
        c.update(state, tree_of(0), {"val_loss": np.float32(0)}, 1)
        c.update(fresh, tree_of(0.9), {"val_loss": 0.9}, 2)
        go.set()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            c.wait()
    assert there(tmp_path) == {"best": 0, "best.aside": 0.9}


def test_an_older_state_that_did_not_improve_supersedes_nothing_either(tmp_path, held):
    arrived, go = held
    with ModelCheckpoint(tmp_path / "best", save_best_only=True, max_in_flight=8) as c:
        older = c.update(c.init(), tree_of(0.9), {"val_loss": 0.9}, 0)
        assert arrived.wait(60)
        c.update(older, tree_of(0.5), {"val_loss": 0.5}, 1)  # waits to be written
        with pytest.warns(UserWarning, match="the same state as in the call before"):
            again = c.update(older, tree_of(2), {"val_loss": 2.0}, 2)
        c.update(again, tree_of(0.7), {"val_loss": 0.7}, 3)
        go.set()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            c.wait()
    assert there(tmp_path) == {"best": 0.5, "best.aside": 0.7}


def test_a_better_one_by_hand_that_waits_is_not_superseded(tmp_path, held):
    arrived, go = held
    with ModelCheckpoint(tmp_path / "best", save_best_only=True, max_in_flight=8) as c:
        state = c.update(c.init(), tree_of(0.9), {"val_loss": 0.9}, 0)
        assert arrived.wait(60)
        c.save(tree_of(0.1), 1, logs={"val_loss": 0.1})
        c.update(state, tree_of(0.5), {"val_loss": 0.5}, 2)
        go.set()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            c.wait()
    assert there(tmp_path) == {"best": 0.1, "best.aside": 0.5}


CALLS = st.tuples(
    st.sampled_from(["update", "force", "by hand", "by hand with a state"]),
    st.integers(0, 8),  # which of the states so far, from the newest back
    st.integers(0, 8).map(lambda eighths: eighths / 8),
    st.booleans(),  # whether the state goes through a jitted function before
)


@pytest.mark.parametrize("save_last", [False, True])
@given(calls=st.lists(CALLS, min_size=1, max_size=6))
@example(
    calls=[
        ("update", 0, 0.75, False),
        ("by hand", 0, 0.125, False),
        ("update", 0, 0.5, False),
    ],
)
def test_whatever_waits_the_best_of_all_is_there(calls, save_last):
    """Property: calls in any order, of any states, while the first of all is held."""
    with (
        tempfile.TemporaryDirectory() as directory,
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        go, write = threading.Event(), _series_writer.write_checkpoint

        def wait_and_write(*args, **kwargs):
            assert go.wait(60)
            return write(*args, **kwargs)

        patch.setattr(_series_writer, "write_checkpoint", wait_and_write)
        path, saved = Path(directory, "best"), []
        with ModelCheckpoint(
            path, save_best_only=True, max_in_flight=20, save_last=save_last
        ) as ckpt:
            states = [ckpt.init()]
            for epoch, (kind, back, loss, through_jit) in enumerate(calls):
                state = states[-1 - back % len(states)]
                if through_jit:
                    state = jax.jit(lambda state: state)(state)
                logs = {"val_loss": np.float32(loss)}
                if kind.startswith("by hand"):
                    known = state if kind.endswith("state") else None
                    ckpt.save(tree_of(loss), epoch, logs=logs, state=known)
                    saved.append(loss)
                    continue
                best, force = float(state.best), kind == "force"
                if force or not best <= loss:
                    saved.append(loss)
                states.append(
                    ckpt.update(state, tree_of(loss), logs, epoch, force=force)
                )
            go.set()
            ckpt.wait()
        assert min(there(directory).values(), default=None) == min(saved, default=None)


def test_states_that_went_through_a_jitted_function_supersede_as_others(tmp_path, held):
    arrived, go = held
    with ModelCheckpoint(
        tmp_path / "best", save_best_only=True, save_last=True, max_in_flight=2
    ) as ckpt:
        through_jit = jax.jit(lambda state: state)
        state = ckpt.update(ckpt.init(), tree_of(0.5), {"val_loss": 0.5}, 0)
        assert arrived.wait(60)
        for epoch, loss in enumerate([2.0, 3.0, 4.0], 1):  # more would wait for ever
            state = through_jit(state)
            state = ckpt.update(state, tree_of(loss), {"val_loss": loss}, epoch)
        go.set()
        ckpt.wait()
        assert ckpt.counts.superseded == 2
        assert ckpt.counts.delayed == 0
        assert ckpt.latest.epoch == 3


@pytest.mark.parametrize("how", ["a newer format", "a flipped bit"])
def test_what_cannot_be_read_is_not_replaced(tmp_path, how):
    path = tmp_path / "best"
    train(path, [0.1])
    record = path / "flaxckpt.json"
    whole = record.read_bytes()
    if how == "a newer format":
        at = whole.index(b'"format"')
        record.write_bytes(whole[:at] + whole[at:].replace(b"1", b"9", 1))
    else:
        record.write_bytes(whole.replace(b"0", b"1", 1))
    spoilt = record.read_bytes()
    said, _ = train(path, [0.9, 0.8])
    assert len([each for each in said if "is not replaced" in each]) == 1
    assert record.read_bytes() == spoilt
    record.write_bytes(whole)
    assert there(tmp_path) == {"best": 0.1, "best.aside": 0.8}
    record.write_bytes(spoilt)
    assert "is not replaced" not in "".join(train(path, [0.7], overwrite=True)[0])
    assert there(tmp_path) == {"best": 0.7}


@pytest.mark.parametrize("restores", [False, True])
def test_the_best_by_another_metric_is_not_replaced(tmp_path, restores):
    path = tmp_path / "best"
    train(path, [0.1])
    with ModelCheckpoint(path, "acc", save_best_only=True) as ckpt:
        found = ckpt.restore() if restores else None
        state = found.state if found else ckpt.init()
        for epoch, value in enumerate([0.5, 0.7]):
            logs = {"val_loss": 1 - value, "acc": value}
            state = ckpt.update(state, tree_of(1 - value), logs, epoch)
        with pytest.warns(UserWarning, match=r"it is the best by 'val_loss' \(min\)"):
            ckpt.wait()
        assert ckpt.best.logs["acc"] == 0.7
    assert best_of(path) == 0.1


@pytest.mark.parametrize("first", ["{epoch}", "best"])
def test_a_better_one_of_another_template_is_not_replaced(tmp_path, first):
    """Where two templates name the same directory."""
    second = {"{epoch}": "{epoch:01d}", "best": "{tag}"}[first]
    with ModelCheckpoint(tmp_path / first, save_best_only=True) as ckpt:
        ckpt.update(ckpt.init(), tree_of(0.1), {"val_loss": 0.1}, 0)
    with ModelCheckpoint(tmp_path / second, save_best_only=True) as ckpt:
        logs = {"val_loss": 0.9, "tag": "best"}
        ckpt.update(ckpt.init(), tree_of(0.9), logs, 0)
        with pytest.warns(
            UserWarning, match="is not replaced: it is better, and of an"
        ):
            ckpt.wait()
    assert sorted(there(tmp_path).values()) == [0.1, 0.9]
    assert (
        float(flaxckpt.load(tmp_path / ("best" if first == "best" else "1"))["w"][0])
        == 0.1
    )


# ---- what the user has put somewhere else ------------------------------------------------


def test_what_was_copied_or_renamed_is_no_longer_of_the_series(tmp_path):
    """So retention does not delete it, and no run goes on from it unasked."""
    with ModelCheckpoint(tmp_path / "{epoch}", max_to_keep=1) as ckpt:
        for epoch in range(2):
            ckpt.save(tree_of(1 - epoch), epoch, logs={"val_loss": 1 - epoch})
            ckpt.wait()
            name = str(epoch + 1)
            shutil.copytree(tmp_path / name, tmp_path / f"{name}-for-the-paper")
        (tmp_path / "2").rename(tmp_path / "good-one")
        assert ckpt.checkpoints == ()
        with pytest.warns(UserWarning, match="good-one"):
            assert ckpt.restore() is None
    train(tmp_path / "{epoch}", [0.5], max_to_keep=1)
    kept = {"1-for-the-paper": 1, "2-for-the-paper": 0, "good-one": 0}
    assert there(tmp_path) == kept | {"1": 0.5}
    found = ModelCheckpoint(tmp_path / "{epoch}").restore(which=tmp_path / "good-one")
    assert found.epoch == 1


def test_a_directory_that_was_moved_keeps_its_series(tmp_path):
    train(tmp_path / "a/best", [0.2])
    train(tmp_path / "a/best", [0.5])
    (tmp_path / "a").rename(tmp_path / "b")
    assert best_of(tmp_path / "b/best") == 0.2
    train(tmp_path / "b/best", [0.1])
    assert there(tmp_path) == {"best": 0.1}


def test_an_archived_best_is_nothing_to_beat(tmp_path):
    train(tmp_path / "best", [0.05])
    (tmp_path / "best").rename(tmp_path / "best-of-the-first")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(tmp_path / "best", [0.5], restore=True)
    assert there(tmp_path) == {"best": 0.5, "best-of-the-first": 0.05}


@pytest.mark.direct
def test_a_best_that_restore_has_passed_over_is_nothing_to_beat(tmp_path):
    for path, losses in (("a/{epoch}", [0.5, 0.1]), ("b/{epoch}", [0.5])):
        train(tmp_path / path, losses)
    for values in (tmp_path / "a/2").rglob("d/*"):  # TensorStore makes one or several
        if values.is_file():
            values.write_bytes(bytes(values.stat().st_size))
    ckpt = ModelCheckpoint(tmp_path / "a/{epoch}", save_best_only=True)
    with pytest.warns(UserWarning, match="PASSED OVER"):
        found = ckpt.restore()
    assert found.epoch == 0
    assert float(found.state.best) == 0.5


def test_a_save_by_hand_beside_a_better_one_is_told_of_it(tmp_path):
    """Where nothing has to move: each epoch has a path of its own."""
    train(tmp_path / "{epoch}", [0.2])
    with ModelCheckpoint(tmp_path / "{epoch}", save_best_only=True) as ckpt:
        state = ckpt.init()
        ckpt.save(tree_of(0.5), 7, logs={"val_loss": 0.5}, state=state)
        with pytest.warns(UserWarning, match=OF_EARLIER):
            ckpt.wait()
    assert sorted(there(tmp_path).values()) == [0.2, 0.5]


@pytest.mark.parametrize("name", ["a" * 255, "a" * 250, "a" * 239, "ä" * 127])
def test_a_name_that_no_suffix_fits_behind(tmp_path, name):
    """Its places aside are short enough, and its own: a name like it has others."""
    assert places_aside(tmp_path / "best", "12345678")[0].name == "best.aside"
    twin = name[:-1] + "b"
    for each in (name, twin):
        train(tmp_path / each, [0.2])
        train(tmp_path / each, [0.5])
    assert sorted(there(tmp_path).values()) == [0.2, 0.2, 0.5, 0.5]
    with ModelCheckpoint(tmp_path / name, save_best_only=True) as ckpt:
        ckpt.save(tree_of(0.7), 0, logs={"val_loss": 0.7})
        with pytest.warns(UserWarning, match="which is kept at"):
            ckpt.wait()
    assert len(ckpt.checkpoints) == 2
    for each in (name, twin):
        assert best_of(tmp_path / each) == 0.2
        train(tmp_path / each, [0.1])
        assert best_of(tmp_path / each) == 0.1
    assert there(tmp_path) == {name: 0.1, twin: 0.1}


def test_what_is_aside_of_another_series_is_not_touched(tmp_path):
    """Nor what is no checkpoint at all."""
    (tmp_path / "a.aside").mkdir()
    (tmp_path / "a.aside/mine").write_text("mine")
    train(tmp_path / "b.aside", [0.7])
    for name in "ab":
        train(tmp_path / name, [0.2])
        train(tmp_path / name, [0.5])
        assert best_of(tmp_path / name) == 0.2
        infos = ModelCheckpoint(tmp_path / name).checkpoints
        assert [info.logs["val_loss"] for info in infos] == [0.2, 0.5]
        assert infos[1].path.name.startswith(f"{name}.aside-")
    assert (tmp_path / "a.aside/mine").read_text() == "mine"
    assert best_of(tmp_path / "b.aside") == 0.7


def test_what_was_deleted_by_hand_is_nothing_to_beat(tmp_path):
    path = tmp_path / "best"
    with ModelCheckpoint(path, save_best_only=True) as ckpt:
        state = ckpt.update(ckpt.init(), tree_of(0.2), {"val_loss": 0.2}, 0)
        ckpt.wait()
        shutil.rmtree(path)
        state = ckpt.init()
        ckpt.update(state, tree_of(0.5), {"val_loss": 0.5}, 1)
    assert there(tmp_path) == {"best": 0.5}


# ---- in programs, on devices, of several objects -----------------------------------------


def test_a_program_that_did_not_restore(tmp_path):
    path = tmp_path / "best"
    train(path, [0.2])
    ckpt = ModelCheckpoint(path, save_best_only=True)

    def body(state, loss):
        logs = {"val_loss": loss}
        return ckpt.update(state, {"w": jnp.full(3, loss)}, logs, 0), None

    run = jax.jit(lambda state, xs: jax.lax.scan(body, state, xs)[0])
    state = run(ckpt.init(), jnp.float32([0.75, 0.5]))
    with pytest.warns(UserWarning, match=OF_EARLIER):
        ckpt.wait()
    assert there(tmp_path) == {"best": 0.2, "best.aside": 0.5}
    run(state, jnp.float32([0.125]))
    ckpt.close()
    assert there(tmp_path) == {"best": 0.125}


def test_a_device_that_decides(tmp_path, monkeypatch):
    path = tmp_path / "best"
    train(path, [0.2])
    take_metrics_for_unknown(monkeypatch)
    losses = [jnp.float32(x) for x in (0.75, 0.5, 0.625)]
    said, _ = train(path, losses)
    assert len(said) == 1
    assert there(tmp_path) == {"best": 0.2, "best.aside": 0.5}


def test_two_objects_of_one_series(tmp_path):
    """At the same time, in one process, each with a state of its own."""
    path = tmp_path / "best"
    ckpts = [ModelCheckpoint(path, save_best_only=True) for _ in range(2)]
    states = [ckpt.init() for ckpt in ckpts]
    losses = [(0.9, 0.8), (0.5, 0.7), (0.3, 0.2), (0.25, 0.1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for epoch, pair in enumerate(losses):
            for i, loss in enumerate(pair):
                states[i] = ckpts[i].update(
                    states[i], tree_of(loss), {"val_loss": loss}, epoch
                )
        for ckpt in ckpts:
            ckpt.close()
    assert best_of(path) == 0.1


def test_several_processes(tmp_path):
    """Process 0 knows what is there."""
    said = pod.run(tmp_path, "keep_the_better", 2, tmp_path / "run", devices=4)
    third = float(np.float32(0.2))
    wanted = [
        [{"best": third}, third],
        [{"best": third, "best.aside": 0.5}, third],
        [{"best": 0.125}, 0.125],
    ]
    assert said == [wanted] * 2


def test_in_an_object_store(s3):
    path = f"{s3}/best"
    train(path, [0.2])
    train(path, [0.5])
    assert there(s3) == {"best": 0.2, "best.aside": 0.5}
    assert best_of(path) == 0.2
    train(path, [0.1])
    assert there(s3) == {"best": 0.1}


# ---- restoring brings the best along -----------------------------------------------------


@pytest.mark.parametrize("template", ["best", "{epoch}"])
def test_every_restore_knows_of_the_best(tmp_path, template):
    run, other = tmp_path / "run", tmp_path / "other"
    train(run / template, [0.5, 0.2, 0.4], save_last=True)
    train(run / template, [0.9], save_last=True)  # which did not restore
    train(other / "x", [0.7])
    ocp.save(tmp_path / "orbax", tree_of(1.0))
    with ModelCheckpoint(run / template, save_best_only=True, save_last=True) as ckpt:
        for info in (*ckpt.checkpoints, ckpt.latest):
            assert ckpt.restore(which=info.path).state.best == np.float32(0.2)
        elsewhere = other / "x", tmp_path / "orbax"
        for which in ("latest", "best", *elsewhere):
            assert ckpt.restore(which=which).state.best == np.float32(0.2)
        if template == "{epoch}":
            ckpt.save(tree_of(3.0), 7)  # with no state, no metric
        state = ckpt.restore().state
        assert state.best == np.float32(0.2)
        ckpt.update(state, tree_of(0.3), {"val_loss": 0.3}, 8)
        ckpt.wait()
        assert ckpt.best.logs == {"val_loss": 0.2}


def test_a_last_state_is_nothing_to_beat(tmp_path):
    """It is better by less than `min_delta`, and it is gone some time."""
    with ModelCheckpoint(
        tmp_path / "best", save_best_only=True, save_last=True, min_delta=0.1
    ) as ckpt:
        state = ckpt.init()
        for epoch, loss in enumerate([0.5, 0.45]):
            state = ckpt.update(state, tree_of(loss), {"val_loss": loss}, epoch)
        found = ckpt.restore()
        assert (found.epoch, found.state.best) == (1, 0.5)


def test_a_best_of_no_metric_is_told_from_a_first_run(tmp_path):
    ckpt = ModelCheckpoint(tmp_path / "{epoch}", "val_los", mode="min")
    assert ckpt.restore(which="best") is None  # with no warning: it is the first run
    with ckpt:
        for epoch in range(2):
            ckpt.save(tree_of(0.5), epoch, logs={"val_loss": 0.5, "lr": 1.0})
        with pytest.warns(UserWarning, match="No best") as caught:
            assert ckpt.restore(which="best") is None
    assert str(caught[0].message) == (
        "No best checkpoint to restore: no checkpoint has a number for 'val_los'. "
        "Their logs have: 'lr', 'val_loss'. Pass one of these as "
        '`monitor`, or restore(which="latest").'
    )
    assert caught[0].filename == __file__


# ---- what update forgets, and what it says -----------------------------------------------


@pytest.mark.parametrize("save_freq", [1, 3])
def test_a_state_that_is_not_assigned_is_told(tmp_path, save_freq):
    with ModelCheckpoint(tmp_path / "{batch}", save_freq=save_freq) as ckpt:
        state = ckpt.init()
        for batch in range(save_freq):
            ckpt.update(state, tree_of(1), None, 0, batch)
        with pytest.warns(UserWarning, match=r"state = ckpt\.update\(state") as caught:
            for batch in range(save_freq, save_freq + 3):
                ckpt.update(state, tree_of(1), None, 0, batch)
        assert len(caught) == 1


def test_a_state_that_is_assigned_is_not(tmp_path):
    with ModelCheckpoint(tmp_path / "{epoch}-{batch}", save_freq=2) as ckpt:
        state = ckpt.init()
        for epoch in range(2):
            for batch in range(3):
                state = ckpt.update(state, tree_of(1), None, epoch, batch)
            state = ckpt.update(state, tree_of(1), None, epoch)


@pytest.mark.parametrize("wrap", [float, jnp.float32])
def test_a_nan_is_called_one(tmp_path, capsys, wrap):
    with ModelCheckpoint(tmp_path / "best", save_best_only=True, verbose=1) as ckpt:
        state = ckpt.init()
        for epoch, loss in enumerate([np.nan, 0.5, np.nan, 0.75]):
            logs = {"val_loss": wrap(loss)}
            state = ckpt.update(state, tree_of(loss), logs, epoch)
    said = [line for line in capsys.readouterr().out.splitlines() if "ing" not in line]
    assert said == [
        "Epoch 1: val_loss is nan, which is no improvement",
        "Epoch 3: val_loss is nan, which is no improvement",
        "Epoch 4: val_loss did not improve from 0.50000",
    ]


# ---- killed in between -------------------------------------------------------------------

PROGRAM = """
    import os, sys
    import absl.logging
    absl.logging.set_verbosity("fatal")
    import numpy as np
    import flaxckpt
    from flaxckpt._checkpoints.series_writer import SeriesWriter

    path, losses, kill_before = sys.argv[1], sys.argv[2], sys.argv[3]
    method = getattr(SeriesWriter, kill_before)
    def killed(self, *arguments, **named):
        if kill_before != "drop" or arguments[0]:
            os._exit(9)
        return method(self, *arguments, **named)
    setattr(SeriesWriter, kill_before, killed)
    import warnings
    warnings.simplefilter("ignore")
    with flaxckpt.ModelCheckpoint(path, save_best_only=True) as ckpt:
        state = ckpt.init()
        for epoch, loss in enumerate(map(float, losses.split(","))):
            tree, logs = {"w": np.full(3, loss)}, {"val_loss": loss}
            state = ckpt.update(state, tree, logs, epoch)
            ckpt.wait()
"""


@pytest.mark.parametrize(
    ("losses", "kill_before", "left"),
    [
        ("0.5", "write", {"best": 0.2}),
        ("0.5", "prune", {"best": 0.2, "best.aside": 0.5}),
        ("0.5,0.1", "drop", {"best": 0.1, "best.aside": 0.5}),
    ],
)
def test_a_kill_leaves_the_better_one(tmp_path, losses, kill_before, left):
    path = tmp_path / "best"
    train(path, [0.2])
    code = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(path), losses]
    done = subprocess.run([*code, kill_before], timeout=120, env={**os.environ})
    assert done.returncode == 9
    assert there(tmp_path) == left
    train(path, [0.05])
    assert there(tmp_path) == {"best": 0.05}


# ---- the rule ----------------------------------------------------------------------------

VALUES = st.sampled_from([0.1, 0.2, 0.3, 1 / 3, 0.5, float("nan"), float("inf")])
HOW = st.sampled_from(["decided", "forced", "by hand"])
RUNS = st.lists(
    st.tuples(
        st.sampled_from(["restore", "fresh", "old"]),
        st.lists(st.tuples(VALUES, HOW), min_size=1, max_size=3),
    ),
    min_size=1,
    max_size=4,
)


@given(
    RUNS,
    st.sampled_from(["best", "{epoch}", "{val_loss:.1f}"]),
    st.sampled_from([None, 1, 2]),
    st.sampled_from(["min", "max"]),
    st.booleans(),
)
@settings(max_examples=200 if FULL else 15)
@example(
    [("fresh", [(0.1, "decided")]), ("fresh", [(0.5, "decided"), (0.2, "forced")])],
    "best", 1, "min", True,
)  # fmt: skip
@example(
    [("fresh", [(0.1, "decided")]), ("fresh", [(0.5, "by hand"), (0.2, "by hand")])],
    "best", 1, "min", True,
)  # fmt: skip
def test_the_best_ever_decided_for_is_always_there(
    tmp_path_factory, runs, template, max_to_keep, mode, waits
):
    path = tmp_path_factory.mktemp("run") / template
    sign, best, old = 1 if mode == "min" else -1, None, None
    for begins, calls in runs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with ModelCheckpoint(
                path, save_best_only=True, mode=mode, max_to_keep=max_to_keep
            ) as ckpt:
                state = ckpt.init()
                found = ckpt.restore() if begins == "restore" else None
                if found:
                    state = found.state
                    assert best is None or state.best == np.float32(best)
                elif begins == "old" and old is not None:
                    state = old
                for epoch, (loss, how) in enumerate(calls):
                    before, logs = float(state.best), {"val_loss": loss}
                    tree, force = tree_of(loss), how != "decided"
                    if how == "by hand":
                        ckpt.save(tree, epoch, logs=logs)
                    else:
                        state = ckpt.update(state, tree, logs, epoch, force=force)
                    if epoch == 0:
                        old = state
                    improved = state.has_best and float(state.best) != before
                    if improved or (force and loss == loss):
                        if best is None or sign * loss < sign * best:
                            best = loss
                    if waits and best is not None:
                        ckpt.wait()
                        assert ckpt.best.logs["val_loss"] == best
            if best is not None:
                assert best_of(path, mode=mode) == best


@given(
    st.sampled_from(["min", "max"]),
    st.lists(
        st.tuples(
            st.sampled_from([1, 2, 3, None]),
            st.booleans(),
            st.sampled_from(["", "move", "put", "drop"]),
        ),
        max_size=8,
    ),
    st.booleans(),
)
def test_of_all_places_the_best_stays_and_the_newest_too(mode, saves, swaps):
    """Also where a save ends before it moves, puts or drops anything.

    On a disk it swaps: it is put aside first, and moved with the better one.
    """
    there, sign = {}, 1 if mode == "min" else -1
    newest = None  # that was acknowledged, as (value, number)
    for number, (value, by_hand, end) in enumerate(saves):
        by_age = sorted(there.items(), key=lambda each: each[1][1])
        values = {place: each for place, (each, _) in by_age}
        free = next(name for name in ("a", "b", "c") if name not in there)
        found = choose_place(
            "path", free, values, value, mode, by_hand=by_hand, swaps=swaps
        )
        known = [each for each in values.values() if each is not None]

        def check(known, newest):
            best = min(known, key=lambda each: sign * each, default=None)
            left = [each for each, _ in there.values()]
            assert best is None or best in left
            assert newest is None or newest in there.values()

        assert not by_hand or found.path == "path"
        if end == "move":
            continue
        if found.kept is not None and swaps:
            assert found.kept not in found.rest
            there[found.kept] = newest = value, number
            check(known, newest)
            if end == "put":
                continue
            there["path"], there[found.kept] = there[found.kept], there["path"]
        else:
            if found.kept is not None:
                assert found.kept == free
                there[found.kept] = there.pop("path")
            check(known, newest)
            if end == "put":
                continue
            there[found.path] = newest = value, number
        known += [] if value is None else [value]
        check(known, newest)
        if end == "drop":
            continue
        for each in found.rest:
            del there[each]
        check(known, newest)
        assert len(there) <= 2


def test_what_is_aside_may_be_what_is_to_be_restored(tmp_path):
    """Where it cannot be read, no older one is taken in its place, as elsewhere."""
    path = tmp_path / "{epoch}"
    with ModelCheckpoint(path, save_best_only=True) as ckpt:
        series = ckpt._series
        for name in ("3", "3.aside", f"3.aside-{series.tag}"):
            assert series.may_be_ours(str(tmp_path / name))
        for name in ("lost+found", "other", ".aside"):
            assert not series.may_be_ours(str(tmp_path / name))
        assert series.may_be_ours(str(tmp_path))
        assert not series.may_be_ours(str(tmp_path.parent / "3"))


@given(
    losses=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    failing=st.sets(st.integers(0, 7), max_size=4),
    on_device=st.booleans(),
    threshold=st.sampled_from([None, 6.0]),
)
@example(losses=[5, 2, 3], failing={1}, on_device=False, threshold=None)
@example(losses=[2, 3], failing={0}, on_device=True, threshold=None)
@settings(max_examples=100 if FULL else 15)
def test_the_best_of_a_save_that_failed_need_not_be_beaten(
    tmp_path_factory, losses, failing, on_device, threshold
):
    root, write = tmp_path_factory.mktemp("best"), _series_writer.write_checkpoint
    best, saved, failed = threshold, {}, []

    def fail_or_write(*args, **kwargs):
        if epoch in failing:
            failed.append(epoch)
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*args, **kwargs)

    with (
        pytest.MonkeyPatch.context() as patch,
        ModelCheckpoint(
            root / "{epoch}", save_best_only=True, initial_value_threshold=threshold
        ) as ckpt,
    ):
        patch.setattr(_series_writer, "write_checkpoint", fail_or_write)
        state = ckpt.init()
        for epoch, loss in enumerate(losses):
            value = jnp.float32(loss) if on_device else float(loss)
            logs, is_better = {"val_loss": value}, best is None or loss < best
            state = ckpt.update(state, tree_of(loss), logs, epoch)
            try:
                ckpt.wait()
            except flaxckpt.CheckpointWriteError:
                assert failed.pop() == epoch
                assert is_better
            else:
                if is_better:
                    best, saved[str(epoch + 1)] = loss, loss
            assert not failed
    assert there(root) == saved
