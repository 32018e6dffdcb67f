"""Trees as they are stored, and what of a tree is what.

`describe` turns a tree into a `Layout` (in `layout`) of `Leaf`s (in `leaf`), by a walk
in `structure` over the `skeleton`, with `ties` for what is in two places and `names`
for what the store can spell. `match` compares a stored layout with a wanted one, and
`convert` makes each leaf what was wanted. `weights` finds the weights in a tree,
`stored_weights` those in a stored one. `owned_shards` are the parts of a leaf that this
process holds, and `digest` sums them up.
"""
