"""Copies of a tree's arrays, so that training goes on while they are written.

`plan` groups a tree's arrays into batches. `on_device` copies each batch by one of the
jitted `programs`, into the memory of an earlier save's copies; by its `verdict_of`, a
device decides a due check. `on_host` copies to host memory instead, and tells whether
the devices have room, by which `_saving.parts` chooses. `ahead` compiles the programs
before the first save needs them, and has `blank` claim memory. `held` holds the copies
until they are written. `memory_kinds` copies offloaded arrays. `beside` brings scalars
to a tree's devices. `packing` joins many small values into a few operands of a
callback.
"""
