"""Whole checkpoints, and the series that a filepath names.

`write` writes a checkpoint and looks at it, `read` reads its leaves, `load` has the
public functions, and `undisturbed` reads beside a writer. `series` is what a filepath
has on disk: `target` checks a path, `aside` finds a place for a worse save, `retention`
says what may go, and `listing` lists a directory.
"""
