"""Facts about this process and its libraries, independent of what is saved.

`frames` tells whose code is on the stack. `forks` refuses forked processes that would
hang, and `locks` makes locks that neither a fork nor an interrupt leaves locked.
`jax_internals` has every private name of JAX that the package uses. `unchecked` leaves
JAX's debugging checks out of the package's own copies, and `gone` finds deleted arrays.
`quiet` keeps Orbax's log lines from the console, `failures` puts an error in one line,
and `patience` says how often a reader looks again.
"""
