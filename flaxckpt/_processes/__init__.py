"""What several processes tell each other, and what the system tells this one.

`messages` exchanges values with time-outs, `clock` has all processes check the time at
the same call, and `preemption` remembers SIGTERM and SIGINT until the loop asks.
"""
