"""Saves of several processes: they agree on each, and each writes its shards.

`saves` has `PodSaver`, which has the parts of a `Saver` and takes its place in several
processes. `agreement` compares the epochs, batches, metrics and paths of their calls.
`learning` has Orbax show them the form of its files, once for each structure.
"""
