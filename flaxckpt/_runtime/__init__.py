"""What the package needs of Python, JAX and this process, whatever is saved.

`frames` tells whose code is on the stack, and `traces` whether a trace is running.
`jax_internals` has every private name of JAX that the package uses. `forks` refuses
forked processes that would hang, and `locks` makes locks that neither a fork nor an
interrupt leaves locked. `unchecked` leaves JAX's debugging checks out of the package's
own copies and makes pools whose threads run without them, and `gone` finds deleted
arrays. `quiet` keeps Orbax's log lines from the console, and `log` logs or prints our
own. `failures` puts an error in one line, and `beside` adds problems to an error that
is being raised. `patience` says how often a reader looks again, and `collector` pauses
the collection of garbage. `threads` leaves the cores and the interpreter's lock to
training. `extras` says how to install what is optional.
"""
