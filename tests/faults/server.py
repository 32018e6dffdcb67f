"""Runs one save after the other under a fault, each in a forked process of its own.

Started with everything imported, and with the shim preloaded where the faults are those
of a disk, it forks for each line of JSON that it reads,
`{"scenario", "directory", "at", "mode", "exchange", "log"}`, and answers with one:
`{"status", "acknowledged", "error", "count"}`. Imported only, it holds the scenarios.
"""

import ctypes
import json
import os
import signal
import sys
import time
import traceback

import numpy as np
import tensorstore

import flaxckpt

DEADLINE_SECS = 60
LAST = 99  # the epoch that is saved after a restart


def tree_of(epoch):
    """A tree from whose every leaf the epoch can be told."""
    import jax
    import jax.numpy as jnp

    return {
        "w": np.full(3000, epoch, np.float32),
        "device": jnp.full((20, 30), epoch, jnp.bfloat16),
        "key": jax.random.key(epoch),
        "base": jnp.arange(2000.0),
        "epoch": epoch,
        "name": f"epoch {epoch}",
    }


def assert_tree(tree, epoch):
    import jax

    expected = tree_of(epoch)
    for got, want in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        if hasattr(got, "dtype") and jax.dtypes.issubdtype(
            got.dtype, jax.dtypes.prng_key
        ):
            got, want = jax.random.key_data(got), jax.random.key_data(want)
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


class Scenario:
    """What is saved before the fault may strike, and what after.

    With `files`, in a file for each array, as large ones are. `earlier` are the losses
    of a run before, which this one does not restore. With `by_hand`, `save` is called.
    """

    def __init__(
        self,
        template,
        before,
        after,
        files=False,
        earlier=(),
        by_hand=False,
        **settings,
    ):
        self.template, self.before, self.after = template, before, after
        self.files, self.earlier, self.by_hand = files, earlier, by_hand
        self.settings = settings

    def checkpoint(self, directory):
        if self.files:
            from flaxckpt._checkpoints import write as _write

            _write._LARGE_LEAF = 0
        path = os.path.join(directory, self.template)
        engine = os.environ.get("FLAXCKPT_TEST_ENGINE", "auto")
        return flaxckpt.ModelCheckpoint(path, "loss", engine=engine, **self.settings)


def is_frozen(path, leaf):
    return path == ("base",)


SCENARIOS = {
    "replace the best": Scenario(
        "best", [0.9], [0.8, 0.7], save_best_only=True
    ),
    "write over the replaced": Scenario(
        "best", [0.97, 0.95, 0.9], [0.8, 0.7], files=True, save_best_only=True
    ),
    "write over the deleted": Scenario(
        "{epoch}", [0.97, 0.95, 0.9], [0.8, 0.7], files=True, max_to_keep=1
    ),
    "link the frozen": Scenario(
        "{epoch}", [0.97, 0.95], [0.8, 0.7], frozen=is_frozen
    ),
    "keep the newest": Scenario("{epoch}", [0.5, 0.9], [0.8, 0.7], max_to_keep=2),
    "save the last": Scenario(
        "best", [0.5], [0.6, 0.7, 0.4], save_best_only=True, save_last=True
    ),
    "first of all": Scenario("new/{epoch}", [], [0.5]),
    "go aside": Scenario(
        "best", [0.9], [0.8, 0.7], earlier=[0.2], save_best_only=True
    ),
    "make way": Scenario(
        "best", [0.5], [0.8, 0.7], earlier=[0.2], by_hand=True, save_best_only=True
    ),
}  # fmt: skip


def train(ckpt, state, losses, first, acknowledge, by_hand=False):
    for epoch, loss in enumerate(losses, first):
        tree, logs = tree_of(epoch), {"loss": loss}
        if by_hand:
            ckpt.save(tree, epoch, logs=logs, state=state)
        else:
            state = ckpt.update(state, tree, logs, epoch)
        ckpt.wait()
        acknowledge(epoch)
    return state


class Disk:
    """Faults of the calls that change files; see shim.c."""

    def __init__(self):
        self._shim = ctypes.CDLL(os.environ["LD_PRELOAD"])

    def begin(self, order, at):
        self._shim.fault_begin(
            order["directory"].encode(),
            order["log"].encode(),
            ctypes.c_long(at),
            order["mode"].encode(),
            int(order["exchange"]),
        )

    def count(self):
        return self._shim.fault_count()

    def left(self, directory):
        return [
            name
            for _, directories, files in os.walk(directory)
            for name in directories + files
            if name.startswith(".flaxckpt")
        ]


