"""From a call that saves to the writing thread.

`saves` takes a `call` and its `contents`, `queue` runs one job after another in the
background, `report` counts, and `at_exit` finishes what is under way at the program's
end.
"""
