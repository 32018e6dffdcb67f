"""Messages between the processes of a run, and signals from the system.

`messages` exchanges values with time-outs. `clock` tells all processes at the same call
when an interval is over. `preemption` remembers SIGTERM and SIGINT until the loop asks.
"""
