"""What do saves of several processes cost, the first one of a run included?

2 and 4 processes of this machine, whose collectives go over the loopback. Each way to
save gets new processes in each round, so that it pays for all that it does once. Before
the loop begins, the step is compiled, and flaxckpt's `resume` has a thread prepare the
copies; Orbax has no such call. The loop is as in `bench_loop.py`: a donated step on a
state that is sharded over all processes, and a save every 10 steps. Then one save at a
time: when it is on disk, how many files it has, and how many bytes the busiest process
has written. Each time is that of the process that took longest.
"""

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness

CHILD = "child"
FLAXCKPT, ORBAX, ALONE = "flaxckpt", "Orbax v0 CheckpointManager", "without saves"
PLAIN = "Orbax v1 save"
SAVES = 10  # of a loop
DEADLINE_SECS = 300


def child(index: int, count: int, port: int, root: Path, what: str, way: str) -> None:
    """Measure one way, as one of the processes; the first one prints the result."""
    import absl.logging
    import jax
    import numpy as np

    absl.logging.set_verbosity(absl.logging.ERROR)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", count, index)
    from jax.sharding import NamedSharding, PartitionSpec

    kind, leaves, rows, columns, is_replicated, *every = json.loads(what)
    mesh = jax.make_mesh((count,), ("data",))
    spec = PartitionSpec() if is_replicated else PartitionSpec("data")
    sharding = NamedSharding(mesh, spec)

    # Orbax compresses by default, and trained weights hardly shrink.
    dice = np.random.default_rng(0)
    tree = {}
    for i in range(leaves):
        values = dice.normal(size=(rows, columns)).astype(np.float32)
        shape, part = values.shape, values.__getitem__
        tree[f"w{i:04}"] = jax.make_array_from_callback(shape, sharding, part)
    run = loop if kind == "loop" else one_by_one
    found = run(tree, root, way, *every)
    if index == 0:
        print("FOUND", json.dumps(found), flush=True)


def greatest(*numbers: float) -> list[float]:
    """Return for each number the greatest of all processes."""
    import numpy as np
    from jax.experimental.multihost_utils import process_allgather

    return np.max(process_allgather(np.array(numbers)), axis=0).tolist()


def settled() -> None:
    """Wait until all processes have come here, and the machine has come to rest."""
    import jax

    greatest(0.0)
    if jax.process_index() == 0:
        harness.settle()
    greatest(0.0)


def loop(tree, root: Path, way: str, every: int) -> list[list[float]]:
    """Train; return what all steps took, how long each save blocked, and its work.

    The work is the CPU time of the training's thread: the rest of the time in which a
    save blocks, that thread waits for a core that other threads use.
    """
    import jax
    import numpy as np

    x = np.random.default_rng(0).normal(size=(1024, 16)).astype(np.float32)

    def step(tree):
        found = {name: jax.numpy.tanh(w @ x) for name, w in tree.items()}
        rows = {name: y.mean(1, keepdims=True) for name, y in found.items()}
        new = {name: w * 0.999 + 1e-4 * rows[name] for name, w in tree.items()}
        return new, sum(y.sum() for y in found.values())

    def small_step(tree):
        new = {name: w * 0.999 for name, w in tree.items()}
        return new, sum(tree.values()).sum()  # in one collective

    is_small = next(iter(tree.values())).shape[1] < 1024
    step = jax.jit(small_step if is_small else step, donate_argnums=0)
    for _ in range(2):
        tree, loss = step(tree)
        loss.block_until_ready()
    save, wait = saver(root, way, every, tree)
    settled()
    blocked, busy, start = list[float](), list[float](), time.perf_counter()
    for number in range(1, SAVES * every + 1):
        tree, loss = step(tree)
        loss.block_until_ready()
        called, worked = time.perf_counter(), time.thread_time()
        save(tree, number)
        if number % every == 0:
            blocked.append(time.perf_counter() - called)
            busy.append(time.thread_time() - worked)
    jax.block_until_ready(tree)
    took = time.perf_counter() - start
    wait()
    return [greatest(took), greatest(*blocked), greatest(*busy)]


def saver(root: Path, way: str, every: int, tree):
    """Return what each step calls, and what waits for the last save."""
    import orbax.checkpoint as v0

    import flaxckpt

    if way == ALONE:
        return lambda tree, number: None, lambda: None
    if way == ORBAX:
        options = v0.CheckpointManagerOptions(
            max_to_keep=1, save_interval_steps=every, enable_async_checkpointing=True
        )
        manager = v0.CheckpointManager(root / "orbax", options=options)

        def save(tree, number):
            manager.save(number, args=v0.args.StandardSave(tree))

        return save, manager.close
    ckpt = flaxckpt.ModelCheckpoint(root / "flaxckpt" / "last", save_freq=every)
    _, state, _ = ckpt.resume(tree)

    def update(tree, number):
        nonlocal state
        state = ckpt.update(state, tree, {}, epoch=0, batch=number - 1)

    return update, ckpt.close


