"""Messages between the processes of a run, and signals from the system.

`messages` tells how many processes there are and which one leads, and exchanges values
with time-outs. `clock` tells when an interval is over; of several processes, it tells
all at the same call. `preemption` remembers SIGTERM and SIGINT in a single process;
several learn of SIGTERM from JAX, at the same call. `mesh` has one device of each
process.
"""
