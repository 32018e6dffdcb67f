"""What runs inside a jitted program.

`best_trees` is `Snapshot`, which keeps the best trees in the program. `chunked_scan`
stops between parts of a scan. `handover` streams a tree out of a running program, shard
by shard: `shards` says what each device holds, `call_host` calls Python, and `arrivals`
puts together what comes.
"""
