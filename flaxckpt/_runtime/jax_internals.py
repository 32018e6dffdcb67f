"""Every private name of JAX that this package uses.

JAX may move or drop such a name in any release. So each function here looks its name up
when it is called, and says what is lost in a JAX without that name. Everything else
goes on working, `import flaxckpt` first of all.
"""

import contextlib
import sys
from collections.abc import Generator
from typing import Any

import jax
import numpy as np

from flaxckpt.errors import CheckpointError


def has_backends() -> bool:
    """Tell whether JAX has started its backends, and so its threads.

    It imports nothing, because it is called before every fork.

    Without this name, a process that was forked from one which used JAX, but not this
    package, is not refused, and may wait for JAX's threads for ever.
    """
    bridge: Any = sys.modules.get("jax._src.xla_bridge")
    return bool(getattr(bridge, "backends_are_initialized", bool)())


def device_order(sharding: jax.sharding.Sharding) -> Any:
    """Return a sharding's devices in order.

    A program copies only arrays whose devices are equal and in one order. Without this
    name, the arrays of each sharding are copied by a program of their own, and a tree
    with several shardings waits for a metric that a device still computes.
    """
    return getattr(sharding, "_device_assignment", sharding)


def entered_mesh() -> Any:
    """Return the mesh of the caller's `with mesh:`; None if there is none.

    Without this name, a `PartitionSpec` in `like` needs `jax.set_mesh`.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from jax._src.mesh import thread_resources

        return thread_resources.env.physical_mesh
    return None


def put_alike(
    values: list[np.ndarray], like: jax.Array, sharding: jax.sharding.Sharding
) -> list[jax.Array]:
    """Put host arrays on a sharding, as `device_put` has put another array there.

    Without this name, JAX takes four times as long to put many small arrays.

    Args:
        values: Arrays of one dtype, and of the shape of `like`.
        like: What `device_put` has returned; no tracer. If it has narrowed the dtype,
            it puts these arrays, too.
        sharding: One device of this process.
    """
    with contextlib.suppress(ImportError, TypeError):  # or it has other arguments
        from jax._src.interpreters.pxla import batched_device_put

        if like.dtype == values[0].dtype:
            aval, devices = like.aval, [*sharding.device_set]
            return [batched_device_put(aval, sharding, [x], devices) for x in values]
    return jax.device_put(values, sharding)


def distributed_state() -> Any:
    """Return the number, index and client of this process, and start no backend.

    Raises:
        CheckpointError: Without this name, several processes cannot save or load.
    """
    with _needed("several processes cannot save or load"):
        from jax._src.distributed import global_state

        return global_state


def weakly_typed(value: jax.Array) -> Any:
    """Return a traced value with the weak type that a Python number has.

    Raises:
        CheckpointError: Without this name, `scan_in_chunks` takes no such carry.
    """
    with _needed(
        "scan_in_chunks takes no Python number in its carry. Give each a dtype, as in "
        "jnp.float32(0)"
    ):
        from jax._src.lax.lax import _convert_element_type

    return _convert_element_type(value, value.dtype, weak_type=True)


def callback_parts() -> tuple[Any, Any, Any]:
    """Return what `io_callback` consists of, to make one that copies no operands.

    Returns:
        The effect of a callback; a function for the sharding of its operands; and the
        set of the primitives that are lowered for known devices.

    Raises:
        CheckpointError: Without one of these names, `update` in jit cannot save on CPU,
            unless the program's devices are known.
    """
    with _needed(
        "update within jit cannot save on several CPU devices without the shardings of "
        "the tree. Pass init(like=...), or call update between the parts of "
        "flaxckpt.scan_in_chunks"
    ):
        from jax._src.callback import _callback_op_sharding, _IOEffect
        from jax._src.dispatch import prim_requires_devices_during_lowering

    return _IOEffect, _callback_op_sharding, prim_requires_devices_during_lowering


def runtime_tokens() -> Any:
    """Return JAX's tokens of running programs, for which `effects_barrier` waits.

    `effects_barrier` stops at the token of a failed program, and keeps it.

    Raises:
        CheckpointError: Without this name, after a program has failed, it is not known
            when the other programs have handed over what they save.
    """
    with _needed(
        "nothing can wait for the saves of other programs after one has failed. Start "
        "the process again"
    ):
        from jax._src.dispatch import runtime_tokens

        return runtime_tokens


@contextlib.contextmanager
def _needed(lost: str) -> Generator[None]:
    """Raise an error that says what is lost if an import in the block fails."""
    try:
        yield
    except ImportError as error:
        raise CheckpointError(
            f"JAX {jax.__version__} lacks what flaxckpt needs here ({error}): {lost}."
        ) from error
