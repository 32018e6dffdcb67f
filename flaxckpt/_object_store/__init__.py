"""Checkpoints in an object store, which has neither directories nor renames.

`objects` speaks to the store. A `pointer` says where the files of a checkpoint are,
`commit` changes it, under a `lease`. `scratch` has what mirrors the store on this
machine, and a `source` fetches of a checkpoint what a reader needs.
"""
