"""Kills, or fails, the saving program at chosen file calls; counts what survives.

    python tests/faults/harness.py            every call, as a table for the docs

The program is the real one, in processes of its own; the shim sees the file calls of
all its threads, TensorStore's in C++ as well as Python's.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
SCENARIOS = (
    "replace the best",
    "write over the replaced",
    "write over the deleted",
    "link the frozen",
    "keep the newest",
    "save the last",
    "first of all",
    "go aside",
    "make way",
)
MODES = ("kill", "torn", "ENOSPC", "EIO")
STORE_SCENARIOS = ("replace the best", "keep the newest", "save the last", "make way")
# What every process of a survey compiles again, it finds here.
PROGRAMS = {
    "JAX_COMPILATION_CACHE_DIR": f"{tempfile.gettempdir()}/flaxckpt-test-programs",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
STORE_MODES = ("before", "after")  # the call that changes the store


def build(directory):
    """Compile the shim."""
    library = Path(directory) / "shim.so"
    subprocess.run(
        ["cc", "-O1", "-shared", "-fPIC", "-o", library, HERE / "shim.c", "-ldl"],
        check=True,
    )
    return library


class Server:
    """A process that forks one for each order; see server.py.

    Args:
        library: The shim; None where an object store is to be written to.
    """

    def __init__(self, library):
        self._is_disk = library is not None
        preloaded = {"LD_PRELOAD": str(library)} if self._is_disk else {}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", HERE / "server.py"],
            env={**os.environ, **PROGRAMS, "XLA_FLAGS": "", **preloaded},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, **order):
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def place(self):
        """Return a place that nobody has used before."""
        if self._is_disk:
            return tempfile.mkdtemp(prefix="flaxckpt-fault-")
        return f"{os.environ['FLAXCKPT_TEST_STORE']}/{uuid.uuid4().hex}"

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


def attempt(server, scenario, mode, at, exchange=True, log=""):
    """Strike at one call, then restart.

    Returns:
        What went wrong, "" for nothing, and how many calls were made.
    """
    directory = server.place()
    try:
        order = {"scenario": scenario, "directory": directory, "mode": mode}
        order |= {"exchange": exchange, "log": str(log)}
        struck = server.ask(**order, at=at)
        checked = server.ask(**order, check=True)
        return verdict(mode, at, struck, checked), struck["count"]
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def verdict(mode, at, struck, checked):
    killed = struck["status"] == -9
    if at and mode in ("kill", "torn", *STORE_MODES):
        # Threads do not always make equally many calls: it may have come through.
        if not killed and (struck["status"] or struck["error"]):
            return f"not killed: {struck}"
    elif struck["status"] != 0:
        return f"did not end well: {struck}"
    if checked["status"] != 0:
        return f"could not restore: {checked['error']} after {struck}"
    if checked["restored"] < struck["acknowledged"]:
        return f"lost {struck['acknowledged']}, restored {checked['restored']}"
    return ""


@contextlib.contextmanager
def serving(library, number=2):
    """Start servers, for any number of surveys; see `Server`."""
    servers = [Server(library) for _ in range(number)]
    try:
        yield servers
    finally:
        for server in servers:
            server.close()


def survey(servers, scenario, mode, *, exchange=True, sample=None, seed=0):
    """Strike at every call of a scenario, or at a sample of them.

    Returns:
        Number of the scenario's calls, the points tried, and what went wrong by point.
    """
    problem, count = attempt(servers[0], scenario, mode, 0, exchange)
    problems = {0: problem} if problem else {}
    points = list(range(1, count + 1))
    if sample is not None:
        points = sorted(random.Random(seed).sample(points, min(sample, count)))
    with ThreadPoolExecutor(len(servers)) as threads:
        runs = [
            threads.submit(strike_all, server, scenario, mode, mine, exchange)
            for server, mine in zip(servers, shares(points, len(servers)), strict=True)
        ]
        for run in runs:
            problems |= run.result()
    return count, points, problems


def shares(points, number):
    return [points[start::number] for start in range(number)]


def strike_all(server, scenario, mode, points, exchange):
    problems = {}
    for at in points:
        problem, _ = attempt(server, scenario, mode, at, exchange)
        if problem:
            problems[at] = problem
    return problems


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--sample", type=int, help="points of each kind; all if not given"
    )
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    options = parser.parse_args()
    failed = False
    print("| scenario | fault | file calls | struck at | survived |")
    print("|---|---|--:|--:|--:|")
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        servers = stack.enter_context(serving(build(directory)))
        cases = [(s, m, True) for s in SCENARIOS for m in options.modes]
        cases += [(SCENARIOS[0], mode, False) for mode in options.modes]
        for scenario, mode, exchange in cases:
            count, points, problems = survey(
                servers, scenario, mode, exchange=exchange, sample=options.sample
            )
            where = scenario if exchange else f"{scenario}, by renaming"
            survived = len(points) - len(problems)
            print(
                f"| {where} | {mode} | {count} | {len(points)} | {survived} |",
                flush=True,
            )
            for at, problem in problems.items():
                print(f"    call {at}: {problem}", file=sys.stderr)
            failed = failed or bool(problems)
    sys.exit(failed)


if __name__ == "__main__":
    main()
