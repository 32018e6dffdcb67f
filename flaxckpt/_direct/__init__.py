"""Orbax's format, written and read straight from memory.

`form` is the layout of files that Orbax has shown for one structure, and `forms`
remembers them. `zarr` and `chunks` know the format, `write` and `read` move values,
`sources` are where they are read from, `frozen_files` links files that do not change,
and `threads` leaves the machine to training.
"""
