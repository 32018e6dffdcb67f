"""flaxckpt within the training loops of other libraries: one module for each.

Each module imports its library. `import flaxckpt` imports none of them.
"""
