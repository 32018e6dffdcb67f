"""The real Keras callback and `step` with the template save at the same paths.

Where they differ on purpose (DESIGN.md, "Meaning of the decision"), the test brings
Keras to our rule by hand, at the line that names the difference; each difference has a
test of its own in test_state.py.
"""

import math
import warnings

import hypothesis.strategies as st
import keras
import numpy as np
import strategies
from hypothesis import given, settings

from flaxckpt import CheckpointState, step
from flaxckpt._decision.moment import Moment
from flaxckpt._decision.template import Template

METRICS = {
    "val_loss": None,
    "loss": None,
    "val_acc": keras.metrics.BinaryAccuracy(name="acc"),
    "auc": keras.metrics.AUC(name="auc"),
    "val_mae": keras.metrics.MeanAbsoluteError(name="mae"),
}


class RecordingModel:
    """Stands in for a model: knows its metrics, and records what it should save."""

    def __init__(self):
        found = [metric for metric in METRICS.values() if metric]
        self.metrics = [keras.src.trainers.compile_utils.MetricsList(found)]
        self.saved = []

    def save(self, path, overwrite):
        assert overwrite
        self.saved.append(path)

    save_weights = save


FILEPATHS = (
    "m.keras",
    "m-{epoch}.keras",
    "{epoch:02d}-{other:.2f}.keras",
    "{epoch:>3}/{other:+.1e}.keras",
    "{batch:03d}-{epoch}.keras",
    "{a/b:.2f}-{epoch:x}.keras",
)


@st.composite
def runs(draw):
    monitor = draw(st.sampled_from(sorted(METRICS)))
    freq = draw(st.one_of(st.just("epoch"), st.integers(1, 7)))
    filepaths = [f for f in FILEPATHS if freq != "epoch" or "batch" not in f]
    config = {
        "monitor": monitor,
        "mode": draw(st.sampled_from(["auto", "min", "max"])),
        "save_best_only": draw(st.booleans()),
        "save_freq": freq,
        "initial_value_threshold": draw(st.one_of(st.none(), strategies.numbers)),
    }
    return config, draw(st.sampled_from(filepaths)), draw(strategies.calls())


def logs_of(monitor, value, index):
    logs = {"other": index / 7, "a/b": -index / 3}
    return logs if value is None else {**logs, monitor: value}


def keras_paths(config, filepath, calls, directory):
    callback = keras.callbacks.ModelCheckpoint(f"{directory}/{filepath}", **config)
    model = RecordingModel()
    callback.set_model(model)
    # Keras sets this only at the end of an epoch, and crashes before (difference).
    callback._set_monitor_op()
    epoch_now = None
    for index, (epoch, batch, value) in enumerate(calls):
        logs = logs_of(config["monitor"], value, index)
        if epoch != epoch_now:
            callback.on_epoch_begin(epoch)
            if epoch_now is not None:
                # Keras knows a new epoch only by a smaller batch number (difference).
                callback._last_batch_seen = math.inf
            epoch_now = epoch
        before = len(model.saved), callback.best
        if batch is None:
            callback.on_epoch_end(epoch, logs)
        else:
            seen = callback._batches_seen_since_last_saving
            last = callback._last_batch_seen
            fresh = last is None or batch <= last
            seen += batch + 1 if fresh else batch - last
            callback.on_train_batch_end(batch, logs)
            if config["save_freq"] != "epoch" and seen >= config["save_freq"]:
                # Keras drops the remainder (difference).
                callback._batches_seen_since_last_saving = seen % config["save_freq"]
        if config["save_best_only"]:
            if value is None:
                # Keras saves where the metric is missing (difference).
                del model.saved[before[0] :]
            elif value != value:
                # Keras saves a first NaN and keeps it as the best (difference).
                del model.saved[before[0] :]
                callback.best = before[1]
    return model.saved


def our_paths(config, filepath, calls, directory):
    template = Template.parse(f"{directory}/{filepath}")
    state = CheckpointState.create(**config)
    saved = []
    for index, (epoch, batch, value) in enumerate(calls):
        logs = logs_of(config["monitor"], value, index)
        state, save = step(state, logs, epoch, batch)
        if save:
            saved.append(template.render(Moment(epoch, batch), logs))
    return saved


@given(runs())
@settings(max_examples=500)
def test_saved_paths_equal_keras(tmp_path_factory, run):
    config, filepath, calls = run
    directory = tmp_path_factory.getbasetemp() / "keras"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = our_paths(config, filepath, calls, directory)
        assert ours == keras_paths(config, filepath, calls, directory)


def test_directions_of_all_keras_metrics():
    """Every metric of Keras has a direction here, and the one that Keras gives it."""
    from flaxckpt._decision.direction import direction

    arguments = {
        "BinaryIoU": {},
        "FBetaScore": {},
        "IoU": {"num_classes": 2, "target_class_ids": [0]},
        "MeanIoU": {"num_classes": 2},
        "OneHotIoU": {"num_classes": 2, "target_class_ids": [0]},
        "OneHotMeanIoU": {"num_classes": 2},
        "PrecisionAtRecall": {"recall": 0.5},
        "RecallAtPrecision": {"precision": 0.5},
        "SensitivityAtSpecificity": {"specificity": 0.5},
        "SpecificityAtSensitivity": {"sensitivity": 0.5},
    }
    base = {"Metric", "Mean", "MeanMetricWrapper", "Sum"}
    checked = 0
    for name in dir(keras.metrics):
        kind = getattr(keras.metrics, name)
        if not isinstance(kind, type) or name in base:
            continue
        metric = kind(**arguments.get(name, {}))
        known = {"up": "max", "down": "min"}.get(getattr(metric, "_direction", None))
        for form in (metric.name, f"val_{metric.name}", f"{metric.name}_3"):
            ours = direction(form)
            assert ours is not None, form
            assert known in (None, ours), form
        checked += 1
    assert checked > 35


def test_verbose_messages_are_those_of_keras(tmp_path, capsys):
    """With verbose=1, the same lines, but for the paths."""
    import flaxckpt

    values = [0.5, 0.5, 0.25]
    callback = keras.callbacks.ModelCheckpoint(
        f"{tmp_path}/keras-{{epoch}}.keras", save_best_only=True, verbose=1
    )
    callback.set_model(RecordingModel())
    for epoch, value in enumerate(values):
        callback.on_epoch_end(epoch, {"val_loss": value})
    theirs = capsys.readouterr().out.split("\n")
    ours = f"{tmp_path}/ours-{{epoch}}"
    with flaxckpt.ModelCheckpoint(ours, save_best_only=True, verbose=1) as ckpt:
        state = ckpt.init()
        for epoch, value in enumerate(values):
            logs = {"val_loss": value}
            state = ckpt.update(state, {"w": np.zeros(2)}, logs, epoch)
            ckpt.wait()
    mine = capsys.readouterr().out.replace("ours-", "keras-").split("\n")
    assert [line for line in mine if line] == [
        line.removesuffix(".keras") for line in theirs if line
    ]
