"""The command `flaxckpt`."""
