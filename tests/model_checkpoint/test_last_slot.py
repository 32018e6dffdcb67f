"""The slot of the last state, beside the best."""

import os
import signal

import numpy as np
import pytest

import flaxckpt
from flaxckpt import ModelCheckpoint, SettingError
from flaxckpt._disk import exchange as _exchange


def names(infos):
    return [info.path.name for info in infos]


def tree_of(epoch):
    return {"w": np.full(4, epoch, np.float32)}


def test_the_slot_holds_what_is_newer_than_the_best(tmp_path):
    with ModelCheckpoint(
        tmp_path / "{epoch}", save_best_only=True, save_last=True
    ) as ckpt:
        state = ckpt.init()
        for epoch, loss in enumerate([0.5, 0.6, 0.7]):
            state = ckpt.update(state, tree_of(epoch), {"val_loss": loss}, epoch)
        ckpt.wait()
        assert names(ckpt.checkpoints) == ["1"]
        assert ckpt.latest.path.name == "last"
        found = ckpt.restore()
        assert (found.epoch, found.state.best) == (2, 0.5)
        assert ckpt.restore(which="best").epoch == 0
        # Something newer that can be resumed from: the slot is of no more use.
        state = ckpt.update(found.state, tree_of(3), {"val_loss": 0.4}, 3)
        ckpt.wait()
        assert names(ckpt.checkpoints) == ["1", "4"]
        assert ckpt.latest.path.name == "4"
        assert not (tmp_path / "last").exists()


def test_a_run_that_saves_weights_can_be_resumed(tmp_path):
    tree = {"params": {"w": np.ones(3)}, "opt_state": {"m": np.zeros(3)}}
    with ModelCheckpoint(
        tmp_path / "{epoch}", save_weights_only=True, save_last="state"
    ) as ckpt:
        state = ckpt.init()
        for epoch in range(3):
            state = ckpt.update(state, tree, {}, epoch)
        found = ckpt.restore(like=tree)
        assert found.path == tmp_path / "state"
        assert found.epoch == 2
        assert names(ckpt.checkpoints) == ["1", "2", "3"]
        assert flaxckpt.load(tmp_path / "3").keys() == {"params"}


@pytest.mark.parametrize("name", ["a/b", "..", "best"])
def test_names_of_the_slot_that_cannot_work(tmp_path, name):
    with pytest.raises(SettingError, match="save_last="):
        ModelCheckpoint(tmp_path / "best", save_last=name)


def test_the_slot_is_never_the_filepath_itself(tmp_path):
    with ModelCheckpoint(tmp_path / "last", save_on_preemption="flag") as ckpt:
        os.kill(os.getpid(), signal.SIGTERM)
        state = ckpt.update(ckpt.init(), tree_of(0), {}, 0, 5)
        assert ckpt.latest.path.name == "preempted"
        ckpt.update(state, tree_of(1), {}, 1)
        ckpt.wait()
        assert [info.epoch for info in ckpt.checkpoints] == [1]
    with ModelCheckpoint(tmp_path / "named/{name}", save_last=True) as ckpt:
        with pytest.raises(flaxckpt.CheckpointPathError, match="is where the last"):
            ckpt.save(tree_of(0), 0, logs={"name": "last"})
        ckpt.save(tree_of(0), 0, logs={"name": "first"})


def test_two_filepaths_have_two_slots(tmp_path):
    with (
        ModelCheckpoint(tmp_path / "a", save_best_only=True, save_last=True) as a,
        ModelCheckpoint(
            tmp_path / "b{epoch}", save_best_only=True, save_last=True
        ) as b,
    ):
        states = {ckpt: ckpt.init() for ckpt in (a, b)}
        for epoch, loss in enumerate([0.5, 0.6, 0.7]):
            for number, ckpt in enumerate((a, b)):
                states[ckpt] = ckpt.update(
                    states[ckpt],
                    tree_of(10 * epoch + number),
                    {"val_loss": loss},
                    epoch,
                )
                ckpt.wait()
        assert (a.restore().tree["w"] == 20).all()
        assert (b.restore().tree["w"] == 21).all()
        a.update(states[a], tree_of(30), {"val_loss": 0.1}, 3)
        a.wait()
        assert a.latest.path.name == "a"
        assert (b.restore().tree["w"] == 21).all()


