"""Directories and small files on a disk: parsed, listed, locked, put in place.

`open` opens plain files only, and `vetting` checks the files that Orbax and TensorStore
open. `fields`, `record_fields`, `table`, `zarr_json` and `owner` parse JSON. `record`
reads and writes a checkpoint's record, `info` is its dataclass, and `listing` finds
checkpoints by their records. `nested` refuses checkpoints inside checkpoints. `files`
writes and syncs a directory's files. `commit` holds a `lock`, whose file `lock_file`
opens, and puts the directory in its place by an `exchange` of names. `alias` gives
Orbax and TensorStore paths that they read correctly.
"""
