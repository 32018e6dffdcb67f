"""Orbax writes a tree into a directory.

This uses the free functions of Orbax's v1 API, each on one directory, and none of
Orbax's managers. flaxckpt itself does listing, retention and replacement.
"""

import contextlib
import contextvars
import functools
import itertools
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tensorstore

from flaxckpt._copies.held import HostCopy
from flaxckpt._direct.form import Fingerprints
from flaxckpt._direct.forms import thawed
from flaxckpt._direct.zarr import STATE
from flaxckpt._disk.alias import aliased
from flaxckpt._orbax.state_handler import StateHandler, Task, v1
from flaxckpt._processes.messages import are_several
from flaxckpt._runtime.quiet import quiet
from flaxckpt._trees.layout import Layout
from flaxckpt._trees.leaf import Leaf, is_of_keys
from flaxckpt._trees.ties import PyTree
from flaxckpt._trees.wanted import is_of_jax

# Orbax annotates its paths with a class of its own, but takes any path.
ocp: Any = v1
_NUMBER = contextvars.ContextVar("flaxckpt_calls_of_orbax", default=0)  # 0: not ours
_NUMBERS = itertools.count(-1, -1)  # Orbax counts from 0


@functools.cache
def storable(dtype: str) -> bool:
    """Tell whether arrays of the dtype with this name can be stored."""
    try:
        tensorstore.dtype(dtype)
    except (TypeError, ValueError):
        return False
    return dtype not in ("object", "string", "ustring", "json", "char", "byte")


def write_tree(
    directory: Path,
    layout: Layout,
    leaves: list[Any],
    write: Callable[[Path], Fingerprints] | None,
    *,
    is_database: bool,
    compress: bool,
) -> Task:
    """Have Orbax save a tree.

    Args:
        directory: Where to; nothing is there yet.
        layout: The tree's layout.
        leaves: Its leaves.
        write: Writes the tree, where its form is known; see `Task`.
        is_database: Whether Orbax puts the arrays into a database.
        compress: Whether it compresses them.

    Returns:
        The task, which tells whether flaxckpt or Orbax wrote the values.
    """

    def tree() -> PyTree:
        return layout.fill_for_orbax(
            list(map(with_key, layout.leaves, unpacked(leaves)))
        )

    task = Task(tree, write)
    context = orbax_context(is_database=is_database, compress=compress)
    registry = v1.handlers.local_registry(include_global_registry=False)
    registry.add(StateHandler, checkpointable_name=STATE)
    context.checkpointables.registry = registry
    with calls_of_orbax(context), aliased(directory) as plain:
        ocp.save_checkpointables(plain, {STATE: task})
    return task


def with_key(leaf: Leaf, value: Any) -> Any:
    """Return a leaf's value; wrap the data of PRNG keys as typed keys."""
    if leaf.kind != "key":
        return value
    if isinstance(value, jax.Array):
        is_data = not is_of_keys(value.dtype)
        return jax.random.wrap_key_data(value, impl=leaf.impl) if is_data else value
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return jax.random.wrap_key_data(jnp.asarray(value), impl=leaf.impl)


def unpacked(leaves: list[Any]) -> list[Any]:
    """Return leaves as Orbax takes them, without `FrozenLeaf` and `HostCopy`."""
    return [
        leaf.array() if isinstance(leaf, HostCopy) else leaf for leaf in thawed(leaves)
    ]


def orbax_narrows() -> bool:
    """Tell whether Orbax would narrow 64-bit arrays to 32 bits.

    This thread may be within `jax.enable_x64(True)`. Orbax makes arrays in other
    threads, which have the global setting. A new thread shows that setting.
    """
    if not is_of_jax("int64"):
        return False
    with ThreadPoolExecutor(1) as pool:
        return not pool.submit(is_of_jax, "int64").result()


def orbax_context(*, is_database: bool = True, compress: bool = False) -> v1.Context:
    """Return Orbax's settings for all of flaxckpt's reads and writes.

    Orbax writes its sharding file: without it, plain `ocp.load(path)` cannot place the
    arrays. Orbax makes directories synchronously. Otherwise it would find the signals
    that it waits for by a global number, which another thread's save changes. Then it
    writes before the directories exist, or hangs.
    """
    context = v1.Context()
    context.asynchronous.create_directories_asynchronously = False
    context.array.saving.use_ocdbt = is_database
    context.array.saving.use_compression = compress
    context.array.saving.enable_post_merge_validation = False
    context.memory.deepcopy_host_arrays = False
    return context


@contextlib.contextmanager
def calls_of_orbax(context: v1.Context) -> Generator[None]:
    """Call Orbax with these settings, without its log lines, and under a new number.

    Orbax numbers its operations, and looks the current number up again in several
    threads. If another operation has begun by then, it waits for signals under a number
    that gets none, and fails or hangs. So flaxckpt's operations have numbers of their
    own, and Orbax's counter stays as it is for the user's operations.
    """
    _teach_numbers()
    number = next(_NUMBERS)
    token = _NUMBER.set(number)
    with quiet():
        try:
            with context:
                yield
        finally:
            _NUMBER.reset(token)
            if not are_several():  # the other processes may still look
                _forget_signals(number)


@functools.cache
def _teach_numbers() -> None:
    """Have Orbax's generator of numbers ask whose operation it is."""
    from orbax.checkpoint._src.futures import synchronization

    generator: Any = synchronization.OperationIdGenerator
    following, current = generator.next_operation_id, generator.get_current_operation_id
    generator.next_operation_id = lambda: _NUMBER.get() or following()
    generator.get_current_operation_id = lambda: str(_NUMBER.get() or current())


def _forget_signals(number: int) -> None:
    """Delete what Orbax has noted for a number that it will not see again."""
    from orbax.checkpoint._src.futures import future

    future.AwaitableSignalsContract.remove_all_awaitable_signals(str(number))
