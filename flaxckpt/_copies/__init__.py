"""Copies of a tree's arrays, so that training goes on while they are written.

`plan` groups a tree's arrays by their devices. `on_device` copies each group by one
jitted call, into the memory of an earlier save's copies; `on_host` copies to host
memory instead. `programs` has what the calls run, and `ahead` compiles it before the
first save. `held` holds the copies until they are written. `memory_kinds` copies
offloaded arrays. `packing` joins many small values into a few operands of a callback.
"""
