"""Signals: the run saves once more, and ends or is told."""

import os
import signal
import threading

import numpy as np
import pytest
from subprocesses import program

from flaxckpt import ModelCheckpoint, Preempted, SettingError


def names(infos):
    return [info.path.name for info in infos]


def tree_of(epoch):
    return {"w": np.full(4, epoch, np.float32)}


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
    while ckpt._triggers.watch.signal is None:
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
assert two._triggers.watch.signal == one._triggers.watch.signal == number.name
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
    assert one._triggers.watch.signal == two._triggers.watch.signal == "SIGINT"
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
