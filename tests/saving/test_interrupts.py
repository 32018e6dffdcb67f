"""After an interrupt at any line, the object saves, waits and closes; nothing is lost."""

import gc
import json
import os
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faults import interrupts

import flaxckpt
from flaxckpt import ModelCheckpoint
from flaxckpt._checkpoints import series_writer as _series_writer
from flaxckpt._checkpoints import write as _write
from flaxckpt._disk import lock as _lock

FULL = os.environ.get("FLAXCKPT_FAULTS") == "full"
SAMPLE = None if FULL else 3
PROGRAM = Path(interrupts.__file__)


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    """A process that interrupts itself, so that what hangs does not hang the tests."""
    log = tmp_path_factory.mktemp("log") / "stderr"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", PROGRAM, "orders"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "XLA_FLAGS": ""},
        )

    def ask(**order):
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, f"it hung:\n{log.read_text()[-4000:]}"
        return json.loads(answer)

    yield ask
    process.kill()
    process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("scenario", interrupts.SCENARIOS)
def test_an_interrupted_object_goes_on(survey, scenario):
    seed = os.environ.get("FLAXCKPT_SEED", "0")
    found = survey(scenario=scenario, sample=SAMPLE, seed=f"{seed}{scenario}")
    assert found["points"]
    assert not found["problems"], "\n".join(found["problems"])


# ---- where a call blocks -----------------------------------------------------------------

BLOCKED = """
    import os, signal, sys, threading, time
    import numpy as np, flaxckpt
    from flaxckpt._checkpoints import series_writer as _series_writer
    from flaxckpt._checkpoints import write as _write

    signal.signal(signal.SIGINT, signal.default_int_handler)
    begun, go = threading.Event(), threading.Event()
    write = _write.write_checkpoint

    def wait_and_write(*args, **kwargs):
        begun.set()
        assert go.wait(60)
        return write(*args, **kwargs)

    _series_writer.write_checkpoint = wait_and_write
    ckpt = flaxckpt.ModelCheckpoint(sys.argv[1] + "/{epoch}", max_in_flight=1)
    ckpt.save({"w": np.zeros(3)}, 0)
    assert begun.wait(60)

    def interrupt():  # until the call has blocked, and been interrupted
        while not told.is_set():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)

    told = threading.Event()
    thread = threading.Thread(target=interrupt)
    calls = {
        "wait": ckpt.wait,
        "close": ckpt.close,
        "save": lambda: ckpt.save({"w": np.ones(3)}, 1),
        "restore": ckpt.restore,
    }
    try:
        thread.start()
        calls[sys.argv[2]]()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        told.set()
    thread.join()
    go.set()
    ckpt.wait()
    ckpt.save({"w": np.ones(3)}, 2)
    ckpt.close()
    assert [info.epoch for info in ckpt.checkpoints] == [0, 2]
    assert sorted(os.listdir(sys.argv[1])) == ["1", "3"]
    print("went on")
"""


@pytest.mark.parametrize("call", ["wait", "close", "save", "restore"])
def test_a_blocked_call_that_a_signal_interrupts_can_be_made_again(tmp_path, call):
    assert run(BLOCKED, tmp_path, call).stdout == "went on\n"


def run(code, *arguments, options=("-W", "ignore")):
    done = subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "XLA_FLAGS": ""},
    )
    assert done.returncode == 0, done.stderr
    return done


# ---- what users give, and what it raises -------------------------------------------------


class Refused(Exception):
    pass


class Counting:
    """A function of the user's that raises at its n-th call."""

    def __init__(self, at, result):
        self.at, self.result, self.calls = at, result, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.at:
            raise Refused
        return self.result(*args)

    def should_preserve(self, checkpoints, *, context):
        return self(checkpoints)


CALLBACKS = {
    "weights": (lambda tree: tree["params"], {"save_weights_only": True}),
    "frozen": (lambda path, leaf: path == ("params", "w"), {}),
    "preserve": (lambda infos: [True] * len(infos), {}),
}


@pytest.mark.parametrize("at", range(1, 5))
@pytest.mark.parametrize("name", CALLBACKS)
def test_what_a_user_s_function_raises_leaves_the_object_usable(tmp_path, name, at):
    function, settings = CALLBACKS[name]
    settings = {**settings, name: Counting(at, function)}
    tree = {"params": {"w": np.zeros(3), "b": jnp.ones(2)}, "opt": np.ones(2)}
    ckpt, errors, saved = ModelCheckpoint(tmp_path / "{epoch}", **settings), [], []
    for epoch in range(5):
        try:
            ckpt.save(tree, epoch)
            ckpt.wait()
            saved.append(epoch)
        except (Refused, flaxckpt.CheckpointError) as error:
            errors.append(error)
    ckpt.close()
    assert len(errors) <= 1
    assert {info.epoch for info in ckpt.checkpoints} >= set(saved)
    assert len(saved) >= 4
    assert not list(tmp_path.glob(".flaxckpt-*"))


