"""Copies of a tree's arrays, made so that training goes on at once.

`plan` groups the arrays of a structure, `on_device` copies them in one jitted call into
the memory of an earlier copy, `on_host` brings them here, and `held` are the copies
that a writer has. `packing` puts many small values into a few arrays.
"""
