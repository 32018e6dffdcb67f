"""Several objects of one series in one process: each goes by all that is there."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flaxckpt
from flaxckpt import ModelCheckpoint
from flaxckpt._checkpoints import series_writer as _series_writer
from flaxckpt._checkpoints import write as _write
from flaxckpt._checkpoints.retention import LatestN, expired


def tree_of(epoch):
    return {"w": np.full(3, epoch)}


def there(ckpt):
    return [info.epoch for info in ckpt.checkpoints]


class Model:
    """What has to be on disk, if an object is done before another one saves."""

    def __init__(self):
        self.infos = []

    def save(self, ckpt, info, keep):
        self.infos = [i for i in self.infos if i.epoch != info.epoch] + [info]
        if keep is not None:
            gone = expired(self.infos, LatestN(keep), ckpt._series.best_of(self.infos))
            self.infos = [info for info in self.infos if info not in gone]


STEPS = st.lists(
    st.tuples(
        st.integers(0, 2),  # which object
        st.sampled_from(["save", "save", "save", "close", "list"]),
        st.integers(0, 5),  # the epoch
        st.sampled_from([0.1, 0.5, 0.9]),
    ),
    max_size=14,
)


@settings(max_examples=25)
@given(keeps=st.lists(st.sampled_from([1, 2, 3, None]), min_size=3, max_size=3),
       steps=STEPS)  # fmt: skip
def test_each_keeps_what_it_is_to_keep(keeps, steps, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "{epoch}"
    ckpts = [ModelCheckpoint(path, max_to_keep=keep, sync=False) for keep in keeps]
    model = Model()
    for which, action, epoch, loss in steps:
        ckpt = ckpts[which]
        if action == "save":
            ckpt.save(tree_of(epoch), epoch, logs={"val_loss": loss})
            ckpt.wait()
            (info,) = [info for info in ckpt.checkpoints if info.epoch == epoch]
            model.save(ckpt, info, keeps[which])
        elif action == "close":
            ckpt.close()
        assert there(ckpt) == [info.epoch for info in model.infos]
    for ckpt in ckpts:
        ckpt.close()
    assert not list(path.parent.glob(".flaxckpt-*"))


@settings(max_examples=15)
@given(steps=st.lists(st.tuples(st.integers(0, 1), st.booleans()), min_size=1,
                      max_size=16),
       order=st.permutations([0, 1]), keep=st.integers(1, 3))  # fmt: skip
def test_at_the_same_time(steps, order, keep, tmp_path_factory):
    """Whichever writes first: in the end there are those that both are to keep."""
    path = tmp_path_factory.mktemp("run") / "{epoch}"
    ckpts = [ModelCheckpoint(path, max_to_keep=keep, sync=False) for _ in range(2)]
    for epoch, (which, waits) in enumerate(steps):
        ckpts[which].save(tree_of(epoch), epoch)
        if waits:
            ckpts[which].wait()
    for which in order:
        ckpts[which].wait()
    found = there(ckpts[0])
    assert len(found) == min(keep, len(steps))
    last = {which: epoch for epoch, (which, _) in enumerate(steps)}
    assert set(found) & set(last.values())  # the newest of all is one's last
    for ckpt in ckpts:
        ckpt.close()
    for info in ckpts[0].checkpoints:
        assert (flaxckpt.load(info.path)["w"] == info.epoch).all()
    assert sorted(p.name for p in path.parent.iterdir()) == sorted(
        f"{epoch + 1}" for epoch in found
    )


@pytest.mark.parametrize("moment", ["before", "after"])
def test_another_one_saves_while_one_is_writing(tmp_path, monkeypatch, moment):
    """What it has saved meanwhile counts when the first one deletes."""
    one, two = (ModelCheckpoint(tmp_path / "{epoch}", max_to_keep=2) for _ in range(2))
    for epoch in range(2):
        one.save(tree_of(epoch), epoch)
        one.wait()
    begun, go = threading.Event(), threading.Event()
    write = _write.write_checkpoint

    def wait_and_write(what, *args, **kwargs):
        if what.info.epoch != 2:
            return write(what, *args, **kwargs)
        done = write(what, *args, **kwargs) if moment == "after" else None
        begun.set()
        go.wait(5)  # or until it is clear that the other one waits for its turn
        return done or write(what, *args, **kwargs)

    monkeypatch.setattr(_series_writer, "write_checkpoint", wait_and_write)
    one.save(tree_of(2), 2)
    assert begun.wait(60)
    two.save(tree_of(3), 3)
    thread = two._saves.queue._thread
    thread.join(0.5)
    go.set()
    one.wait()
    two.wait()
    found = there(one)
    assert len(found) == 2
    assert set(found) <= {2, 3}
    one.close()
    two.close()
    assert len(list(tmp_path.iterdir())) == 2


def test_the_slot_of_another_one_goes_when_something_newer_is_there(tmp_path):
    best = {"save_best_only": True}
    one = ModelCheckpoint(tmp_path / "{epoch}", save_last=True, **best)
    two = ModelCheckpoint(tmp_path / "{epoch}", save_last=True, **best)
    states = [one.init(), two.init()]
    for epoch, (which, loss) in enumerate([(0, 0.5), (0, 0.6), (1, 0.4), (0, 0.7)]):
        ckpt = (one, two)[which]
        logs = {"val_loss": loss}
        states[which] = ckpt.update(states[which], tree_of(epoch), logs, epoch)
        ckpt.wait()
        assert (tmp_path / "last").exists() == (epoch in (1, 3))
        assert one.latest.epoch == two.latest.epoch == epoch
    one.close()
    two.close()


def test_the_lock_is_held_until_the_last_one_is_closed(tmp_path):
    ckpts = [ModelCheckpoint(tmp_path / "{epoch}") for _ in range(3)]
    for ckpt in ckpts:
        ckpt.save(tree_of(0), 0)
    for ckpt in ckpts:
        assert list(tmp_path.glob(".flaxckpt-*.lock"))
        ckpt.close()
        ckpt.close()  # once more does not take it from the others
    assert [p.name for p in tmp_path.iterdir()] == ["1"]
