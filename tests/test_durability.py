"""Locks, preemption, and the slot of the last state."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

import flaxckpt
from flaxckpt import CheckpointLockedError, ModelCheckpoint, Preempted, SettingError
from flaxckpt._disk import exchange as _exchange
from flaxckpt._disk import lock as _lock


def program(code, *arguments):
    """Start Python code in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XLA_FLAGS": ""},
    )


def names(infos):
    return [info.path.name for info in infos]


def tree_of(epoch):
    return {"w": np.full(4, epoch, np.float32)}


# ---- one writer at a time --------------------------------------------------------------

HOLDER = """
    import sys, absl.logging
    absl.logging.set_verbosity("fatal")
    import numpy as np, flaxckpt
    ckpt = flaxckpt.ModelCheckpoint(sys.argv[1] + "/{epoch}")
    ckpt.save({"w": np.zeros(1)}, epoch=0)
    ckpt.wait()
    print("saved", flush=True)
    sys.stdin.readline()
    ckpt.close()
    print("closed", flush=True)
    sys.stdin.readline()
"""


def test_a_second_writer_is_told_of_the_first(tmp_path):
    holder = program(HOLDER, tmp_path)
    try:
        assert holder.stdout.readline() == "saved\n"
        ckpt = ModelCheckpoint(tmp_path / "{epoch}")
        assert names(ckpt.checkpoints) == ["1"]  # reading is free
        assert ckpt.restore().epoch == 0
        with pytest.raises(CheckpointLockedError) as caught:
            ckpt.update(ckpt.init(), tree_of(1), {}, 1)
        assert str(caught.value) == (
            f"The checkpoints in {str(tmp_path)!r} are being written by process "
            f"{holder.pid} on {socket.gethostname()}. End that one, or choose another "
            "filepath."
        )
        assert names(ckpt.checkpoints) == ["1"]
        with ModelCheckpoint(tmp_path / "other-{epoch}") as other:
            other.save(tree_of(0), epoch=0)  # another series
        print(file=holder.stdin, flush=True)
        assert holder.stdout.readline() == "closed\n"
        ckpt.update(ckpt.init(), tree_of(1), {}, 1)
        ckpt.close()
        assert sorted(os.listdir(tmp_path)) == ["1", "2", "other-1"]
    finally:
        holder.kill()
        holder.communicate()


def test_the_lock_of_a_killed_process_is_stale(tmp_path):
    holder = program(HOLDER, tmp_path)
    assert holder.stdout.readline() == "saved\n"
    holder.kill()
    holder.communicate()
    assert [name for name in os.listdir(tmp_path) if name.endswith(".lock")]
    leftover = next(n for n in os.listdir(tmp_path) if n.endswith(".lock"))[:-5] + "-x"
    (tmp_path / leftover).mkdir()  # as it would leave in the middle of a save
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        ckpt.save(tree_of(1), epoch=1)
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_objects_of_one_process_share_the_lock(tmp_path):
    first, second = (ModelCheckpoint(tmp_path / "{epoch}") for _ in range(2))
    first.save(tree_of(0), epoch=0)
    second.save(tree_of(1), epoch=1)
    first.close()
    assert [name for name in os.listdir(tmp_path) if name.endswith(".lock")]
    second.close()
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(_lock, "HEARTBEAT_SECS", 0.05)
    monkeypatch.setattr(_lock, "WATCH_SECS", 0.3)


def test_another_machine_s_lock_holds_while_its_heart_beats(tmp_path, quick):
    """Where the machines' kernels share no locks."""
    path = tmp_path / "x.lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7}))
    stop = threading.Event()

    def beat():
        while not stop.wait(0.02):
            os.utime(path)

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with pytest.raises(CheckpointLockedError, match="process 7 on elsewhere"):
            _lock.acquire_lock(path)
    finally:
        stop.set()
        heart.join()
    assert _lock.acquire_lock(path)  # no sign of life any more
    assert json.loads(path.read_text())["pid"] == os.getpid()
    before = path.stat().st_mtime_ns
    until = time.monotonic() + 10
    while path.stat().st_mtime_ns == before:
        assert time.monotonic() < until
        time.sleep(0.01)
    _lock.release_lock(path)
    assert not path.exists()


# ---- preemption --------------------------------------------------------------------------

