"""The command `flaxckpt`: `main` parses it, and `demo` is the training that it runs."""
