"""Raises KeyboardInterrupt at chosen lines of a call, and tells what does not go on.

For each line of JSON, `{"scenario", "sample", "seed"}`, it answers with one: at how many
lines of the source the call was interrupted, and the problems. `sample` is null for all
lines. A call that hangs ends the process, with all stacks.

    python tests/faults/interrupts.py             every line of every scenario
    python tests/faults/interrupts.py wait close  of these
    python tests/faults/interrupts.py orders      reads them
"""

import collections
import contextlib
import faulthandler
import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import flaxckpt
from flaxckpt._checkpoints import series_writer as _series_writer
from flaxckpt._checkpoints import write as _write
from flaxckpt._saving import call as _call
from flaxckpt._saving import contents as _contents
from flaxckpt._saving import paths as _paths
from flaxckpt._saving import queue as _queue

PACKAGE = os.path.dirname(flaxckpt.__file__)
DEADLINE_SECS = 60
_queue._IDLE_SECS = 0.05


class Interrupt:
    """Interrupts this thread before the line of that number, of those in the package.

    Attributes:
        lines: How many there were.
        first: For each place in the source, the first line that was there.
        where: The place that was not reached.
    """

    def __init__(self, at=None):
        self.at, self.lines, self.first, self.where = at, 0, {}, ""

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
            name = os.path.basename(frame.f_code.co_filename)
            place = f"{name}:{frame.f_lineno}"
            self.first.setdefault(place, self.lines)
            if self.lines == self.at:
                self.where = place
                raise KeyboardInterrupt
        return self._trace


def tree_of(epoch):
    return {
        "w": jnp.full((40, 30), epoch, jnp.float32),
        "b": jnp.full(3, epoch, jnp.float32),
        "host": np.full(5, epoch),
        "base": jnp.arange(6.0),
        "epoch": epoch,
    }


def epoch_of(path):
    """The epoch of a checkpoint, all of which must be of one."""
    tree = flaxckpt.load(path)
    for name in ("w", "b", "host"):
        assert (tree[name] == tree["epoch"]).all(), f"{path} is torn"
    return tree["epoch"]


class Run:
    """A run that is interrupted.

    Attributes:
        accepted: For each path, the newest epoch for which a call has returned.
        directory: Where it saves.
        ckpt: The object.
        state: Its state.
    """

    def __init__(self, directory, template="{epoch}", **settings):
        self.directory, self.template = Path(directory), template
        self.settings, self.accepted = settings, {}
        self.ckpt = self.make()
        self.state = self.ckpt.init()
        self.epoch = -1
        self._arrived, self._go = threading.Event(), threading.Event()
        self._go.set()
        self._patch = mock.patch.object(_series_writer, "write_checkpoint", self._write)
        self._original = _write.write_checkpoint
        self._patch.start()

    def make(self):
        path = self.directory / self.template
        engine = os.environ.get("FLAXCKPT_TEST_ENGINE", "auto")
        return flaxckpt.ModelCheckpoint(path, "loss", engine=engine, **self.settings)

    def _write(self, *args, **kwargs):
        self._arrived.set()
        assert self._go.wait(DEADLINE_SECS)
        return self._original(*args, **kwargs)

    def hold(self):
        """Have the next write wait, once it is begun."""
        self._go.clear()
        self._arrived.clear()

    def begun(self):
        assert self._arrived.wait(DEADLINE_SECS)

    def go(self):
        self._go.set()

    def update(self, **kwargs):
        self.epoch += 1
        loss = jnp.float32(-self.epoch).block_until_ready()
        self.state = self.ckpt.update(
            self.state, tree_of(self.epoch), {"loss": loss}, self.epoch, **kwargs
        )
        self.accept()

    def save(self):
        self.epoch += 1
        self.ckpt.save(tree_of(self.epoch), self.epoch, logs={"loss": -self.epoch})
        self.accept()

    def accept(self):
        name = self.template.format(epoch=self.epoch + 1)
        self.accepted[name] = self.epoch

    def end(self):
        self.go()
        self._patch.stop()


# ---- scenarios ---------------------------------------------------------------------------
# Each makes a run, and returns it with the call to interrupt.


def warm(run, number=3):
    for _ in range(number):
        run.update()
        run.ckpt.wait()
    return run


def first_save(directory):
    run = Run(directory, "new/{epoch}")
    run.template = "new/{epoch}"
    return run, run.save


