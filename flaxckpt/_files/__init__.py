"""Files of other libraries: `load` reads them, and `export` writes them.

`formats` recognizes a file, and calls what reads and writes it. Each of `safetensors`,
`npz`, `msgpack` and `keras` knows one format, by the library that was made for it.
`library` imports that one when it is first needed.

A reader returns a `ForeignTree`: a layout, as a checkpoint has one, and a function that
reads a leaf. `stored_arrays` makes it from arrays that have names. A writer gets an
`Outgoing`: a tree, and a function that reads its leaves onto the host. `named_leaves`
gives each leaf a name, and refuses what a format cannot hold. `staging` puts written
files in the place of earlier ones.
"""
