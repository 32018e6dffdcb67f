"""What is true of this process, and of nothing that is saved.

`frames` tells whose code is on the stack. `forks` and `locks` keep forked processes and
interrupts from harm. `unchecked` leaves JAX's debugging checks out of the package's own
copies. `quiet` keeps Orbax's log lines from the console, `failures` puts an error in
one line, and `patience` says how often a reader looks again.
"""
