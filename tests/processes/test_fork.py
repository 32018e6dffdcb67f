"""A forked process neither waits for its parent's threads nor takes part in its saves."""

import os
import subprocess
import sys
import textwrap

import pytest

import flaxckpt

HEAD = """
    import faulthandler, gc, os, sys, threading, time, multiprocessing
    import numpy as np, flaxckpt
    from flaxckpt._checkpoints import series_writer as _series_writer
    from flaxckpt._checkpoints import write as _write
    directory, kind = sys.argv[1:3]

    def tree_of(epoch):
        if kind == "numpy":
            return {"w": np.full(3, epoch)}
        import jax.numpy as jnp
        return {"w": jnp.full(3, epoch)}

    def outcome(call):
        try:
            call()
        except flaxckpt.CheckpointError as error:
            return type(error).__name__
        return "done"

    def forked(act):
        \"\"\"Return what a child says, which ends as one of multiprocessing does.\"\"\"
        read, write = os.pipe()
        child = os.fork()
        if not child:
            faulthandler.dump_traceback_later(60, exit=True)
            said = act()
            os.write(write, (said + "\\n").encode())
            gc.collect()
            threading._shutdown()
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as told:
            said = told.read().strip()
        _, status = os.waitpid(child, 0)
        return f"{said} ({os.waitstatus_to_exitcode(status)})"

    begun, go = threading.Event(), threading.Event()
    original = _write.write_checkpoint

    def wait_and_write(*args, **kwargs):
        begun.set()
        assert go.wait(60)
        return original(*args, **kwargs)
"""

# With a save under way, whose thread may hold any lock.
INHERITED = """
    ckpt = flaxckpt.ModelCheckpoint(directory + "/{epoch}", max_to_keep=2)
    for epoch in range(3):
        ckpt.save(tree_of(epoch), epoch)
    ckpt.wait()
    _series_writer.write_checkpoint = wait_and_write
    ckpt.save(tree_of(3), 3)
    assert begun.wait(60)
    state = ckpt.init()

    def act():
        calls = {
            "nothing due": lambda: ckpt.update(state, tree_of(9), {}, 9, 1),
            "update": lambda: ckpt.update(state, {"w": np.zeros(1)}, {}, 9),
            "save": lambda: ckpt.save({"w": np.zeros(1)}, 9),
            "latest": lambda: [ckpt.latest, ckpt.best, ckpt.checkpoints],
            "list": lambda: flaxckpt.list_checkpoints(directory),
            "restore": ckpt.restore,
            "load": lambda: flaxckpt.load(directory + "/3"),
            "own": lambda: flaxckpt.ModelCheckpoint(directory + "/own").save({"w": 1}, 0),
            "wait": ckpt.wait,
            "close": ckpt.close,
            "leave": lambda: ckpt.__exit__(None, None, None),
        }
        if kind == "jax":
            del calls["nothing due"]  # makes an array, which JAX may not do here
        return " ".join(f"{name}: {outcome(call)}," for name, call in calls.items())

    print(forked(act))
    go.set()
    ckpt.save(tree_of(4), 4)
    ckpt.close()
    print(sorted(os.listdir(directory)))
    with flaxckpt.ModelCheckpoint(directory + "/{epoch}") as ckpt:
        print([int(ckpt.restore().tree["w"][0]), ckpt.latest.epoch])
"""


def run(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c",
         textwrap.dedent(HEAD) + textwrap.dedent(code), *map(str, arguments)],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "XLA_FLAGS": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("kind", ["numpy", "jax"])
def test_a_child_does_nothing_with_its_parent_s_object(tmp_path, kind):
    said, left, latest = run(INHERITED, tmp_path, kind)
    outcomes = {
        "nothing due": "done",
        "update": "CheckpointLockedError",
        "save": "CheckpointLockedError",
        "latest": "done",
        "list": "done",
        "restore": "CheckpointError",
        "load": "CheckpointError",
        "own": "CheckpointError",
        "wait": "done",
        "close": "done",
        "leave": "done",
    }
    if kind == "jax":
        del outcomes["nothing due"]
    wanted = " ".join(f"{name}: {outcome}," for name, outcome in outcomes.items())
    assert said == f"{wanted} (0)"
    assert left == "['4', '5']"
    assert latest == "[4, 4]"


