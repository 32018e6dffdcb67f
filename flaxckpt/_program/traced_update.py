"""Whether a call runs within a trace of JAX."""

import functools

import jax
from jax.core import Tracer
from jax.extend.core import get_opaque_trace_state

from flaxckpt._trees.ties import PyTree, leaves_of

# What JAX's transformations are when none is running; as Flax NNX asks for it.
OUTSIDE = get_opaque_trace_state(convention="nnx")


def is_traced(tree: PyTree, *values: PyTree) -> bool:
    """Tell whether a trace is running, or a tree or any value is that of one."""
    if runs_in_trace():
        return True
    leaves = leaves_of(tree) + jax.tree.leaves(values)
    return any(map(_is_of_tracers, set(map(type, leaves))))


def runs_in_trace() -> bool:
    """Tell whether a trace is running."""
    return get_opaque_trace_state(convention="nnx") != OUTSIDE


@functools.lru_cache(maxsize=256)  # to ask a type of JAX's costs a microsecond
def _is_of_tracers(kind: type) -> bool:
    return issubclass(kind, Tracer)
