"""Whether a trace of JAX is running, and what it tells of a value."""

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


def varying_axes(value: Any) -> frozenset[str]:
    """Return the mesh axes of `shard_map` along which a value may differ.

    Empty where JAX does not track them (`check_vma=False`).
    """
    tracked = getattr(jax.typeof(value), "manual_axis_type", None)
    return getattr(tracked, "varying", frozenset())
