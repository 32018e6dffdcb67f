"""Runs a worker in several processes at once, and ends them all in time."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
DEADLINE_SECS = 120


@dataclass
class Pod:
    """Processes that run one worker; see `workers.py`.

    Attributes:
        processes: The processes, by their index.
        logs: What each prints.
    """

    processes: list[subprocess.Popen]
    logs: list[Path]
    started: float = field(default_factory=time.monotonic)

    def wait(self, *, check=True):
        """Wait for all, and return what each has said; kill those that take too long.

        Args:
            check: Whether all have to end well.
        """
        try:
            for process in self.processes:
                left = DEADLINE_SECS - (time.monotonic() - self.started)
                process.wait(max(left, 0))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"a process hangs\n{self.told()}") from None
        finally:
            self.kill()
        if check:
            assert self.codes == [0] * len(self.codes), self.told()
        return self.said()

    def order(self, **order):
        """Send an order to all processes, as a line of JSON."""
        for process in self.processes:
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()

    def kill(self):
        """End what is left; under jax.distributed, SIGTERM would not."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()

    @property
    def codes(self):
        return [process.returncode for process in self.processes]

    def said(self):
        """Return the JSON lines that each process has printed, in order.

        A line counts once its end is there: a process may be printing it, or may
        have been killed amid it.
        """
        ended = [log.read_text().rpartition("\n")[0] for log in self.logs]
        return [
            [json.loads(line[4:]) for line in text.splitlines() if line[:4] == "SAY "]
            for text in ended
        ]

    def wait_until(self, index, what, *, beginning=False):
        """Wait until a process has said something, or something that begins so.

        Returns:
            What it has said.
        """
        until = time.monotonic() + DEADLINE_SECS

        def found():
            for line in self.said()[index]:
                if line == what or (beginning and line[: len(what)] == what):
                    return line
            return None

        while (line := found()) is None:
            if self.processes[index].poll() is not None or time.monotonic() > until:
                self.kill()
                raise AssertionError(f"{what} was never said\n{self.told()}")
            time.sleep(0.02)
        return line

    def told(self):
        """Return all that they have printed, for a failure's message."""
        texts = [
            f"---- process {index}, exit code {process.returncode} ----\n{log.read_text()}"
            for index, (process, log) in enumerate(
                zip(self.processes, self.logs, strict=True)
            )
        ]
        return "\n".join(texts)


def can_be_apart():
    """Tell whether processes here may have file systems of their own."""
    return subprocess.run(["unshare", "--mount", "true"], check=False).returncode == 0


def start(
    directory,
    worker,
    count,
    *arguments,
    devices=2,
    faults=None,
    scratch=None,
    script="workers.py",
    takes_orders=False,
    is_apart=False,
):
    """Start a worker in several processes.

    Args:
        directory: For their logs.
        worker: Name of a function in the script.
        count: How many.
        *arguments: For it.
        devices: How many devices each process has: a number, or one for each.
        faults: Environment variables of some processes, by index.
        scratch: A directory to have for temporary files, each process another one
            under that name, as if it were on a machine of its own; of the size
            that SCRATCH_SIZE in its environment gives, if any.
        script: The file with the worker.
        takes_orders: Whether the workers read orders; see `Pod.order`.
        is_apart: Whether what a process mounts is there for itself alone.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes, logs = [], []
    devices = [devices] * count if isinstance(devices, int) else devices
    for index in range(count):
        log = Path(directory) / f"{worker}-{port}-{index}.log"
        command = [sys.executable, str(HERE / script), worker]
        command += [str(index), str(count), str(port), str(devices[index])]
        environment = {**os.environ, **(faults or {}).get(index, {})}
        environment.pop("XLA_FLAGS", None)
        if scratch is not None:
            environment["TMPDIR"] = str(scratch)
            size = '-o size="${SCRATCH_SIZE:-50%}"'
            mount = f'mount -t tmpfs {size} none "$TMPDIR" && exec "$0" "$@"'
            command = ["sh", "-c", mount, *command]
        if is_apart or scratch is not None:
            command = ["unshare", "--mount", *command]
        with log.open("w") as out:
            processes.append(
                subprocess.Popen(
                    [*command, *map(str, arguments)],
                    stdin=subprocess.PIPE if takes_orders else None,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    text=True,
                )
            )
        logs.append(log)
    return Pod(processes, logs)


def run(directory, worker, count, *arguments, **settings):
    """Run a worker in several processes, and return what each has said."""
    return start(directory, worker, count, *arguments, **settings).wait()
