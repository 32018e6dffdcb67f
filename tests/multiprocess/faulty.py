"""Workers in which one process meets a fault at a chosen moment of a save.

A moment is the n-th time that the process comes to a point: just before or after it
sends or hears a message, at a file call in Python, or where its loop calls `save` or
copies.
"""

import ctypes
import faulthandler
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import workers
from workers import mesh_of, place, say

import flaxckpt
from flaxckpt._checkpoints import together
from flaxckpt._pods.saves import PodSaver
from flaxckpt._processes import messages
from flaxckpt._runtime import patience

EPOCHS = 2  # that are saved while the fault may strike
TRIES = 3
ORDER_SECS = 90
_DETACH = 2
_LIBC = ctypes.CDLL(None, use_errno=True)


class Moment:
    """The moment at which a fault strikes this process."""

    def __init__(self):
        self._lock, self._fault, self._left = threading.Lock(), None, 0
        self.is_silent, self.hidden, self.has_struck = False, [], False

    def set(self, fault, directory):
        """Choose the moment; None for no fault."""
        self._directory = str(directory)
        self._left = fault["number"] if fault else 0
        self._fault = fault
        if fault is not None:
            self.has_struck = False

    def heal(self):
        """Show again what was hidden."""
        self.set(None, self._directory)
        while self.hidden:
            _LIBC.umount2(os.fsencode(self.hidden.pop()), _DETACH)

    def comes_to(self, point, path=None):
        """Strike, if this is the moment."""
        fault = self._fault
        if fault is None or fault["point"] != point:
            return
        if threading.current_thread().name == messages.SIGNS:
            return
        if path is not None and not path.startswith(self._directory):
            return
        with self._lock:
            self._left -= 1
            if self._left >= 0 or self._fault is None:
                return
            self._fault, self.has_struck = None, True
        getattr(self, f"_{fault['kind']}")(fault)

    def _late(self, fault):
        time.sleep(fault["secs"])

    def _silent(self, fault):
        """Be late, and give no signs of life."""
        self.is_silent = True
        time.sleep(fault["secs"])
        self.is_silent = False

    def _stopped(self, fault):
        """Be stopped whole."""
        wake = f"sleep {fault['secs']}; kill -CONT {os.getpid()}"
        with subprocess.Popen(["sh", "-c", wake]):
            os.kill(os.getpid(), signal.SIGSTOP)

    def _blind(self, fault):
        """See nothing of what others have written below the directory, nor they this."""
        path = self._directory
        if fault["in_share"]:
            hidden = Path(path).glob(".flaxckpt-*/new/state")
            path = str(next(hidden, path))
        if _LIBC.mount(b"none", os.fsencode(path), b"tmpfs", 0, None):
            raise AssertionError(f"cannot hide {path}")
        self.hidden.append(path)

    def _failing(self, fault):
        raise OSError(28, "No space left on device")

    def _refusing(self, fault):
        raise MemoryError("no room for a copy")

    def _dead(self, fault):
        os.kill(os.getpid(), signal.SIGKILL)


MOMENT = Moment()


def install():
    """Have the moment come where this process sends and hears messages."""
    within = threading.local()

    def around(name, before, after):
        done = getattr(messages.Round, name)

        def watched(self, *args, **kwargs):
            MOMENT.comes_to(before)
            within.settles = name == "settle"
            found = done(self, *args, **kwargs)
            MOMENT.comes_to(after)
            return found

        setattr(messages.Round, name, watched)

    around("tell", "tell", "told")
    around("hear", "hear", "heard")
    around("settle", "settle", "settled")
    got, sent, copy = messages._got, messages._set, PodSaver._copy

    def get(*args, **kwargs):
        if within.settles:
            MOMENT.comes_to("settling")
        return got(*args, **kwargs)

    def put(*args, **kwargs):
        if MOMENT.is_silent and threading.current_thread().name == messages.SIGNS:
            return None
        return sent(*args, **kwargs)

    def copied(*args, **kwargs):
        MOMENT.comes_to("copy")
        return copy(*args, **kwargs)

    messages._got, messages._set, PodSaver._copy = get, put, copied

    def at_file_call(event, arguments):
        is_one = event == "open" or event.startswith(("os.", "shutil."))
        if is_one and arguments and isinstance(arguments[0], str | Path):
            MOMENT.comes_to("file", str(arguments[0]))

    sys.addaudithook(at_file_call)
    together._VISIBLE_SECS = patience.SECS = 1.0


def tree_of(mesh, epoch):
    """A tree from whose every leaf the epoch can be told."""
    return {
        "w": place(np.arange(96.0).reshape(12, 8) + epoch, mesh, "data", "model"),
        "b": place(np.full(8, epoch, np.float32), mesh),
        "host": np.full(3, epoch),
        "text": f"epoch {epoch}",
    }


