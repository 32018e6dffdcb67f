"""Whether a trace of JAX is running."""

from jax.extend.core import get_opaque_trace_state

# The state of JAX's transformations while none runs; Flax NNX asks for it likewise.
_OUTSIDE = get_opaque_trace_state(convention="nnx")


def runs_in_trace() -> bool:
    """Tell whether a trace is running."""
    return get_opaque_trace_state(convention="nnx") != _OUTSIDE
