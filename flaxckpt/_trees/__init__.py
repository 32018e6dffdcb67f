"""Trees as they are stored, and the comparison of a stored tree with a wanted one.

`describe` turns a tree into a `Layout` (in `layout`) of `Leaf`s (in `leaf`). It uses
`structure`, which walks the tree and builds its `skeleton`; `ties` flattens each shared
part of the tree once, and `names` spells the leaves' names for the store. `wanted`
describes what a tree asks for, whose shardings `placing` resolves; `match` compares a
stored layout with that, and `convert` converts each loaded leaf to the wanted one.
`weights` picks the weights from a tree. `stored_weights` finds where they are in a tree
that is stored, and in one that plain Orbax wrote. Both go by the rules in
`kinds_of_parts`. `owned_shards` returns the parts of a leaf that this process stores,
`per_process` encodes a value that each process has for itself, `integers` stores those
that int64 does not hold, and `stateful` the states of objects such as data iterators.
`selection` finds a part of a stored tree, and `renaming` gives it other names.
`in_place` puts loaded values into NNX objects. `chosen` applies a user's filter.
`digest` fingerprints leaves, by a checksum or by the sum in `digest_formula`.
`remembered` keeps a few values by key, and ignores a key that cannot be compared.
"""
