"""Whole checkpoints, and the series that a filepath names.

`write` writes a checkpoint, and checks it the first time (`looks`); `versions` go into
its record. `load` has the public functions: `read` reads leaves for them, and
`undisturbed` reads again if a writer interfered. `series` is all that one filepath has
on disk. For it, `target` checks a path, `aside` finds a place for a worse save, and
`retention` chooses what to delete. `listing` lists a directory without a series.
"""
