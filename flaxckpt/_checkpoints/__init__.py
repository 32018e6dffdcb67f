"""Whole checkpoints, and the series that a filepath names.

`write` writes a checkpoint, and `finish` its table and its record. `together` writes
one from several processes, each of which writes its `share`. `looks` checks the first
one of each tree structure and way of writing. `load` has the public functions: they
read the table of leaves by `read_table`, and the tree by `load_tree`, which reads
leaves by `read`. What another library stored, `foreign` describes. `export` writes a
tree to a file of another library. `undisturbed` reads again if a writer interfered, and
`loaded_in_all` has all processes load the same checkpoint. `described` tells what a
checkpoint holds.
`series` is all that one filepath has on disk, and `series_writer` writes it. For that,
`ledger` remembers what is there, and `target` checks a path. `rivals` looks for a
better checkpoint at a save's path, and `aside` decides which of the two goes aside.
`retention` chooses what `series_writer` deletes. `listing` lists a directory without a
series, and `watch` goes on listing it. `found` finds the root of a checkpoint's series,
and the mark of its end, for `watch` and for `delete`, which deletes one checkpoint.

The lock, the renaming of a written directory to its place, and the deletion of what a
crash has left are the `area`'s; see `_disk` and `_object_store`.
"""