KINDS = {
    "each": {},
    "best": {"monitor": "loss", "save_best_only": True},
    "two": {
        "monitor": "loss", "save_best_only": True, "save_weights_only": True,
        "save_last": True,
    },
}  # fmt: skip


def losses_of(order):
    """Return the loss of each epoch: the one at which the fault is may be no better."""
    losses = [float(-epoch) for epoch in range(EPOCHS + 1)]
    if not order["improves"]:
        losses[order["epoch"]] = 10.0
    return losses


class Run:
    """One run under a fault, as an order tells it.

    Args:
        order: What to save, and the fault.
    """

    def __init__(self, order):
        self._order, self._mesh = order, mesh_of(jax.device_count() // 2, 2)
        self.told, self._losses = [], losses_of(order)
        self._ckpt = flaxckpt.ModelCheckpoint(
            f"{order['directory']}/{{epoch}}",
            timeout_secs=order["timeout"],
            **KINDS[order["kind"]],
        )
        self._state = self._ckpt.init()

    def _try(self, what, epoch, call):
        """Note what a call tells, and how long it takes."""
        begun, error = time.monotonic(), None
        try:
            call()
        except (flaxckpt.CheckpointError, MemoryError) as raised:
            error = str(raised)
        self.told.append([what, epoch, error, round(time.monotonic() - begun, 2)])
        say("told", *self.told[-1])
        return error is None

    def _save(self, epoch):
        MOMENT.comes_to("call")
        tree, logs = tree_of(self._mesh, epoch), {}
        if self._order["kind"] == "each":
            self._ckpt.save(tree, epoch)
            return
        logs["loss"] = place(np.float32(self._losses[epoch]), self._mesh)
        self._state = self._ckpt.update(self._state, tree, logs, epoch)

    def save(self, epoch):
        is_well = self._try("save", epoch, lambda: self._save(epoch))
        if self._order["waits"]:
            is_well = self._try("wait", epoch, self._ckpt.wait) and is_well
        return is_well

    def save_under_the_fault(self):
        fault, index = self._order["fault"], jax.process_index()
        for epoch in range(EPOCHS):
            if (epoch, index) == (self._order["epoch"], self._order["process"]):
                MOMENT.set(fault, self._order["directory"])
            self.save(epoch)
        self._try("wait", EPOCHS - 1, self._ckpt.wait)

    def save_again(self):
        """Save without a fault; all processes have come here."""
        for number in range(TRIES):  # a busy machine may make one late, in all of them
            all_are_here(f"{self._order['directory']} {number}")
            is_well = self._try("save", EPOCHS, lambda: self._save(EPOCHS))
            if self._try("wait", EPOCHS, self._ckpt.wait) and is_well:
                return

    def end(self):
        """Close, and return what the processes have to agree on."""
        self._try("close", None, self._ckpt.close)
        saved = self._ckpt.counts.saved
        return {"told": self.told, "saved": saved, "struck": MOMENT.has_struck}


def all_are_here(name):
    messages._client().wait_at_barrier(name, 60_000)


def obey():
    """Carry out orders, in which no process dies, until there are no more."""
    faulthandler.cancel_dump_traceback_later()
    install()
    for line in sys.stdin:
        faulthandler.dump_traceback_later(ORDER_SECS, exit=True)
        order = json.loads(line)
        all_are_here(order["directory"])
        MOMENT.set(None, order["directory"])
        run = Run(order)
        run.save_under_the_fault()
        MOMENT.heal()
        run.save_again()
        say("done", order["directory"], run.end())
        faulthandler.cancel_dump_traceback_later()


def obey_and_die(order):
    """Carry out one order, in which a process dies."""
    install()
    all_are_here("all are up")
    run = Run(json.loads(order))
    run.save_under_the_fault()
    say("survived")
    os._exit(0)  # JAX would wait for the dead one


def save_on(directory):
    """Go on from what is there, and save until this process or another one is killed."""
    mesh = mesh_of(jax.device_count() // 2, 2)
    settings = {"max_to_keep": 3, "timeout_secs": 2}
    ckpt = flaxckpt.ModelCheckpoint(f"{directory}/{{epoch}}", **settings)
    found = ckpt.restore(tree_of(mesh, 0))
    first = 0
    if found:
        first = found.epoch + 1
        wanted = tree_of(mesh, found.epoch)
        workers.check_same(found.tree["w"], wanted["w"])
        workers.check_same(found.tree["b"], wanted["b"])
        assert found.tree["text"] == wanted["text"]
    say("starts at", first)
    for epoch in itertools.count(first):
        try:
            ckpt.save(tree_of(mesh, epoch), epoch)
        except flaxckpt.CheckpointError as error:
            say("failed", epoch - 1, str(error))
            os._exit(0)  # JAX would wait for the dead one
        if epoch > first:
            say("saved", epoch - 1)


if __name__ == "__main__":
    workers.main(globals())
