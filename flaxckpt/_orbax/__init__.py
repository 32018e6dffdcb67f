"""The one folder that imports Orbax.

`engine` has Orbax write a tree, and gives each of flaxckpt's calls of Orbax an
operation number of its own, apart from the user's. Orbax calls the `state_handler`,
which writes directly or has Orbax write. `share` has Orbax write one process's share of
a tree that several hold. `restore` has Orbax read leaves of a checkpoint of flaxckpt's.
`recognize` finds checkpoints of plain Orbax, and `foreign` has Orbax read them.
`described` reads what Orbax tells of a checkpoint without its values. `files`
names the files of leaves, and checks the names before Orbax opens the files.
"""
