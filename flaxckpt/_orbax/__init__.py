"""The one folder that imports Orbax.

`engine` has Orbax write a tree, `restore` has it read one, its own or ours, and `files`
checks what is there before Orbax opens it.
"""