def last_of(directory, name):
    return ModelCheckpoint(directory / name, save_best_only=True, save_last=True)


def save_last(ckpt, state, epoch):
    """Save what is no improvement, and so goes to the slot."""
    state = ckpt.update(state, tree_of(epoch), {"val_loss": 1.0 + epoch}, epoch)
    ckpt.wait()
    assert ckpt.restore().epoch == epoch
    return state


def choose_the_first(ckpt):
    """Have it go by a look at a time at which the slot was nobody's."""
    ckpt._series.slot = lambda: ckpt._series.slots[0]


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "renames"])
def test_a_slot_that_two_series_have_chosen_is_the_first_ones(
    tmp_path, monkeypatch, exchange
):
    """Each sees it free before the other one puts its state there."""
    if not exchange:
        monkeypatch.setattr(_exchange, "_exchange", lambda *_: False)
    with last_of(tmp_path, "a") as a, last_of(tmp_path, "b") as b:
        states = {}
        for number, ckpt in enumerate((a, b)):
            logs = {"val_loss": 0.5}
            states[ckpt] = ckpt.update(ckpt.init(), tree_of(number), logs, 0)
            ckpt.wait()
        states[a] = save_last(a, states[a], 1)
        choose_the_first(b)
        states[b] = b.update(states[b], tree_of(7), {"val_loss": 7.0}, 7)
        b.wait()
        del b._series.slot
        assert (a.restore().epoch, b.restore().epoch) == (1, 7)
        own = b._series.slots[1].name
        assert a.restore().path.name == "last"
        assert b.restore().path.name == own
        for epoch in (8, 9):
            for ckpt in (a, b):
                states[ckpt] = save_last(ckpt, states[ckpt], epoch)
        a.update(states[a], tree_of(0), {"val_loss": 0.1}, 10)  # empties its slot
        a.wait()
        save_last(b, states[b], 11)
        assert sorted(names(flaxckpt.list_checkpoints(tmp_path))) == [
            "a",
            "b",
            own,
        ]


def test_a_slot_that_is_missing_for_a_moment_is_not_free(tmp_path, monkeypatch):
    """As between the renames of a file system that cannot exchange directories."""
    monkeypatch.setattr(_exchange, "_exchange", lambda *_: False)
    with last_of(tmp_path, "a") as a, last_of(tmp_path, "b") as b:
        state = a.update(a.init(), tree_of(0), {"val_loss": 0.5}, 0)
        other = b.update(b.init(), tree_of(0), {"val_loss": 0.5}, 0)
        state = save_last(a, state, 1)
        b.wait()
        last, area, own = tmp_path / "last", a._series.area, a._series.slots[1]
        sync, met = area._sync_directory, []

        def meet(directory):
            sync(directory)
            if directory == tmp_path and not last.exists() and not met:
                met.append(directory)
                choose_the_first(b)
                save = other, tree_of(5), {"val_loss": 5.0}, 5
                b.update(*save)
                b.wait()

        area._sync_directory = meet
        state = save_last(a, state, 2)
        assert met
        del b._series.slot
        assert (a.restore().path.name, a.restore().epoch) == ("last", 2)
        assert (b.restore().path, b.restore().epoch) == (b._series.slots[1], 5)

        def take(directory):  # as one that does not look back, for it is killed
            sync(directory)
            if directory == tmp_path and not last.exists():
                b._series.slots[1].rename(last)

        area._sync_directory = take
        state = save_last(a, state, 3)
        assert a.restore().path == own
        area._sync_directory = sync
        state = save_last(a, state, 4)
        assert b.restore().epoch == 5
    hidden = [path.name for path in tmp_path.iterdir() if "replaced" in path.name]
    assert hidden == []
