"""What does the loop of several processes pay for saves?

As `bench_loop.py`, in 2 and in 4 processes on this machine, whose collectives go over
the loopback: a donated step on a state that is sharded over all of them, and a save
every 10 steps. Beside it Orbax's `CheckpointManager`; they take turns in the same
processes. Each number is that of the process that paid most.
"""

import itertools
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
NAMES = ["flaxckpt", "Orbax v0 CheckpointManager"]
STEPS, EVERY = 20, 10
DEADLINE_SECS = 120


def child(
    index: int, count: int, port: int, root: Path, megabytes: int, rounds: int
) -> None:
    """Run the loops, as one of the processes; the first one prints what it took."""
    import absl.logging
    import jax

    absl.logging.set_verbosity(absl.logging.ERROR)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", count, index)
    import numpy as np
    import peers
    from jax.experimental.multihost_utils import process_allgather
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((count,), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    shape = (megabytes * 2**20 // 25 // 4 // 1024, 1024)

    def make():
        keys = jax.random.split(jax.random.key(0), 25)
        return {f"w{i:02}": jax.random.normal(keys[i], shape) for i in range(25)}

    x = np.random.default_rng(0).normal(size=(1024, 16)).astype(np.float32)

    def step(tree):
        found = {name: jax.numpy.tanh(w @ x) for name, w in tree.items()}
        rows = {name: y.mean(1, keepdims=True) for name, y in found.items()}
        new = {name: w * 0.999 + 1e-4 * rows[name] for name, w in tree.items()}
        return new, sum(y.sum() for y in found.values())

    first = jax.jit(make, out_shardings=sharding)()
    copy = jax.jit(lambda tree: jax.tree.map(jax.numpy.copy, tree))
    step = jax.jit(step, donate_argnums=0)
    # Not `peers.make`, where a process might delete what another has made already.
    ways = {"without saves": None}
    ways |= {name: peers.ALL[name](root / name) for name in NAMES}
    numbers = itertools.count()

    def run(way):
        tree, loss = step(copy(first))
        jax.block_until_ready(loss)
        if index == 0:
            harness.settle()
        process_allgather(np.zeros(()))
        blocked, start = [0.0], time.perf_counter()
        for number in range(STEPS):
            tree, loss = step(tree)
            loss.block_until_ready()
            if way is not None and number % EVERY == 0:
                called = time.perf_counter()
                way.save(tree, next(numbers))
                blocked.append(time.perf_counter() - called)
        jax.block_until_ready(tree)
        took = time.perf_counter() - start
        if way is not None:
            way.wait()
        times = np.array([took, statistics.median(blocked[1:] or blocked)])
        return np.max(process_allgather(times), axis=0).tolist()

    for way in [*ways.values(), ways["flaxckpt"]]:
        run(way)  # what is compiled and made once
    for number in range(rounds):
        names = list(ways)[:: -1 if number % 2 else 1]
        found = {name: run(ways[name]) for name in names}
        if index == 0:
            print("FOUND", json.dumps(found), flush=True)
    for way in ways.values():
        if way is not None:
            way.close()


def measure(count: int, megabytes: int, rounds: int) -> list[dict[str, list[float]]]:
    """Run all processes, and return what each round took."""
    root = Path(tempfile.mkdtemp(prefix="flaxckpt-bench-"))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "ignore", __file__, CHILD]
    arguments = [str(each) for each in (count, port, root, megabytes, rounds)]
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
    return [json.loads(line[6:]) for line in lines if line.startswith("FOUND ")]


def main() -> None:
    if sys.argv[1:2] == [CHILD]:
        index, count, port, root, megabytes, rounds = sys.argv[2:]
        numbers = int(megabytes), int(rounds)
        child(int(index), int(count), int(port), Path(root), *numbers)
        return
    options = harness.arguments(__doc__)
    megabytes = 25 if options.quick else 100
    for count in (2,) if options.quick else (2, 4):
        found = measure(count, megabytes, options.rounds)
        saves = STEPS // EVERY
        lost = {
            name: [(one[name][0] - one["without saves"][0]) / saves for one in found]
            for name in NAMES
        }
        blocked = {name: [one[name][1] for one in found] for name in NAMES}
        title = f"{count} processes, {megabytes} MB"
        harness.report(f"{title}: the loop loses, per save", "s", lost, options.json)
        alone = statistics.median(one["without saves"][0] for one in found) / STEPS
        harness.note(f"A step takes {alone:.4f} s.", options.json)
        harness.ratios(lost, options.json, NAMES[1])
        harness.report(f"{title}: blocked, per save", "s", blocked, options.json)
        harness.ratios(blocked, options.json, NAMES[1])


if __name__ == "__main__":
    main()
