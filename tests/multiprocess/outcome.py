"""What is on disk after a run of `faulty.py`."""

import numpy as np

import flaxckpt


def there_below(directory):
    """Return the epochs of the checkpoints that are there, each of which is whole."""
    epochs = set()
    for info in flaxckpt.list_checkpoints(directory):
        flaxckpt.verify(info.path)
        tree, epoch = flaxckpt.load(info.path), info.epoch
        assert (tree["w"] == np.arange(96.0).reshape(12, 8) + epoch).all(), info
        assert (tree["b"] == epoch).all(), info
        assert (tree["host"] == epoch).all(), info
        assert tree["text"] == f"epoch {epoch}", info
        epochs.add(epoch)
    return epochs


def leftovers(directory):
    """Return the directories of flaxckpt's own that are there."""
    hidden = directory.glob(".flaxckpt-*")
    return [path for path in hidden if not path.name.endswith(".lock")]
