"""JAX's debugging checks, left out of the copies and transfers that flaxckpt makes.

`jax_debug_nans` and `jax_debug_infs` judge the results of the user's own programs. A
copy of a tree that holds a NaN is no such result. `jax.transfer_guard` finds transfers
that the user did not ask for, but the user does ask for a save or a load.
"""

import contextlib
import functools
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

P = ParamSpec("P")
T = TypeVar("T")
_CHECKS = (jax.debug_nans, jax.debug_infs)
_GUARDS = (
    jax.transfer_guard_host_to_device,
    jax.transfer_guard_device_to_device,
    jax.transfer_guard_device_to_host,
)
_CONFIG: Any = jax.config  # its settings have no types
_NOTHING = contextlib.nullcontext()


def unguarded() -> AbstractContextManager[None]:
    """Allow all transfers between host and devices, in this thread."""
    return _entered(_GUARDS, "allow") if _are_guarded() else _NOTHING


def unchecked() -> AbstractContextManager[None]:
    """Allow all transfers, and turn NaN and infinity checks off, in this thread."""
    if not (_CONFIG.jax_debug_nans or _CONFIG.jax_debug_infs):
        return unguarded()
    return _unjudged()


@contextlib.contextmanager
def _unjudged() -> Generator[None]:
    with unguarded(), _entered(_CHECKS, False):
        yield


@contextlib.contextmanager
def _entered(settings: Iterable[Any], value: Any) -> Generator[None]:
    with contextlib.ExitStack() as stack:
        for setting in settings:
            stack.enter_context(setting(value))
        yield


def _are_guarded() -> bool:
    levels = (
        _CONFIG.jax_transfer_guard_host_to_device,
        _CONFIG.jax_transfer_guard_device_to_device,
        _CONFIG.jax_transfer_guard_device_to_host,
    )
    return levels != (None, None, None)


def stay_unchecked() -> None:
    """Make `unchecked` hold in this thread until the thread ends."""
    # Not by `_entered`: a generator leaves its contexts when it is collected.
    for guard in _GUARDS:
        guard("allow").__enter__()
    for check in _CHECKS:
        check(False).__enter__()


def unchecked_pool(
    threads: int, name: str, begin: Callable[[], None] | None = None
) -> ThreadPoolExecutor:
    """Make a pool of threads that stay unchecked, with this thread's `enable_x64`.

    Args:
        threads: How many threads.
        name: Prefix of the threads' names.
        begin: What each thread calls first; None for nothing.
    """
    is_wide = _CONFIG.jax_enable_x64  # this thread may have its own setting

    def initialize() -> None:
        stay_unchecked()
        jax.enable_x64(is_wide).__enter__()
        if begin is not None:
            begin()

    return ThreadPoolExecutor(threads, name, initializer=initialize)


def runs_unchecked(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function so that it runs under `unchecked`."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with unchecked():
            return function(*args, **kwargs)

    return run


def as_arguments(tree: T, beside: Callable[[], Sequence[Any]] = tuple) -> T:
    """Return a tree that jitted functions take as an argument in this thread.

    If a transfer guard refuses numpy values as arguments, numpy's arrays and scalars
    become JAX arrays. They go to all devices of the mesh that another leaf is on, since
    a guard would also refuse to move them there, or else to the default device.

    Args:
        tree: The tree; its numpy leaves are small.
        beside: Returns the leaves of other arguments of the same programs.
    """
    level = _CONFIG.jax_transfer_guard_host_to_device
    if level not in ("disallow", "disallow_explicit"):
        return tree
    meshes = [
        leaf.sharding.mesh
        for leaf in (*jax.tree.leaves(tree), *beside())
        if isinstance(getattr(leaf, "sharding", None), NamedSharding)
        and isinstance(leaf.sharding.mesh, Mesh)
    ]

    def placed(leaf: Any) -> Any:
        if not isinstance(leaf, np.ndarray | np.generic):
            return leaf
        if not meshes:
            return jax.device_put(leaf)
        return replicated(leaf, NamedSharding(meshes[0], PartitionSpec()))

    with unguarded():
        return jax.tree.map(placed, tree)


def replicated(value: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Put an array of this process on each device of a sharding without axes.

    It goes to the devices' default memory. Other processes need not call this.
    """
    parts: list[jax.Array] = []
    # One by one: with `sharding`, `device_put` would need all processes to call it.
    for device in sharding.addressable_devices:
        kind = device.default_memory().kind
        there = SingleDeviceSharding(device, memory_kind=kind)
        parts.append(jax.device_put(value, there))
    return jax.make_array_from_single_device_arrays(np.shape(value), sharding, parts)
