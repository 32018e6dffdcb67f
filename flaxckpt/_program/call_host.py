"""Calls from a running program into Python, which on CPU make JAX copy nothing.

`jax.experimental.io_callback` has JAX copy its operands to a CPU device first. On CPU
the program's own threads make this copy. If all of them wait in a collective for the
very call, the program never ends. So on CPU a call uses `buffer_callback`, which copies
nothing, if the devices of the program are known. If they are not, a call on CPU uses
what `io_callback` consists of, without that copy; this has no public name.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxckpt._runtime.jax_internals import callback_parts
from flaxckpt.errors import CheckpointError

_TOKEN = jax.ShapeDtypeStruct((), jnp.int32)


def call_host(
    take: Callable[[Sequence[Any]], np.int32],
    operands: Sequence[jax.Array],
    *,
    is_placed: bool,
) -> jax.Array:
    """Call a function on the host, from the program that is being traced.

    Args:
        take: The function. It gets the operands as views, valid during the call.
        operands: Values of the trace.
        is_placed: Whether each device makes the call with its own part of the operands.
            Otherwise one device makes the call, with the whole operands.

    Returns:
        What `take` returns, i32[].
    """

    def from_buffers(context: Any, token: Any, *buffers: Any) -> None:
        del context
        np.asarray(token)[...] = take([np.asarray(buffer) for buffer in buffers])

    if jax.default_backend() != "cpu":
        from jax.experimental import io_callback

        return io_callback(lambda *arrays: take(arrays), _TOKEN, *operands)
    if is_placed:
        from jax.experimental.buffer_callback import buffer_callback

        call = buffer_callback(from_buffers, _TOKEN, has_side_effect=True)
        return call(*operands) + _io()
    return _call_p().bind(*operands, take=take)[0]


def _io() -> Any:
    """Return 0, with the effect of `io_callback`, which `buffer_callback` lacks.

    Without it, `vmap` of a `cond` with a predicate of each member's own would run the
    call for all members. With it, JAX refuses to.
    """
    try:
        return _io_p().bind()
    except CheckpointError:
        return 0


@functools.cache
def _io_p() -> Any:
    """Return a primitive that has only the effect.

    Raises:
        CheckpointError: If JAX lacks it.
    """
    from jax.core import ShapedArray
    from jax.extend.core import Primitive
    from jax.interpreters import mlir

    effect, _, _ = callback_parts()
    primitive = Primitive("io")

    @primitive.def_effectful_abstract_eval
    def describe() -> Any:
        return ShapedArray((), jnp.int32), {effect}

    @primitive.def_impl
    def run() -> Any:
        return np.int32(0)

    zero = mlir.lower_fun(lambda: jnp.int32(0), multiple_results=False)
    mlir.register_lowering(primitive, zero)
    return primitive


@functools.cache
def _call_p() -> Any:
    """Return a primitive that calls `take` with the whole operands, uncopied.

    Raises:
        CheckpointError: If JAX lacks what it is made of.
    """
    from jax.core import ShapedArray
    from jax.extend.core import Primitive
    from jax.interpreters import mlir

    effect, sharding_of, primitives_with_devices = callback_parts()
    primitive = Primitive("call_host")
    primitive.multiple_results = True
    primitives_with_devices.add(primitive)

    @primitive.def_effectful_abstract_eval
    def describe(*_: Any, take: Any) -> Any:
        del take
        return [ShapedArray((), jnp.int32)], {effect}

    @primitive.def_impl
    def run(*operands: Any, take: Any) -> Any:
        with jax.disable_jit(False):
            return jax.jit(functools.partial(primitive.bind, take=take))(*operands)

    def lower(context: Any, *operands: Any, take: Any) -> Any:
        result, _, _ = mlir.emit_python_callback(
            context,
            lambda *arrays: (take(arrays),),
            None,
            list(operands),
            context.avals_in,
            context.avals_out,
            has_side_effect=True,
            returns_token=False,
            sharding=sharding_of(
                context.module_context.axis_context, None, context.avals_out
            ),
        )
        return result

    mlir.register_lowering(primitive, lower, cacheable=False)
    return primitive