# Where nothing is there yet: no first run may be taken for that.
FIRST = """
    ckpt = flaxckpt.ModelCheckpoint(directory + "/{epoch}", save_best_only=True)
    _series_writer.write_checkpoint = wait_and_write
    ckpt.save(tree_of(0), 0)
    assert begun.wait(60)

    def act():
        calls = [
            ckpt.restore,
            lambda: ckpt.restore(which="best"),
            lambda: ckpt.restore(which=directory + "/1"),
        ]
        return " ".join(map(outcome, calls))

    print(forked(act))
    go.set()
    print(ckpt.restore().epoch)
    ckpt.close()
"""


@pytest.mark.parametrize("kind", ["numpy", "jax"])
def test_a_child_does_not_restore_as_if_nothing_were_saved(tmp_path, kind):
    said, restored = run(FIRST, tmp_path, kind)
    assert said == "CheckpointError CheckpointError CheckpointError (0)"
    assert restored == "0"


# Where the parent has not used JAX yet, a child may.
EARLY = """
    ckpt = flaxckpt.ModelCheckpoint(directory + "/{epoch}")

    def act():
        def own():
            with flaxckpt.ModelCheckpoint(directory + "/child/{epoch}") as own:
                own.save(tree_of(7), 7)
            assert own.restore().tree["w"][0] == 7

        def inherited():
            ckpt.save(tree_of(1), 1)

        return f"{outcome(own)} {outcome(inherited)} {outcome(ckpt.close)}"

    print(forked(act))
    ckpt.save(tree_of(0), 0)
    ckpt.close()
    print(sorted(os.listdir(directory)))
"""


@pytest.mark.parametrize("kind", ["numpy", "jax"])
def test_a_child_may_have_objects_of_its_own(tmp_path, kind):
    said, left = run(EARLY, tmp_path, kind)
    assert said == "done CheckpointLockedError done (0)"
    assert left == "['1', 'child']"


WORKERS = """
    ckpt = flaxckpt.ModelCheckpoint(directory + "/{epoch}", save_on_preemption=True)
    context = multiprocessing.get_context("fork")

    def work(number, queue):
        queue.put(number)

    with ckpt:
        state = ckpt.init()
        for epoch in range(3):
            queue = context.SimpleQueue()
            workers = [
                context.Process(target=work, args=(i, queue)) for i in range(2)
            ]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join(60)
                assert worker.exitcode == 0, worker.exitcode
            state = ckpt.update(state, tree_of(epoch), {"val_loss": 1.0}, epoch)
    print(sorted(os.listdir(directory)))
"""


def test_workers_of_a_data_loader(tmp_path):
    assert run(WORKERS, tmp_path, "numpy") == ["['1', '2', '3']"]


STORE = """
    url = sys.argv[3]
    ckpt = flaxckpt.ModelCheckpoint(url + "/{epoch}")
    ckpt.save(tree_of(0), 0)
    ckpt.wait()

    def act():
        calls = {
            "latest": lambda: ckpt.latest,
            "list": lambda: flaxckpt.list_checkpoints(url),
            "save": lambda: ckpt.save(tree_of(9), 9),
            "own": lambda: flaxckpt.ModelCheckpoint(url + "/own/{epoch}"),
            "close": ckpt.close,
        }
        return " ".join(f"{name}: {outcome(call)}," for name, call in calls.items())

    print(forked(act))
    ckpt.save(tree_of(1), 1)
    ckpt.close()
    print([info.epoch for info in ckpt.checkpoints])
"""


def test_a_child_leaves_an_object_store_alone(tmp_path, s3):
    said, left = run(STORE, tmp_path, "numpy", s3)
    assert said == (
        "latest: CheckpointLockedError, list: CheckpointError, "
        "save: CheckpointLockedError, own: CheckpointError, close: done, (0)"
    )
    assert left == "[0, 1]"
    assert [info.epoch for info in flaxckpt.list_checkpoints(s3)] == [0, 1]


def test_the_error_says_where_to_save():
    error = flaxckpt.CheckpointLockedError("runs", "host", 12, is_parent=True)
    assert str(error) == (
        "This ModelCheckpoint for 'runs' was made in process 12, and this process was "
        "forked from that one: it saves nothing here. Save in process 12, or start "
        'this one by multiprocessing\'s "spawn" method and make a ModelCheckpoint with '
        "another filepath in it."
    )
