"""`on_saved`: who is called with what, when, and what becomes of an error."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxckpt
from flaxckpt import CheckpointError, HookError, ModelCheckpoint, SettingError


def tree_of(number):
    return {"w": np.full(3, number, np.float32)}


def train(ckpt, losses, state=None, first=0):
    state = ckpt.init() if state is None else state
    for epoch, loss in enumerate(losses, first):
        state = ckpt.update(state, tree_of(epoch), {"val_loss": loss}, epoch)
    return state


class Held:
    """A function of `on_saved` that does not return before it is told to."""

    def __init__(self):
        self.begun, self.go, self.seen = threading.Event(), threading.Event(), []

    def __call__(self, info):
        self.seen.append(info)
        self.begun.set()
        assert self.go.wait(60)


# ---- what they are called with -------------------------------------------------------


def test_each_checkpoint_is_told_of_once_it_is_there(tmp_path):
    seen, loaded = [], []

    def load(info):
        loaded.append(flaxckpt.load(info)["w"][0])

    with ModelCheckpoint(tmp_path / "{epoch}", on_saved=[seen.append, load]) as ckpt:
        train(ckpt, [0.5, 0.75, 0.25])
        ckpt.wait()
        assert loaded == [0, 1, 2]
        assert tuple(seen) == ckpt.checkpoints == flaxckpt.list_checkpoints(tmp_path)
    assert [info.is_best for info in seen] == [True, False, True]
    assert {info.is_best for info in ckpt.checkpoints} == {None}


def test_one_function_or_several_are_called_in_their_order(tmp_path):
    order = []
    both = (
        lambda info: order.append(("a", info.epoch)),
        lambda info: order.append(("b", info.epoch)),
    )
    with ModelCheckpoint(tmp_path / "{epoch}", on_saved=both) as ckpt:
        train(ckpt, [1.0, 2.0])
    assert order == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]


def test_whether_it_is_the_best_is_told_of_the_series_and_not_of_the_run(tmp_path):
    seen = []
    settings = {"save_best_only": True, "on_saved": seen.append}
    with ModelCheckpoint(tmp_path / "best", **settings) as ckpt:
        train(ckpt, [0.5])
    with (
        pytest.warns(UserWarning, match="saved aside"),
        ModelCheckpoint(tmp_path / "best", **settings) as ckpt,
    ):
        train(ckpt, [0.75])
    assert [(each.path.name, each.is_best) for each in seen] == [
        ("best", True),
        ("best.aside", False),
    ]


def test_without_a_direction_nobody_knows_the_best(tmp_path):
    seen = []
    with ModelCheckpoint(tmp_path / "{epoch}", "novel", on_saved=seen.append) as ckpt:
        ckpt.save(tree_of(0), 0, logs={"novel": 1.0})
    assert [info.is_best for info in seen] == [None]


def test_a_save_by_hand_that_takes_the_place_of_a_better_one(tmp_path):
    seen = []
    settings = {"save_best_only": True, "on_saved": seen.append}
    with (
        pytest.warns(UserWarning, match="took the place"),
        ModelCheckpoint(tmp_path / "best", **settings) as ckpt,
    ):
        state = train(ckpt, [0.5])
        ckpt.save(tree_of(1), 1, logs={"val_loss": 0.75}, state=state)
        ckpt.wait()
        assert seen[1] == ckpt.latest
    assert [(each.path.name, each.is_best) for each in seen] == [
        ("best", True),
        ("best", False),
    ]


def test_the_slot_is_a_checkpoint_too(tmp_path):
    seen = []
    with ModelCheckpoint(
        tmp_path / "best", save_best_only=True, save_last=True, on_saved=seen.append
    ) as ckpt:
        train(ckpt, [0.5, 0.75])
        ckpt.wait()
        assert seen == [ckpt.best, ckpt.latest]
    assert [info.path.name for info in seen] == ["best", "last"]
    assert [info.is_best for info in seen] == [True, False]


def test_one_call_that_saves_twice_tells_of_both(tmp_path):
    """The weights in the series, and the whole state in the slot."""
    seen = []
    with ModelCheckpoint(
        tmp_path / "{epoch}",
        save_weights_only=True,
        weights=lambda tree: tree["w"],
        save_last=True,
        on_saved=seen.append,
    ) as ckpt:
        train(ckpt, [0.5])
    assert [(i.path.name, i.weights_only) for i in seen] == [
        ("1", True),
        ("last", False),
    ]


def test_a_jitted_program_tells_of_its_saves(tmp_path):
    seen = []

    def body(state, epoch):
        tree = {"w": jnp.full(3, epoch, jnp.float32)}
        logs = {"val_loss": 1.0 / (1.0 + epoch.astype(jnp.float32))}
        return ckpt.update(state, tree, logs, epoch), None

    with ModelCheckpoint(tmp_path / "{epoch}", on_saved=seen.append) as ckpt:
        jax.jit(lambda state: jax.lax.scan(body, state, jnp.arange(3)))(ckpt.init())
        ckpt.wait()
        assert tuple(seen) == ckpt.checkpoints
    assert [info.epoch for info in seen] == [0, 1, 2]
    assert [info.logs["val_loss"] for info in seen][:2] == [1.0, 0.5]


def test_a_superseded_save_is_not_told_of(tmp_path):
    hook = Held()
    with ModelCheckpoint(tmp_path / "same", on_saved=hook) as ckpt:
        state = train(ckpt, [0.0])
        assert hook.begun.wait(60)
        train(ckpt, [1.0, 2.0, 3.0], state, first=1)
        hook.go.set()
    assert [info.epoch for info in hook.seen] == [0, 3]
    assert ckpt.counts.superseded == 2


def test_in_an_object_store_the_path_is_the_url(s3):
    seen, loaded = [], []

    def load(info):
        loaded.append(flaxckpt.load(info)["w"][0])

    with ModelCheckpoint(f"{s3}/{{epoch}}", on_saved=[seen.append, load]) as ckpt:
        train(ckpt, [0.5])
        ckpt.wait()
        assert tuple(seen) == ckpt.checkpoints
    assert str(seen[0].path) == f"{s3}/1"
    assert loaded == [0]


# ---- when ----------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"max_in_flight": 1}], ids=str)
def test_a_slow_function_stops_the_next_save_and_not_the_loop(tmp_path, settings):
    """The loop goes on even if only one save at a time may be under way."""
    hook = Held()
    with ModelCheckpoint(tmp_path / "{epoch}", on_saved=hook, **settings) as ckpt:
        state = train(ckpt, [0.5])
        assert hook.begun.wait(60)
        train(ckpt, [0.25], state, first=1)
        assert [info.epoch for info in ckpt.checkpoints] == [0]
        assert ckpt.counts.delayed == 0
        hook.go.set()
        ckpt.wait()
        assert [info.epoch for info in ckpt.checkpoints] == [0, 1]


def test_what_a_function_looks_at_stays_until_it_returns(tmp_path):
    hook = Held()
    with ModelCheckpoint(tmp_path / "{epoch}", max_to_keep=1, on_saved=hook) as ckpt:
        state = train(ckpt, [0.5])
        assert hook.begun.wait(60)
        train(ckpt, [0.25], state, first=1)
        assert flaxckpt.load(hook.seen[0])["w"][0] == 0
        hook.go.set()
    with pytest.raises(flaxckpt.CheckpointNotFoundError):
        flaxckpt.load(hook.seen[0])


def test_wait_waits_for_the_functions(tmp_path):
    hook = Held()
    with ModelCheckpoint(tmp_path / "{epoch}", on_saved=hook) as ckpt:
        train(ckpt, [0.5])
        assert hook.begun.wait(60)
        waiting = threading.Thread(target=ckpt.wait)
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        hook.go.set()
        waiting.join(60)
        assert not waiting.is_alive()


# ---- errors --------------------------------------------------------------------------


def test_an_error_is_raised_once_and_the_checkpoint_stays(tmp_path):
    seen = []

    def fails(info):
        if info.epoch == 0:
            raise ValueError("boom")

    with ModelCheckpoint(tmp_path / "{epoch}", on_saved=[fails, seen.append]) as ckpt:
        state = train(ckpt, [0.5])
        with pytest.raises(HookError) as caught:
            ckpt.wait()
        ckpt.wait()
        train(ckpt, [0.25], state, first=1)
    path, function = str(tmp_path / "1"), fails.__qualname__
    assert str(caught.value) == (
        f"{path!r} is saved, but on_saved={function} then failed: ValueError: boom. The "
        "checkpoint stays. Training can go on: the next save calls the function again."
    )
    assert isinstance(caught.value, flaxckpt.CheckpointWriteError)  # as of a save
    assert isinstance(caught.value.__cause__, ValueError)
    assert [info.epoch for info in seen] == [0, 1]  # the others are called all the same
    assert flaxckpt.load(seen[0])["w"][0] == 0
    assert (ckpt.counts.saved, ckpt.counts.failed) == (2, 0)


@pytest.mark.parametrize("call", ["update", "save", "close"])
def test_the_next_call_raises_the_errors(tmp_path, call):
    def fails(info):
        raise OSError("of a logger")

    ckpt = ModelCheckpoint(tmp_path / "{epoch}", on_saved=[fails, fails])
    state = train(ckpt, [0.5])
    while len(ckpt._saves.queue._errors) < 2:
        threading.Event().wait(0.01)
    with pytest.raises(HookError, match="of a logger") as caught:
        match call:
            case "update":
                ckpt.update(state, tree_of(1), {"val_loss": 1.0}, 1)
            case "save":
                ckpt.save(tree_of(1), 1)
            case "close":
                ckpt.close()
    (note,) = caught.value.__notes__
    assert note.startswith("And: ")
    assert "is saved, but on_saved=" in note
    ckpt.close()


@pytest.mark.parametrize(
    "call",
    [
        lambda ckpt: ckpt.wait(),
        lambda ckpt: ckpt.close(),
        lambda ckpt: ckpt.restore(),
        lambda ckpt: ckpt.save(tree_of(1), 1),
        lambda ckpt: ckpt.update(ckpt.init(), tree_of(1), {"val_loss": 0.0}, 1),
    ],
    ids=["wait", "close", "restore", "save", "update"],
)
@pytest.mark.parametrize("limit", [None, 1])
def test_a_function_that_would_wait_for_itself(tmp_path, call, limit):
    settings = {"max_in_flight": limit, "on_saved": lambda info: call(ckpt)}
    with ModelCheckpoint(tmp_path / "{epoch}", **settings) as ckpt:
        train(ckpt, [0.5])
        with pytest.raises(CheckpointError, match="would wait for itself for ever"):
            ckpt.wait()
        assert [info.epoch for info in ckpt.checkpoints] == [0]


def test_a_function_may_ask_what_there_is_and_save_by_another_object(tmp_path):
    seen = []

    def copy(info):
        seen.append((ckpt.latest, ckpt.best.epoch, len(ckpt.checkpoints)))
        other.save(flaxckpt.load(info), info.epoch)
        other.wait()

    with (
        ModelCheckpoint(tmp_path / "others" / "{epoch}") as other,
        ModelCheckpoint(tmp_path / "{epoch}", on_saved=copy) as ckpt,
    ):
        train(ckpt, [0.5])
        ckpt.wait()
        assert seen == [(ckpt.latest, 0, 1)]
        assert flaxckpt.load(other.latest)["w"][0] == 0


@pytest.mark.parametrize("given", ["print", 3, [print, "print"], [None]], ids=repr)
def test_what_is_no_function(tmp_path, given):
    with pytest.raises(SettingError, match="pass a function of a CheckpointInfo, or"):
        ModelCheckpoint(tmp_path / "{epoch}", on_saved=given)
