"""The exceptions of flaxckpt: each says what failed and what to do next.

```
CheckpointError
├── SettingError             an argument that cannot work          (ValueError)
├── TemplateError            a filepath that cannot be filled in   (ValueError)
├── MetricError              a metric that cannot be used          (ValueError)
├── CheckpointPathError      a path that cannot be written or read (ValueError)
├── UnsupportedLeafError     a leaf that cannot be saved           (TypeError)
├── CheckpointLockedError    another process writes there          (RuntimeError)
├── CheckpointNotFoundError  no checkpoint to load there           (LookupError)
├── CheckpointMismatchError  leaves that differ from `like`        (ValueError)
├── CheckpointCorruptError   a checkpoint that is damaged          (ValueError)
├── CheckpointWriteError     a save that failed                    (RuntimeError)
│   └── HookError            a function of `on_saved` that raised  (RuntimeError)
└── Preempted                a signal to end; the state is saved   (RuntimeError)
```

Each passes its facts to `super().__init__`, and keeps them as attributes, so it
pickles. Between the processes of a run, it travels as the name of its class and these
facts.
"""

from collections.abc import Iterable
from typing import NamedTuple


class CheckpointError(Exception):
    """Base of all errors that flaxckpt raises on purpose."""


class SettingError(CheckpointError, ValueError):
    """An argument that cannot work.

    Attributes:
        name: The argument's name.
        value: What was given.
        advice: What would work.
    """

    def __init__(self, name: str, value: object, advice: str) -> None:
        super().__init__(name, value, advice)
        self.name, self.value, self.advice = name, value, advice

    def __str__(self) -> str:
        value = self.value
        is_type = isinstance(value, str) and value[:1] + value[-1:] == "<>"
        try:
            shown = value if is_type else repr(value)
        except Exception:  # from a `__repr__` of the user's
            shown = f"<{type(value).__name__}>"
        return f"{self.name}={shown} cannot work: {self.advice}"


class TemplateError(CheckpointError, ValueError):
    """A filepath template that is malformed, or that cannot be filled in.

    Attributes:
        template: The whole template.
        problem: What is wrong with it, and what to do.
    """

    def __init__(self, template: str, problem: str) -> None:
        super().__init__(template, problem)
        self.template, self.problem = template, problem

    def __str__(self) -> str:
        return f"filepath {self.template!r}: {self.problem}"


class MetricError(CheckpointError, ValueError):
    """A metric that cannot be used, such as a monitored value that is not a number.

    Attributes:
        monitor: The metric's key in `logs`.
        problem: What is wrong with the metric, and what to do.
    """

    def __init__(self, monitor: str, problem: str) -> None:
        super().__init__(monitor, problem)
        self.monitor, self.problem = monitor, problem

    def __str__(self) -> str:
        return f"logs[{self.monitor!r}] {self.problem}"


class CheckpointPathError(CheckpointError, ValueError):
    """A path at which no checkpoint can be written, listed or read.

    A checkpoint at the path may still be whole: another user may be able to read it.

    Attributes:
        path: The path at fault.
        problem: What is wrong with it, and what to do.
    """

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path, self.problem = path, problem

    def __str__(self) -> str:
        return f"{self.path!r} {self.problem}"


class UnsupportedLeafError(CheckpointError, TypeError):
    """A tree with leaves that cannot be saved or restored; nothing was written or read.

    Attributes:
        leaves: Pairs of a leaf's path and what is wrong with it.
        action: What cannot be done: `saved`, `restored` or `exported`.
    """

    def __init__(
        self, leaves: tuple[tuple[str, str], ...], action: str = "saved"
    ) -> None:
        super().__init__(leaves, action)
        self.leaves, self.action = leaves, action

    def __str__(self) -> str:
        lines = "".join(f"\n  {path}: {problem}" for path, problem in self.leaves)
        advice = (
            "A leaf must be a JAX or numpy array of numbers, booleans or PRNG keys, a "
            "Python number, str, bytes or a function. Leave the others out of `tree`."
        )
        if self.action == "exported":
            advice = (
                "Export to a file that holds them (.safetensors holds bfloat16 and "
                "float8, and .msgpack numbers and text), or export the weights alone."
            )
        if self.action == "restored":
            advice = (
                "A leaf of `like` must be an array, a number, text, a function, a "
                "`jax.ShapeDtypeStruct` or a sharding."
            )
        return (
            f"{_count(len(self.leaves), 'leaf', 'leaves')} of the tree cannot be "
            f"{self.action}:{lines}\n{advice}"
        )


class CheckpointLockedError(CheckpointError, RuntimeError):
    """Another process is writing the same checkpoints; nothing was written.

    Attributes:
        directory: The directory that both processes want to write in.
        host: The other process's machine; empty if it is not known.
        pid: The other process's number on that machine; 0 if it is not known.
        is_parent: Whether the other process made the object that this process uses,
            and this process was forked from it.
    """

    def __init__(
        self, directory: str, host: str, pid: int, is_parent: bool = False
    ) -> None:
        super().__init__(directory, host, pid, is_parent)
        self.directory, self.host, self.pid = directory, host, pid
        self.is_parent = is_parent

    def __str__(self) -> str:
        if self.is_parent:
            return (
                f"This ModelCheckpoint for {self.directory!r} was made in process "
                f"{self.pid}, and this process was forked from that one: it saves "
                f"nothing here. Save in process {self.pid}, or start this one by "
                'multiprocessing\'s "spawn" method and make a ModelCheckpoint with '
                "another filepath in it."
            )
        who = f"process {self.pid} on {self.host}" if self.host else "another process"
        return (
            f"The checkpoints in {self.directory!r} are being written by {who}. End "
            "that one, or choose another filepath. Processes of one run call "
            "jax.distributed.initialize() first."
        )


