"""Tests with several real processes, which JAX connects over Gloo."""