PREEMPTED = """
    import os, signal, sys, absl.logging
    absl.logging.set_verbosity("fatal")
    import numpy as np, flaxckpt
    mode = sys.argv[2]
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    ckpt = flaxckpt.ModelCheckpoint(
        sys.argv[1] + "/best", save_best_only=True,
        save_on_preemption="flag" if mode == "flag" else True,
    )
    with ckpt:
        found = ckpt.restore()
        state = found.state if found else ckpt.init()
        epoch = found.epoch + 1 if found else 0
        try:
            while not ckpt.preempted:
                tree = {"w": np.full(4, epoch, np.float32)}
                state = ckpt.update(state, tree, {"val_loss": 1.0 + epoch}, epoch)
                print("epoch", epoch, flush=True)
                if epoch == 3:
                    ckpt.wait()
                    print("ready", flush=True)
                    sys.stdin.readline()
                epoch += 1
        except flaxckpt.Preempted as error:
            print(error, flush=True)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    print("ended", flush=True)
"""


@pytest.mark.parametrize("mode", ["raise", "flag"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_the_next_update(tmp_path, mode, number):
    process = program(PREEMPTED, tmp_path, mode)
    for line in process.stdout:
        if line == "ready\n":
            break
    process.send_signal(number)
    out, err = process.communicate("\n", timeout=60)
    assert process.returncode == 0, err
    if mode == "raise":
        assert out == (
            f"Told to end by {number.name}; saved '{tmp_path}/last'. End the program "
            "now, and restore the latest checkpoint when it runs again.\nended\n"
        )
    else:
        assert out == "epoch 4\nended\n"
    with ModelCheckpoint(tmp_path / "best", save_best_only=True) as ckpt:
        found = ckpt.restore()  # the best is not overwritten by what was not better
        assert (found.epoch, found.path.name) == (4, "last")
        assert (found.tree["w"] == 4).all()
        assert found.state.best == 1.0
        assert ckpt.best.epoch == 0
        assert ckpt.latest.path.name == "last"
        assert names(ckpt.checkpoints) == ["best"]


IMPATIENT = """
    import signal, sys, time, numpy as np, flaxckpt
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    ckpt = flaxckpt.ModelCheckpoint(sys.argv[1] + "/best", save_on_preemption=True)
    ckpt.save({"w": np.zeros(1)}, epoch=0)
    print("ready", flush=True)
    while ckpt._watch.signal is None:
        time.sleep(0.01)
    print("told", flush=True)
    while True:  # a signal may go to another thread, which wakes nobody up
        time.sleep(0.01)
"""


def test_a_second_signal_ends_the_process(tmp_path):
    process = program(IMPATIENT, tmp_path)
    for expected in ("ready", "told"):
        for line in process.stdout:
            if line == f"{expected}\n":
                break
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode not in (0, None)
    assert "KeyboardInterrupt" in err


def test_signals_are_of_the_main_thread(tmp_path):
    caught = []

    def make():
        try:
            ModelCheckpoint(tmp_path / "{epoch}", save_on_preemption=True)
        except SettingError as error:
            caught.append(str(error))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert caught == [
        "save_on_preemption=True cannot work: signals are handled in the main thread "
        "only. Make the object there."
    ]


def test_several_objects_hear_the_same_signal(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    one = ModelCheckpoint(tmp_path / "one/{epoch}", save_on_preemption=True)
    two = ModelCheckpoint(tmp_path / "two/{epoch}", save_on_preemption="flag")
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Preempted) as caught:
        one.update(one.init(), tree_of(0), {}, 0, 5)
    assert caught.value.path == str(tmp_path / "one/last")
    assert caught.value.signal == "SIGTERM"
    assert one.restore().batch == 5
    two.update(two.init(), tree_of(0), {}, 0)  # due anyway: no slot needed
    assert two.preempted
    assert names(two.checkpoints) == ["1"]
    assert not (tmp_path / "two/last").exists()
    one.close()
    assert signal.getsignal(signal.SIGTERM) != before
    two.close()
    assert signal.getsignal(signal.SIGTERM) == before


# Handlers that others set while an object watches: what a process says, and ends with.
CHAINED = """
    import os, signal, sys, flaxckpt

    def made():
        return flaxckpt.ModelCheckpoint(directory + "/{epoch}", save_on_preemption=True)

    def chained():
        old = signal.getsignal(number)
        signal.signal(number, lambda *args: (print("chained", flush=True), old(*args)))

    def forked(act):
        child = os.fork()
        if not child:
            try:
                act()
                print("deaf", flush=True)
            except KeyboardInterrupt:
                print("interrupted", flush=True)
            except BaseException as error:
                print(repr(error), flush=True)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    directory, name, *scenarios = sys.argv[1:]
    number = signal.Signals[name]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    for scenario in scenarios:
        def act():
            exec(scenario)
        print(f"ended with {forked(act)}", flush=True)
"""
SCENARIOS = [
    """ckpt = made(); chained(); ckpt.close()
signal.raise_signal(number)""",
    """one = made(); chained(); two = made(); chained(); one.close(); two.close()
signal.raise_signal(number)""",
    """one = made(); chained(); two = made()
signal.raise_signal(number)
assert two._watch.signal == one._watch.signal == number.name
signal.raise_signal(number)""",
    """before = signal.getsignal(number)
ckpt = made(); ours = signal.getsignal(number); ckpt.close()
assert signal.getsignal(number) == before
signal.signal(number, ours)
signal.raise_signal(number)""",
    """ckpt = made(); chained()
print(forked(lambda: signal.raise_signal(number)), flush=True)""",
]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_handlers_that_call_the_ones_before_end_the_process(tmp_path, number):
    process = program(CHAINED, tmp_path, number.name, *SCENARIOS)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    end = "ended with -15\n"
    if number == signal.SIGINT:
        end = "interrupted\nended with 0\n"
    in_fork = end.replace("ended with ", "") + "deaf\nended with 0\n"
    chained = "chained\n"
    assert out == (
        f"{chained}{end}{chained}{chained}{end}{chained}{end}{end}{chained}{in_fork}"
    )


@pytest.fixture
def handlers():
    """Sets the handlers of before again."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


SIGNALS = (signal.SIGTERM, signal.SIGINT)


def test_a_signal_that_another_handler_was_set_for_is_watched_again(tmp_path, handlers):
    """As a notebook sets SIGINT before each cell, and back after it."""
    one = ModelCheckpoint(tmp_path / "{epoch}", save_on_preemption="flag")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    two = ModelCheckpoint(tmp_path / "{epoch}", save_on_preemption="flag")
    signal.raise_signal(signal.SIGINT)
    assert one._watch.signal == two._watch.signal == "SIGINT"
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    for ckpt in (one, two):
        ckpt.update(ckpt.init(), tree_of(0), {}, 0)
        ckpt.close()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == handlers[signal.SIGTERM]


def test_a_handler_that_c_has_set(tmp_path, monkeypatch, handlers):
    """Python knows of none then, and cannot set it again."""
    known = signal.getsignal

    def getsignal(number):
        found = known(number)
        return None if found == handlers[number] else found

    monkeypatch.setattr(signal, "getsignal", getsignal)
    ckpt = ModelCheckpoint(tmp_path / "{epoch}", save_on_preemption="flag")
    signal.raise_signal(signal.SIGTERM)
    assert ckpt.update(ckpt.init(), tree_of(0), {}, 0) is not None
    assert ckpt.preempted
    ckpt.close()
    with ModelCheckpoint(tmp_path / "{epoch}", save_on_preemption="flag") as ckpt:
        signal.raise_signal(signal.SIGTERM)
        ckpt.update(ckpt.init(), tree_of(1), {}, 1)
        assert ckpt.preempted


# ---- the last state, beside the best -----------------------------------------------------


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


def test_without_syncing(tmp_path):
    with ModelCheckpoint(tmp_path / "best", sync=False) as ckpt:
        for epoch in range(2):
            ckpt.save(tree_of(epoch), epoch=epoch)
        assert ckpt.restore().epoch == 1


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


def test_preempted_names_what_can_be_resumed_from(tmp_path):
    tree = {"params": {"w": np.ones(3)}, "opt_state": {"m": np.zeros(3)}}
    with ModelCheckpoint(
        tmp_path / "best", save_weights_only=True, save_on_preemption=True
    ) as ckpt:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Preempted) as caught:
            ckpt.update(ckpt.init(), tree, {}, 0)
        assert caught.value.path == str(tmp_path / "last")
        assert ckpt.restore(like=tree, which=caught.value.path).epoch == 0
