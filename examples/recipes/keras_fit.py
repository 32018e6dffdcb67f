"""Resume a `fit` of Keras that was interrupted, and keep its best model.

    python examples/recipes/keras_fit.py [DIRECTORY]

A process is stopped in the fourth epoch of its fit. Another fit goes on, and ends with
the weights of a fit that nobody stopped.
"""

import os
import subprocess
import sys
import tempfile

os.environ["KERAS_BACKEND"] = "jax"  # before Keras is imported

import keras
import numpy as np

from flaxckpt.integrations.keras import ModelCheckpoint, load_into

keras.utils.set_random_seed(0)
X = np.random.normal(size=(256, 4)).astype("float32")
Y = np.sin(X.sum(axis=1, keepdims=True))


def make_model():
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(32, "relu"), keras.layers.Dropout(0.1)]
    model = keras.Sequential([keras.Input((4,)), *layers, keras.layers.Dense(1)])
    model.compile("adam", "mse")
    return model


def stopper():
    def stop(epoch, logs):
        if epoch == 3:
            sys.exit("stopped in epoch 4")

    return keras.callbacks.LambdaCallback(on_epoch_begin=stop)


def fit(directory, *others):
    model = make_model()
    path = f"{directory}/best"
    saver = ModelCheckpoint(path, save_best_only=True, resume=True)
    callbacks = [saver, *others]
    model.fit(X, Y, 32, 8, verbose=0, callbacks=callbacks, validation_split=0.25)
    return model, saver


def main(directory):
    whole, _ = fit(f"{directory}/whole")
    stopped = [sys.executable, __file__, f"{directory}/stopped", "stop"]
    assert subprocess.run(stopped, check=False).returncode == 1
    resumed, saver = fit(f"{directory}/stopped")

    pairs = zip(whole.get_weights(), resumed.get_weights(), strict=True)
    same = all(np.array_equal(ours, theirs) for ours, theirs in pairs)
    print("resumed; the same weights as without the stop:", same)
    best = make_model()
    load_into(best, saver.best.path)
    loss = best.evaluate(X[192:], Y[192:], verbose=0)
    print(f"the best of both fits: {loss:.4f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        directory, *job = sys.argv[1:] or [temporary]
        if job:
            fit(directory, stopper())
        else:
            main(directory)
