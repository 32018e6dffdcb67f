"""The one folder that imports Orbax.

`engine` has Orbax write a tree. `restore` has Orbax read a tree, from a checkpoint of
flaxckpt's or of plain Orbax's. `files` names the files of leaves, and checks the names
before Orbax opens the files.
"""
