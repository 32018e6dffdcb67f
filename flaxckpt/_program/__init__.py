"""What runs inside a jitted program.

`best_trees` has `Snapshot`, which keeps the best trees in the program:
`best_trees_checks` checks what it is given, and `best_trees_slots` writes its slots.
`chunked_scan` runs a scan in parts. `traced_update` tells whether a call runs in a
trace. `handover` hands a tree from a running program to the host, shard by shard:
`shards` says which part each device hands over, `call_host` calls Python, and
`arrivals` puts the shards together.
"""
