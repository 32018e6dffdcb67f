"""Whether a call runs within a trace of JAX."""

from jax.core import Tracer
from jax.extend.core import get_opaque_trace_state

from flaxckpt._trees.ties import PyTree, leaves_of

# What JAX's transformations are when none is running; as Flax NNX asks for it.
OUTSIDE = get_opaque_trace_state(convention="nnx")


def is_traced(tree: PyTree, *values: PyTree) -> bool:
    """Tell whether a trace is running, or a tree or any value is that of one."""
    if runs_in_trace():
        return True
    kinds = set(map(type, [*leaves_of(tree), *leaves_of(values)]))
    return any(issubclass(kind, Tracer) for kind in kinds)


def runs_in_trace() -> bool:
    """Tell whether a trace is running."""
    return get_opaque_trace_state(convention="nnx") != OUTSIDE