def update(directory):
    run = warm(Run(directory, max_to_keep=2, save_last=True))
    return run, run.update


def update_with_a_policy(directory):
    run = warm(Run(directory, "best", save_best_only=True, save_last=True))
    return run, run.update


def refill(settings):
    """A save takes the place, and the memory, of one that waits for its turn."""

    def scenario(directory):
        run = warm(Run(directory, "best", **settings))
        run.hold()
        run.update()
        run.begun()
        run.update()
        return run, run.update

    return scenario


def is_array(value):
    return isinstance(value, jax.Array)


def late(directory):
    """The device decides."""
    run, call = refill({"save_best_only": True})(directory)

    def late_update():
        with contextlib.ExitStack() as stack:
            for module in (_call, _contents, _paths):
                patch = mock.patch.object(module, "is_unknown", is_array)
                stack.enter_context(patch)
            call()

    return run, late_update


def delayed(directory):
    """A call waits until an earlier save is written."""
    run = warm(Run(directory, max_in_flight=1))
    run.hold()
    run.update()
    run.begun()
    threading.Timer(0.02, run.go).start()
    return run, run.update


def no_copy(directory):
    run = warm(Run(directory, snapshot="none"), 1)
    return run, run.save


def frozen(directory):
    run = warm(Run(directory, frozen=lambda path, leaf: path == ("base",)))
    return run, run.update


def under_way(directory, **settings):
    run = warm(Run(directory, **settings), 2)
    run.hold()
    run.update()
    threading.Timer(0.02, run.go).start()
    return run


def wait(directory):
    run = under_way(directory)
    return run, run.ckpt.wait


def close(directory):
    run = under_way(directory, save_on_preemption=True)
    return run, run.ckpt.close


def leave(directory):
    run = under_way(directory, save_on_preemption=True)

    def loop():
        with contextlib.suppress(ZeroDivisionError), run.ckpt:
            raise ZeroDivisionError

    return run, loop


def restore(directory):
    run = under_way(directory)
    like = tree_of(0)

    def call():
        assert run.ckpt.restore(like).epoch == run.epoch
        assert run.ckpt.restore(which="best").epoch == run.epoch
        assert run.ckpt.latest.epoch == run.epoch

    return run, call


def make(directory):
    run = Run(directory, save_on_preemption=True)
    run.ckpt.close()

    def call():
        run.ckpt = None
        run.ckpt = run.make()
        run.state = run.ckpt.init(like=tree_of(0))

    return run, call


def save_snapshot(directory):
    run = Run(directory)
    logs = {"loss": jnp.float32(0)}
    snapshot = flaxckpt.Snapshot.like(tree_of(0), logs, 2)
    for epoch in range(2):
        logs = {"loss": jnp.float32(-epoch)}
        snapshot = snapshot.take(True, tree_of(epoch), logs, epoch)

    def call():
        run.ckpt.save_snapshot(snapshot)
        for run.epoch in range(2):
            run.accept()

    return run, call


def chunks(directory):
    run = Run(directory)
    body = lambda carry, x: (carry + x, x)  # noqa: E731

    def call():
        for part in flaxckpt.scan_in_chunks(body, 0.0, jnp.arange(4.0), chunk=2):
            run.epoch += 1
            tree = {**tree_of(run.epoch), "carry": part.carry}
            run.ckpt.save(tree, run.epoch)
            run.accept()

    return run, call


def traced(directory):
    run = Run(directory)

    @jax.jit
    def program(state, tree, loss, epoch):
        return run.ckpt.update(state, tree, {"loss": loss}, epoch)

    def call():
        run.epoch += 1
        tree = tree_of(run.epoch)
        run.state = program(run.state, tree, jnp.float32(0), run.epoch)
        jax.effects_barrier()
        run.accept()

    return run, call


SCENARIOS = {
    "first save": first_save,
    "update": update,
    "update of the best": update_with_a_policy,
    "refill on the device": refill({"save_best_only": True}),
    "refill on the host": refill({"snapshot": "host"}),
    "decided on the device": late,
    "delayed": delayed,
    "no copy": no_copy,
    "frozen": frozen,
    "wait": wait,
    "close": close,
    "leave": leave,
    "restore": restore,
    "make": make,
    "save a snapshot": save_snapshot,
    "scan in chunks": chunks,
    "traced": traced,
}


# ---- one point ---------------------------------------------------------------------------


