"""What goes on in a jitted program, and its counterpart on the host.

`best_trees` has `Snapshot`, which keeps the best trees in the program:
`best_trees_checks` checks the trees and logs that it is given, `best_trees_slots`
writes its slots, and `best_trees_saved` puts its trees in the order in which they are
saved. `chunked_scan` runs a scan in parts.

`traced_update` is `update` within a program, which hands a tree to the host, shard by
shard: `shards` says which part each device hands over, `call_host` calls Python, and
`stream` puts the shards together.
"""
