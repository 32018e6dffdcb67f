"""Whether a trace of JAX is running."""

from typing import Any

import jax
from jax.core import Tracer
from jax.extend.core import get_opaque_trace_state

# JAX's state while no transformation runs. Flax NNX asks JAX for it in the same way.
_OUTSIDE = get_opaque_trace_state(convention="nnx")


def runs_in_trace() -> bool:
    """Tell whether a trace is running."""
    return get_opaque_trace_state(convention="nnx") != _OUTSIDE


def is_traced(*trees: Any) -> bool:
    """Tell whether a trace is running, or a leaf of a tree is traced."""
    leaves = jax.tree.leaves(trees)
    return runs_in_trace() or any(isinstance(leaf, Tracer) for leaf in leaves)
