"""From a call that saves to the thread that writes.

`triggers` tells that the interval is over or that a signal came, and `advice` warns.
What the loop calls is in `_updating`, which asks both. `saves` has `Saver`, which
decides a call, copies its tree and submits a job. `call` is one call with its decision,
`count` counts the batches of saves by hand, `describe` makes the `contents` that a call
saves, and `lines` tells which saves may supersede which. `queue` runs each `job` in the
background, where `publish` writes the contents to their `paths`, and `best_kept` places
them so that better checkpoints stay, by the rule of `_checkpoints.aside`. `receiver`
saves the leaves that a running program hands over. `parts` holds the parts that every
saver shares, in one process or in several. `report` counts, prints and warns, `hooks`
calls the functions of `on_saved`, and `at_exit` finishes the jobs at the program's end.
"""