# ---- warnings that are errors ------------------------------------------------------------


def test_close_has_released_all_before_it_warns(tmp_path):
    before = {each: interrupts.signal.getsignal(each) for each in SIGNALS}
    ckpt = ModelCheckpoint(tmp_path / "{epoch}", save_freq=5, save_on_preemption=True)
    ckpt.save({"w": np.zeros(2)}, 0)
    ckpt.update(ckpt.init(), {"w": np.zeros(2)}, {}, 0)  # without a batch
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="No check was ever due"):
            ckpt.close()
    assert os.listdir(tmp_path) == ["1"]
    assert {each: interrupts.signal.getsignal(each) for each in SIGNALS} == before


SIGNALS = (interrupts.signal.SIGTERM, interrupts.signal.SIGINT)


def test_close_tells_of_a_late_signal_when_it_has_released_all(tmp_path):
    before = {each: interrupts.signal.getsignal(each) for each in SIGNALS}
    ckpt = ModelCheckpoint(tmp_path / "{epoch}", save_on_preemption=True)
    ckpt.save({"w": np.zeros(2)}, 0)
    os.kill(os.getpid(), interrupts.signal.SIGTERM)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="SIGTERM came after"):
            ckpt.close()
    assert os.listdir(tmp_path) == ["1"]
    assert {each: interrupts.signal.getsignal(each) for each in SIGNALS} == before