def attempt(scenario, at):
    """Interrupt a call; return the lines of its places, and the problem, if any."""
    handlers = {
        each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)
    }
    directory = tempfile.mkdtemp(prefix="flaxckpt-interrupt-")
    gc.collect()  # what ends here of the attempt before is no line of this call
    faulthandler.dump_traceback_later(DEADLINE_SECS, exit=True)
    interrupt, problem, run = Interrupt(at), "", None
    try:
        run, call = SCENARIOS[scenario](directory)
        with interrupt:
            try:
                call()
            except BaseException as error:
                if not is_interrupt(error):
                    raise
        run.go()
        go_on(run)
        settled(run, handlers)
    except BaseException:
        problem = f"{interrupt.where} ({at}): {traceback.format_exc()}"
    finally:
        sys.settrace(None)
        faulthandler.cancel_dump_traceback_later()
        if run is not None:
            run.end()
        shutil.rmtree(directory, ignore_errors=True)
        for each, handler in handlers.items():
            signal.signal(each, handler)
    return interrupt.first, problem


def is_interrupt(error):
    """Tell whether this is an interrupt, or JAX's error for one within its own call."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        if "KeyboardInterrupt" in str(error):  # of a callback: its text is all there is
            return True
        error = error.__cause__
    return error is not None


def go_on(run):
    """Check that the object saves, waits and closes, and that nothing was lost."""
    if run.ckpt is None:
        run.ckpt = run.make()
    run.ckpt.wait()
    assert_kept(run, "after wait")
    # And once more at once: the call may have been the last before the next update.
    run.epoch += 1
    run.ckpt.save(tree_of(run.epoch), run.epoch, logs={"loss": -run.epoch})
    run.accept()
    run.ckpt.wait()
    assert_kept(run, "after the next save")
    assert len([t for t in threading.enumerate() if t.name == "flaxckpt"]) <= 1
    assert not run.ckpt._saves.queue._jobs
    run.ckpt.close()


def assert_kept(run, when):
    names = {info.path.name for info in run.ckpt.checkpoints}
    kept = list(run.accepted)
    if run.settings.get("max_to_keep"):
        kept = kept[-1:]
    for name in kept:
        assert Path(name).name in names, f"{name} is not there {when}: {names}"
        found = epoch_of(run.directory / name)
        assert found >= run.accepted[name], f"{name} is of {found} {when}"


def settled(run, handlers):
    """Check that nothing is held any more, and that another object goes on."""
    hidden = [p.name for p in run.directory.rglob(".flaxckpt-*")]
    assert not hidden, f"left after close: {hidden}"
    for each, handler in handlers.items():
        assert signal.getsignal(each) == handler, f"{each!r} is not given back"
    see_threads_end()
    with run.make() as other:
        other.save(tree_of(77), 77)
    see_threads_end()  # or the next attempt would take them for its own
    for info in other.checkpoints:
        assert epoch_of(info.path) == info.epoch
    hidden = [p.name for p in run.directory.rglob(".flaxckpt-*")]
    assert not hidden, f"left by the next one: {hidden}"


def see_threads_end():
    """Wait until the library has no thread; one that idles ends by itself."""
    until = time.monotonic() + DEADLINE_SECS / 2
    while any(t.name.startswith("flaxckpt") for t in threading.enumerate()):
        left = collections.Counter(t.name for t in threading.enumerate())
        assert time.monotonic() < until, f"threads are left: {left}"
        time.sleep(0.005)


def survey(scenario, sample=None, seed="0"):
    """Interrupt a call at some places of the source that it comes to, or at all.

    Returns:
        How many there are, at how many it was interrupted, and the problems.
    """
    attempt(scenario, None)  # compiles
    first, problem = attempt(scenario, None)
    problems = [problem] if problem else []
    points = sorted(first.values())
    if sample is not None:
        points = sorted(random.Random(seed).sample(points, min(sample, len(points))))
    for at in points:
        _, problem = attempt(scenario, at)
        problems += [problem] * bool(problem)
    return {"places": len(first), "points": len(points), "problems": problems}


def main():
    if sys.argv[1:] == ["orders"]:
        for line in sys.stdin:
            print(json.dumps(survey(**json.loads(line))), flush=True)
        return
    for scenario in sys.argv[1:] or SCENARIOS:
        found = survey(scenario)
        print(f"{scenario}: {found['points']} lines, {len(found['problems'])} problems")
        print("\n".join(found["problems"]), flush=True)


if __name__ == "__main__":
    main()
