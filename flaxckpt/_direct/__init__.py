"""Orbax's format, written and read straight from memory.

A `form` is how Orbax has stored one tree structure, and writes new values in that way.
`forms` remembers the forms of this process. `zarr` parses Zarr 3's descriptions, and
`chunks` cuts leaves into chunks. `write` writes arrays, and `read` reads them from one
of the `sources`. `frozen_files` links files of leaves that do not change. `threads`
leaves the cores and the interpreter's lock to training.
"""