class Store:
    """Kills at the calls that change an object store, before or after they do."""

    def __init__(self):
        from flaxckpt._object_store import lease as _lease
        from flaxckpt._object_store import objects as _objects

        _lease.HEARTBEAT_SECS, _lease.WATCH_SECS = 0.2, 1.0
        self._calls, self._at, self._mode = 0, 0, ""
        _objects.tensorstore = self
        self.KvStore, self.KeyRange = self, tensorstore.KvStore.KeyRange

    def begin(self, order, at):
        self._calls, self._at, self._mode = 0, at, order["mode"]

    def count(self):
        return self._calls

    def left(self, url):
        """List all that no checkpoint of a series has."""
        from flaxckpt._object_store import objects as _objects
        from flaxckpt._object_store import pointer as _pointer

        objects = _objects.Objects(url)
        keys = objects.keys_below(_pointer.CURRENT)
        pointers = _pointer.read_pointers(objects, keys).values()
        places = [each.at for each in pointers]
        return [
            key
            for key in objects.keys_below("")
            if not key.startswith((f"{_pointer.CURRENT}/", *places))
        ]

    # ---- in place of TensorStore -----------------------------------------------------

    def open(self, spec):
        return Opened(self, tensorstore.KvStore.open(spec).result())

    def strike(self, call, key, **arguments):
        if key.endswith(".lock"):  # which beats whenever it likes
            return call(key, **arguments)
        self._calls += 1
        is_here = self._calls == self._at
        if is_here and self._mode == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        made = call(key, **arguments)
        if is_here:
            made.result()
            os.kill(os.getpid(), signal.SIGKILL)
        return made


class Opened:
    """A store, of which the calls that change it are counted."""

    def __init__(self, store, opened):
        self._store, self._opened = store, opened
        self.read, self.list = opened.read, opened.list

    def result(self):
        return self

    def write(self, key, value, **arguments):
        return self._store.strike(self._opened.write, key, value=value, **arguments)


def strike(faults, order, acknowledge):
    """Save under the fault; if that is an error, save again without it."""
    scenario = SCENARIOS[order["scenario"]]
    by_hand, first = scenario.by_hand, len(scenario.earlier)
    if scenario.earlier:
        with scenario.checkpoint(order["directory"]) as ckpt:
            train(ckpt, ckpt.init(), scenario.earlier, 0, acknowledge)
    ckpt = scenario.checkpoint(order["directory"])
    state = train(ckpt, ckpt.init(), scenario.before, first, acknowledge)
    faults.begin(order, order["at"])
    first += len(scenario.before)
    try:
        train(ckpt, state, scenario.after, first, acknowledge, by_hand)
        ckpt.close()
    except flaxckpt.CheckpointError as error:
        faults.begin(order, 0)
        first += len(scenario.after)
        train(ckpt, state, [0.01], first, acknowledge, by_hand)
        ckpt.close()
        return f"{type(error).__name__}: {error}"
    return ""


def check(faults, order):
    """In a fresh process: restore at least what was acknowledged, and save again."""
    scenario = SCENARIOS[order["scenario"]]
    with scenario.checkpoint(order["directory"]) as ckpt:
        found = ckpt.restore()
        epoch = -1
        if found is not None:
            epoch = found.epoch
            assert_tree(found.tree, epoch)
            for info in ckpt.checkpoints:
                assert_tree(flaxckpt.load(info.path), info.epoch)
            if scenario.earlier:  # what no worse one may have replaced
                assert ckpt.best.logs["loss"] <= min(scenario.earlier)
        state = ckpt.init() if found is None else found.state
        ckpt.update(state, tree_of(LAST), {"loss": 0.001}, LAST)
        again = ckpt.restore()
        assert again.epoch == LAST
        assert_tree(again.tree, LAST)
    left = faults.left(order["directory"])
    assert not left, left
    return epoch


def serve():
    flaxckpt.ModelCheckpoint  # noqa: B018  # import all before forking
    faults = Disk() if "LD_PRELOAD" in os.environ else Store()
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(answer(faults, order)), flush=True)


def answer(faults, order):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        run(faults, order, writer)
    os.close(writer)
    status = wait_for(child)
    with os.fdopen(reader) as told:
        lines = [json.loads(line) for line in told]
    result = {"status": status, "acknowledged": -1, "error": "", "count": 0}
    for each in lines:
        result.update(each)
    return result


def run(faults, order, writer):
    def tell(**facts):
        os.write(writer, (json.dumps(facts) + "\n").encode())

    status = 1
    try:
        if order.get("check"):
            tell(restored=check(faults, order))
        else:
            error = strike(faults, order, lambda epoch: tell(acknowledged=epoch))
            tell(error=error, count=faults.count())
        status = 0
    except BaseException:
        tell(error=traceback.format_exc())
    os._exit(status)


def wait_for(child):
    until = time.monotonic() + DEADLINE_SECS
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hangs"


if __name__ == "__main__":
    import absl.logging

    absl.logging.set_verbosity(absl.logging.FATAL)
    serve()
