"""Directories and small files on a disk.

`open` opens only plain files of bounded size. `fields`, `record_fields`, `table`,
`zarr_json` and `owner` parse them. `record` reads and writes a checkpoint's record, and
`listing` finds checkpoints by theirs. `nested` keeps them out of one another. `files`
writes a directory's files and syncs them, `commit` puts the directory in its place by
an `exchange` of names, under a `lock`.
"""