def one_by_one(tree, root: Path, way: str) -> list[float]:
    """Save twice; return when each was on disk, the files, the busiest to the mean."""
    import jax
    from orbax.checkpoint import v1

    import flaxckpt

    if way == FLAXCKPT:
        ckpt = flaxckpt.ModelCheckpoint(root / way / "{epoch}")

        def save(number):
            ckpt.save(tree, epoch=number)
            ckpt.wait()
    else:

        def save(number):
            v1.save(root / way / str(number + 1), tree)

    took = list[float]()
    for number in range(2):
        settled()
        start = time.perf_counter()
        save(number)
        took += greatest(time.perf_counter() - start)
    settled()
    files = [file for file in (root / way / "2").rglob("*") if file.is_file()]
    written = dict.fromkeys(range(jax.process_count()), 0)
    for file in files:
        names = [part for part in file.parts if part.startswith("ocdbt.process_")]
        if names:
            written[int(names[0].rpartition("_")[2])] += file.stat().st_size
    mean = sum(written.values()) / len(written) or 1
    return [*took, len(files), max(written.values()) / mean]


def run(count: int, what: list, way: str):
    """Run new processes, and return what the first one has found."""
    root = Path(tempfile.mkdtemp(prefix="flaxckpt-bench-"))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "ignore", __file__, CHILD]
    arguments = [str(each) for each in (count, port, root, json.dumps(what), way)]
    running = [
        subprocess.Popen(
            [*command, str(index), *arguments],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for index in range(count)
    ]
    try:
        printed = [process.communicate(timeout=DEADLINE_SECS)[0] for process in running]
    finally:
        for process in running:
            process.kill()  # under jax.distributed, SIGTERM does not end it
            process.wait()
        shutil.rmtree(root, ignore_errors=True)
    if any(process.returncode for process in running):
        raise RuntimeError("a process failed; its error is above")
    lines = printed[0].splitlines()
    return next(json.loads(line[6:]) for line in lines if line.startswith("FOUND "))


def in_turn(count: int, what: list, ways: list[str], rounds: int):
    """Return what each way has found in each round."""
    found = {way: [] for way in ways}
    for number in range(rounds):
        for way in ways[:: -1 if number % 2 else 1]:
            found[way].append(run(count, what, way))
    return found


def loops(title: str, count: int, what: list, options) -> None:
    found = in_turn(count, ["loop", *what], [ALONE, FLAXCKPT, ORBAX], options.rounds)
    alone = statistics.median(took for (took,), *_ in found[ALONE])
    ways = FLAXCKPT, ORBAX
    lost = {way: [(took - alone) / SAVES for (took,), *_ in found[way]] for way in ways}
    harness.report(f"{title}: the loop loses, per save", "s", lost, options.json)
    every = what[-1]
    step = alone / SAVES / every
    harness.note(f"A step takes {step:.4f} s; a save every {every}.", options.json)
    harness.ratios(lost, options.json, ORBAX)
    for name, chosen in (
        ("the first save", lambda blocked: blocked[0]),
        ("a later save", lambda blocked: statistics.median(blocked[1:])),
    ):
        for index, what in ((1, "blocked"), (2, "CPU time of the training's thread")):
            blocks = {way: [chosen(each[index]) for each in found[way]] for way in ways}
            harness.report(f"{title}: {what}, {name}", "s", blocks, options.json)
            harness.ratios(blocks, options.json, ORBAX)


def saves(title: str, count: int, what: list, options) -> None:
    found = in_turn(count, ["save", *what], [FLAXCKPT, PLAIN], options.rounds)
    for index, (name, unit) in enumerate(
        [
            ("on disk, the first save", "s"),
            ("on disk, the second save", "s"),
            ("files", "number"),
            ("bytes of the busiest process to the mean", "ratio"),
        ]
    ):
        numbers = {way: [each[index] for each in found[way]] for way in found}
        harness.report(f"{title}: {name}", unit, numbers, options.json)
        harness.ratios(numbers, options.json, PLAIN)


def main() -> None:
    if sys.argv[1:2] == [CHILD]:
        index, count, port, root, what, way = sys.argv[2:]
        child(int(index), int(count), int(port), Path(root), what, way)
        return
    options = harness.arguments(__doc__)
    megabytes = 25 if options.quick else 100
    big = [25, megabytes * 2**20 // 25 // 4 // 1024, 1024]
    small, many = [1000, 4, 256], [2000, 4, 256]
    cases = {
        f"{megabytes} MB in 25 leaves": (loops, [*big, False, 10]),
        "1,000 leaves of 4 KB": (loops, [*small, False, 100]),
        "2,000 leaves of 4 KB": (saves, [*many, False]),
        f"{megabytes} MB in 25 replicated leaves": (saves, [*big, True]),
    }
    for count in (2,) if options.quick else (2, 4):
        for name, (measure, what) in cases.items():
            title = f"{count} processes, {name}"
            if options.only in title:
                measure(title, count, what, options)


if __name__ == "__main__":
    main()