class CheckpointNotFoundError(CheckpointError, LookupError):
    """A checkpoint that is not at the path that was asked for.

    Attributes:
        path: The path.
        found: Names of the checkpoints near the path.
        replaced: How the checkpoint at the path differs from the one that was listed
            there before; empty if there is no checkpoint at the path.
    """

    def __init__(
        self, path: str, found: tuple[str, ...] = (), replaced: str = ""
    ) -> None:
        super().__init__(path, found, replaced)
        self.path, self.found, self.replaced = path, found, replaced

    def __str__(self) -> str:
        if self.replaced:
            return (
                f"The checkpoint at {self.path!r} was replaced since it was listed: "
                f"{self.replaced}. List the directory again, or pass the path to get "
                "the one that is there."
            )
        there = ", ".join(self.found) or "none"
        return (
            f"No checkpoint at {self.path!r} (checkpoints near it: {there}). "
            "flaxckpt.list_checkpoints(directory) lists those of flaxckpt."
        )


class LeafDifference(NamedTuple):
    """One leaf in which a checkpoint differs from what was asked for.

    Attributes:
        path: The leaf's path, such as `params/dense/kernel`.
        stored: What the checkpoint has, such as `float32[2,3]`, or `nothing`.
        wanted: What `like` asks for, in the form of `stored`.
    """

    path: str
    stored: str
    wanted: str


class CheckpointMismatchError(CheckpointError, ValueError):
    """A checkpoint whose leaves differ from the wanted leaves; nothing was loaded.

    Attributes:
        path: The checkpoint.
        differences: A `LeafDifference` for every leaf that differs.
        advice: What to do about the differences.
    """

    def __init__(
        self, path: str, differences: Iterable[LeafDifference], advice: str
    ) -> None:
        differences = tuple(LeafDifference(*each) for each in differences)
        super().__init__(path, differences, advice)
        self.path, self.differences, self.advice = path, differences, advice

    def __str__(self) -> str:
        lines = "".join(
            f"\n  {each.path}: checkpoint has {each.stored}, wanted {each.wanted}"
            for each in self.differences
        )
        return (
            f"Checkpoint {self.path!r} differs from what was asked for in "
            f"{_count(len(self.differences), 'leaf', 'leaves')}:{lines}\n{self.advice}"
        )


class CheckpointCorruptError(CheckpointError, ValueError):
    """A checkpoint that is damaged; nothing was loaded from it.

    Attributes:
        path: The checkpoint.
        problem: What is damaged.
    """

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path, self.problem = path, problem

    def __str__(self) -> str:
        return (
            f"Checkpoint {self.path!r} is damaged: {self.problem}. "
            "Load another one; flaxckpt.list_checkpoints(directory) lists them."
        )


class CheckpointWriteError(CheckpointError, RuntimeError):
    """A save that failed.

    If it failed in the background, the next call that checks for errors raises this.
    Earlier checkpoints are untouched, and later saves are possible.

    Attributes:
        path: The checkpoint that was to be written.
        cause: What failed.
    """

    def __init__(self, path: str, cause: str) -> None:
        super().__init__(path, cause)
        self.path, self.cause = path, cause

    def __str__(self) -> str:
        return (
            f"Saving {self.path!r} failed: {self.cause}. "
            "No earlier checkpoint was touched; this one does not exist. "
            "Training can go on and save again."
        )


class HookError(CheckpointWriteError):
    """A function of `on_saved` that raised; the checkpoint that it was told of stays.

    The next call that checks for errors raises this, as it raises the error of a save.

    Attributes:
        path: The checkpoint, which is on disk.
        cause: What the function raised.
        function: The function's name.
    """

    def __init__(self, path: str, cause: str, function: str) -> None:
        super().__init__(path, cause)
        self.args = path, cause, function  # all of them keep pickling alive
        self.function = function

    def __str__(self) -> str:
        return (
            f"{self.path!r} is saved, but on_saved={self.function} then failed: "
            f"{self.cause.rstrip('.')}. The checkpoint stays. Training can go on: the "
            "next save calls the function again."
        )


class Preempted(CheckpointError, RuntimeError):  # the name is fixed
    """A signal told the process to end; the training state has been saved.

    Attributes:
        signal: Name of the signal, such as `SIGTERM`.
        path: The checkpoint to resume from.
    """

    def __init__(self, signal: str, path: str) -> None:
        super().__init__(signal, path)
        self.signal, self.path = signal, path

    def __str__(self) -> str:
        return (
            f"Told to end by {self.signal}; saved {self.path!r}. End the program now, "
            "and restore the latest checkpoint when it runs again."
        )


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
