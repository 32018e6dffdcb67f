"""Whether a trace of JAX is running."""

from jax.extend.core import get_opaque_trace_state

# JAX's state while no transformation runs. Flax NNX asks JAX for it in the same way.
_OUTSIDE = get_opaque_trace_state(convention="nnx")


def runs_in_trace() -> bool:
    """Tell whether a trace is running."""
    return get_opaque_trace_state(convention="nnx") != _OUTSIDE
