"""Whether a call runs within a trace of JAX."""

import functools

import jax
from jax.core import Tracer
from jax.extend.core import get_opaque_trace_state

from flaxckpt._trees.ties import PyTree, leaves_of

# The state of JAX's transformations while none runs; Flax NNX asks for it likewise.
OUTSIDE = get_opaque_trace_state(convention="nnx")


def is_traced(tree: PyTree, *values: PyTree) -> bool:
    """Tell whether a trace is running, or a leaf of the arguments is traced."""
    if runs_in_trace():
        return True
    leaves = leaves_of(tree) + jax.tree.leaves(values)
    return any(map(_is_of_tracers, set(map(type, leaves))))


def runs_in_trace() -> bool:
    """Tell whether a trace is running."""
    return get_opaque_trace_state(convention="nnx") != OUTSIDE


@functools.lru_cache(maxsize=256)  # `issubclass` on a type of JAX's takes a microsecond
def _is_of_tracers(kind: type) -> bool:
    return issubclass(kind, Tracer)
