"""Orbax's format, written straight from memory and read straight into it.

A `form` is how Orbax has stored one tree structure. `learn` finds the form in what
Orbax has written, and `forms` remembers the forms. `write` writes new values
in a form, and `read` reads them from one of the `sources`. `zarr` parses Zarr 3's
descriptions, and `chunks` cuts leaves into chunks. `frozen_files` links files of leaves
that do not change. `ocdbt` writes a database without TensorStore, and
`crc32c` is the checksum in both formats.
"""
