"""Saves of several processes: they agree on each, and each writes its share.

`saves` has `PodSaver`, which has the parts of a `Saver` and takes its place in several
processes. `joint_saves` has what the processes do together, in the background: they
meet, agree and write. `agreement` says what has to be equal for that. `own_values` puts
values that each process has for itself into arrays of all.
"""
