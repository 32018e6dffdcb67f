"""Other libraries beside flaxckpt, each with an extra of its own.

`keras` has a callback for `model.fit`, and imports Keras. `tensorboard`, `mlflow` and
`wandb` make functions for `on_saved` that log each checkpoint; a library is imported
when a function for it is made. `import flaxckpt` imports none of them.
"""
