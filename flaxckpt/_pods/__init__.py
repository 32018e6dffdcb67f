"""Saves of several processes: they agree on each, and each writes its shards.

`saves` has `PodSaves`, which stands in for `Saves` in several processes. `agreement`
compares what the processes are about to write. `learning` gives Orbax the directory in
which it shows them the form of its files, once for each structure.
"""
