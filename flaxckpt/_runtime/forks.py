"""Refuse processes that were forked from one in which JAX or TensorStore had threads.

A forked process has none of its parent's threads: JAX waits for them for ever, and
TensorStore aborts the process. `use_threads` raises an error before either.
"""

import os

from flaxckpt._runtime.jax_internals import has_backends
from flaxckpt.errors import CheckpointError

# "used": this process uses threads; "parent": id of the parent that used them.
_facts: dict[str, int] = {}


def use_threads() -> None:
    """Check that this process may use JAX and TensorStore, and note that it does.

    Raises:
        CheckpointError: If it was forked from a process that had used them.
    """
    parent = _facts.get("parent")
    if parent is not None:
        raise CheckpointError(
            f"JAX or TensorStore had started threads in process {parent}, and this "
            "process was forked from it. This process has none of these threads, so "
            "it can neither save nor load checkpoints. Start it by multiprocessing's "
            f'"spawn" or "forkserver" method, or save and load in process {parent}.'
        )
    _facts["used"] = 1


def _look_around() -> None:
    """Note whether JAX has threads, before the fork: a child may hang on JAX's lock."""
    if has_backends():
        _facts["used"] = 1


def _look_back() -> None:
    if "used" in _facts:
        _facts.setdefault("parent", os.getppid())


os.register_at_fork(before=_look_around, after_in_child=_look_back)
