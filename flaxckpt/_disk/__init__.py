"""Directories and small files on a disk: parsed, listed, locked, put in place.

`open` opens plain files only, also by way of links, and `vetting` checks the files that
Orbax and TensorStore open. `fields`, `record_fields`, `table`, `zarr_json` and `owner`
parse JSON. `record` encodes and reads a checkpoint's record (the names of our files are
in `_decision.reserved`), `info` is its dataclass, and `listing` finds checkpoints by
their records, and what a crash has left between two renames, which `disk_area` repairs.
`series_names` has the names that follow from a series' name. `nested` refuses
checkpoints inside checkpoints. `files` writes and syncs a directory's files, and
`page_cache` writes to one of them, through the page cache or past it. `alias` gives
Orbax and TensorStore paths that they read correctly.

`area` says what is asked of the place where a series is written, and `disk_area` is
that place on a disk. It has a `claim` to the series, by a `lock` whose file `lock_file`
opens. It writes into a `staging` directory and puts that in its place by an `exchange`
of names.
"""
