"""Metrics that count as still being computed, however quick the device is."""

import jax

from flaxckpt._saving import call, contents, paths


def is_array(value):
    return isinstance(value, jax.Array)


def take_metrics_for_unknown(patch):
    """Have a save ask a device for its metrics, with what sets a module's attribute."""
    for module in (call, contents, paths):
        patch.setattr(module, "is_unknown", is_array)