def test_no_warning_takes_the_place_of_the_loop_s_error(tmp_path, monkeypatch):
    """Where warnings are errors, what `close` says are notes on it; all of it."""

    def fail(*args, **kwargs):
        raise OSError("injected")

    ckpt = ModelCheckpoint(tmp_path / "{epoch}", save_freq=5, save_on_preemption=True)
    ckpt.update(ckpt.init(), {"w": np.zeros(2)}, {}, 0)  # without a batch
    for message in ("one", "two"):
        ckpt._saves.queue.warn(message)
    os.kill(os.getpid(), interrupts.signal.SIGTERM)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyError, match="mine") as caught, ckpt:
            raise KeyError("mine")
    notes = [note.partition(",")[0] for note in caught.value.__notes__]
    assert notes == [
        "And: one",
        "And: SIGTERM came after the last call of update or save outside of jit",
        "And: two",
    ]
    ckpt = ModelCheckpoint(tmp_path / "{epoch}", save_freq=5)
    ckpt.update(ckpt.init(), {"w": np.zeros(2)}, {}, 0)
    monkeypatch.setattr(_series_writer, "write_checkpoint", fail)
    for error in (KeyError("mine"), flaxckpt.MetricError("mine", "is odd")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(type(error), match="mine") as caught, ckpt:
                raise error
        assert caught.value.__notes__[0].startswith("And: No check was ever due")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(type(error), match="mine") as caught, ckpt:
                ckpt.save({"w": np.zeros(2)}, 0)
                ckpt._saves.queue.warn("three")
                raise error
        assert caught.value.__notes__[-2] == "And: three"
        assert "injected" in caught.value.__notes__[-1]


AT_END = """
    import sys, numpy as np, flaxckpt
    from flaxckpt._checkpoints import series_writer as _series_writer
    from flaxckpt._checkpoints import write as _write

    write = _write.write_checkpoint

    def fail(what, *args, **kwargs):
        if what.info.epoch == 0:
            raise OSError("injected")
        return write(what, *args, **kwargs)

    _series_writer.write_checkpoint = fail
    all = [flaxckpt.ModelCheckpoint(f"{sys.argv[1]}/{i}/{{epoch}}") for i in range(4)]
    for ckpt in all:
        ckpt.save({"w": np.zeros(3)}, 0)
    for ckpt in all:
        ckpt._saves.queue.warn("of something")
        is_saved = False
        while not is_saved:  # what was is raised first
            try:
                is_saved = bool(ckpt.save({"w": np.zeros(3)}, 1))
            except (flaxckpt.CheckpointError, UserWarning):
                pass
        ckpt._saves.queue.warn("of something")
"""


def test_at_the_end_of_a_program_no_warning_keeps_others_from_being_saved(tmp_path):
    done = run(AT_END, tmp_path, options=("-W", "error::UserWarning"))
    assert [os.listdir(tmp_path / f"{i}") for i in range(4)] == [["2"]] * 4
    assert done.stderr.count("of something") >= 4


# ---- objects that nobody closes ----------------------------------------------------------


def test_a_dropped_object_lets_lock_and_signals_go(tmp_path):
    before = {each: interrupts.signal.getsignal(each) for each in SIGNALS}
    ckpt = ModelCheckpoint(tmp_path / "{epoch}", save_on_preemption=True)
    ckpt.save({"w": jnp.zeros(2)}, 0)
    ckpt.wait()
    assert list(tmp_path.glob(".flaxckpt-*.lock"))
    join(ckpt)
    del ckpt
    gc.collect()
    assert os.listdir(tmp_path) == ["1"]
    assert {each: interrupts.signal.getsignal(each) for each in SIGNALS} == before


def join(ckpt):
    """Wait for the thread that writes, which holds on to what it saves with."""
    thread = ckpt._saves.queue._thread
    if thread is not None:
        thread.join()


def test_a_dropped_object_finishes_what_it_saves_first(tmp_path, monkeypatch):
    begun, go, gone = threading.Event(), threading.Event(), threading.Event()
    write = _write.write_checkpoint

    def wait_and_write(*args, **kwargs):
        begun.set()
        assert go.wait(60)
        return write(*args, **kwargs)

    monkeypatch.setattr(_series_writer, "write_checkpoint", wait_and_write)
    drop = _lock.FileLock.drop

    def note(*args):
        drop(*args)
        gone.set()

    monkeypatch.setattr(_lock.FileLock, "drop", note)
    ckpt = ModelCheckpoint(tmp_path / "{epoch}")
    for epoch in range(3):
        ckpt.save({"w": np.full(2, epoch)}, epoch)
    assert begun.wait(60)
    del ckpt
    gc.collect()
    assert not gone.is_set()
    assert list(tmp_path.glob(".flaxckpt-*.lock"))
    go.set()
    assert gone.wait(60)
    assert sorted(os.listdir(tmp_path)) == ["1", "2", "3"]
    for epoch in range(3):
        assert (flaxckpt.load(tmp_path / f"{epoch + 1}")["w"] == epoch).all()


ELSEWHERE = """
    import sys, numpy as np, flaxckpt
    with flaxckpt.ModelCheckpoint(sys.argv[1] + "/{epoch}") as ckpt:
        ckpt.save({"w": np.zeros(2)}, 9)
    print("saved")
"""


def test_a_cell_that_is_run_again(tmp_path):
    for epoch in range(3):
        ckpt = ModelCheckpoint(tmp_path / "{epoch}", max_to_keep=2)
        ckpt.save({"w": np.zeros(2)}, epoch)
        ckpt.wait()
    join(ckpt)
    del ckpt
    gc.collect()
    assert run(ELSEWHERE, tmp_path).stdout == "saved\n"
    assert sorted(os.listdir(tmp_path)) == ["10", "2", "3"]


def test_an_object_dropped_while_it_saves_leaves_nothing(tmp_path):
    from flaxckpt._saving import at_exit as _at_exit

    gc.collect()
    before, unheard = len(jax.live_arrays()), {*_at_exit.UNHEARD}
    threads = []
    for epoch in range(3):
        ckpt = ModelCheckpoint(tmp_path / f"{epoch}" / "{epoch}")
        ckpt.save({"w": jnp.zeros(2**18)}, epoch)
        threads.append(ckpt._saves.queue._thread)
        del ckpt
    for thread in threads:
        thread.join(60)
    gc.collect()
    assert {*_at_exit.UNHEARD} <= unheard
    assert len(jax.live_arrays()) <= before + 2  # an argument of the copies stays
    for epoch in range(3):
        assert flaxckpt.load(tmp_path / f"{epoch}" / f"{epoch + 1}")["w"].size == 2**18


def test_a_dropped_object_s_memory_is_let_go(tmp_path):
    from flaxckpt._saving import at_exit as _at_exit

    ckpt = ModelCheckpoint(tmp_path / "{epoch}")
    ckpt.save({"w": jnp.zeros(2)}, 0)
    queue = ckpt._saves.queue
    join(ckpt)
    assert queue._memory
    del ckpt
    gc.collect()
    assert not queue._memory
    assert queue not in _at_exit.UNHEARD
