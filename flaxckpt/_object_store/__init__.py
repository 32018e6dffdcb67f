"""Checkpoints in an object store, which has neither directories nor renames.

`objects` reads and writes a store, and `url` parses its URLs. A `pointer` names the
directory of a checkpoint's files. `store_area` is an `Area` of `_disk` in a store: it
uploads the files and changes the pointer while it holds the `lease`, which is the
series' lock. `scratch` makes the local directory that mirrors the store. `listing`
lists checkpoints, and a `source` downloads the files of one that a reader needs.
`opening` imports `objects` only where a URL is given.
"""
