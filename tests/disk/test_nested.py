"""Calls from within a call, as a signal handler of the user makes them."""

import os
import random
import sys
import threading

import numpy as np
import pytest

import flaxckpt
from flaxckpt import CheckpointError, ModelCheckpoint
from flaxckpt._disk import lock as _lock

PACKAGE = os.path.dirname(flaxckpt.__file__)
FULL = os.environ.get("FLAXCKPT_FAULTS") == "full"
SEED = int(os.environ.get("FLAXCKPT_SEED", "0"))


class Handler:
    """Calls a function before one line of those that this thread runs in the package.

    Attributes:
        lines: How many lines there were.
    """

    def __init__(self, at, function):
        self.at, self.function, self.lines = at, function, 0

    def __enter__(self):
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def _trace(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                self.function()
        return self._trace


def tree_of(epoch):
    return {"w": np.full(300, epoch, np.float32)}


def lines_of(call):
    with Handler(0, None) as counted:
        call()
    lines = list(range(1, counted.lines + 1))
    return lines if FULL else sorted(random.Random(SEED).sample(lines, 40))


def assert_holds(ckpt, epochs):
    names = [info.path.name for info in ckpt.checkpoints]
    assert sorted(names, key=int) == [str(epoch + 1) for epoch in epochs]
    for info in ckpt.checkpoints:
        assert (flaxckpt.load(info)["w"] == int(info.path.name) - 1).all()


@pytest.mark.parametrize("name", ["wait", "latest", "check"])
def test_a_handler_that_looks_or_waits_loses_nothing(tmp_path, name):
    with ModelCheckpoint(tmp_path / "{epoch}", "loss") as ckpt:
        call = {
            "wait": ckpt.wait,
            "latest": lambda: ckpt.latest,
            "check": lambda: ckpt.update(ckpt.init(), None, None, 0, 0),
        }[name]
        state = ckpt.update(ckpt.init(), tree_of(0), None, 0)
        lines = lines_of(lambda: ckpt.update(state, tree_of(1), None, 1))
        for epoch, at in enumerate(lines, start=2):
            with Handler(at, call):
                state = ckpt.update(state, tree_of(epoch), None, epoch)
        ckpt.wait()
        assert_holds(ckpt, range(len(lines) + 2))
        assert ckpt.counts.failed == 0


def test_a_handler_that_saves_saves_or_says_that_it_cannot(tmp_path):
    with (
        ModelCheckpoint(tmp_path / "{epoch}", "loss", max_in_flight=1) as ckpt,
    ):
        state = ckpt.update(ckpt.init(), tree_of(0), None, 0)
        lines = lines_of(lambda: ckpt.update(state, tree_of(1), None, 1))
        saved, refused = [0, 1], {}
        for epoch, at in zip(range(2, 10**6, 2), lines, strict=False):
            nested = epoch + 1
            done = []

            def save(nested=nested, done=done):
                ckpt.save(tree_of(nested), nested)
                done.append(nested)

            try:
                with Handler(at, save):
                    state = ckpt.update(state, tree_of(epoch), None, epoch)
                saved.append(epoch)
            except CheckpointError as error:
                refused[epoch] = str(error)
            saved += done
        ckpt.wait()
        assert refused
        assert all("within another call" in error for error in refused.values())
        # The call that was refused within another one has ended that one, too, which
        # may have had its copy by then.
        also = {int(info.path.name) - 1 for info in ckpt.checkpoints} & {*refused}
        assert_holds(ckpt, sorted({*saved, *also}))


def test_saving_goes_on_once_threads_can_be_started_again(tmp_path, monkeypatch):
    start = threading.Thread.start

    def fails(thread):
        if thread.name == "flaxckpt":
            raise RuntimeError("can't start new thread")
        start(thread)

    with ModelCheckpoint(tmp_path / "{epoch}", max_in_flight=1) as ckpt:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fails)
            for epoch in range(3):
                with pytest.raises(RuntimeError, match="new thread"):
                    ckpt.save(tree_of(epoch), epoch)
        ckpt.save(tree_of(3), 3)
        ckpt.wait()
        assert ckpt.latest.path.name == "4"


def test_a_lock_is_given_back_at_the_end_though_a_thread_was_stopped(
    tmp_path, monkeypatch
):
    ckpt = ModelCheckpoint(tmp_path / "{epoch}")
    ckpt.save(tree_of(0), 0)
    ckpt.wait()
    taken, over = threading.Event(), threading.Event()

    def stopped():
        with _lock._guard:
            taken.set()
            over.wait()

    thread = threading.Thread(target=stopped, daemon=True)
    thread.start()
    taken.wait()
    monkeypatch.setattr(sys, "is_finalizing", lambda: True)
    ckpt.close()  # and does not wait for ever
    monkeypatch.undo()
    over.set()
    thread.join()
    ckpt.close()
