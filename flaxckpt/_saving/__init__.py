"""From a call that saves to the thread that writes.

`triggers` makes a call save by the clock or for a signal, and `advice` warns the loop.
`call` is one call with its decision, and `contents` are the trees that it saves.
`saves` copies them and makes a job, `queue` runs one job after another in the
background, `report` counts the saves, and `at_exit` finishes the jobs at the program's
end.
"""
