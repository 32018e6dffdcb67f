"""The callback for Keras, in the scenarios of Keras's own callbacks and in others.

Where the callback differs from Keras's on purpose, the test says so.
"""

import importlib
import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import flaxckpt
from flaxckpt import SettingError
from flaxckpt.integrations import keras as integration
from flaxckpt.integrations.keras import ModelCheckpoint, load_into

PARTS = (
    "trainable_variables",
    "non_trainable_variables",
    "optimizer_variables",
    "metrics_variables",
)
rng = np.random.default_rng(0)
X = rng.normal(size=(30, 3)).astype("float32")
Y = keras.utils.to_categorical(rng.integers(0, 3, 30), num_classes=3)


class Counter(keras.layers.Layer):
    """Counts its calls in training in a variable that is not trained."""

    def __init__(self):
        super().__init__()
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x, training=False):
        if training:
            self.calls.assign_add(1.0)
        return x


def make_model(hidden=5, at_once=1, compiled=True):
    layers = [
        keras.layers.Dense(hidden, activation="relu"),
        Counter(),
        keras.layers.Dropout(0.3),
        keras.layers.Dense(3, activation="softmax"),
    ]
    model = keras.Sequential([keras.Input((3,)), *layers])
    if compiled:
        model.compile(
            keras.optimizers.SGD(0.1, momentum=0.9),
            "categorical_crossentropy",
            metrics=[keras.metrics.CategoricalAccuracy("acc")],
            steps_per_execution=at_once,
        )
    return model


class Reused:
    """A model that is compiled once, and made as new before each run."""

    def __init__(self, at_once):
        self.model = make_model(at_once=at_once)
        self.model.fit(X, Y, batch_size=5, verbose=0)
        self.model.layers[1].calls.assign(0.0)
        self.fresh = state_of(self.model)

    def anew(self, scale=1):
        for part, values in self.fresh.items():
            for variable, value in zip(
                variables(self.model, part), values, strict=True
            ):
                variable.assign(value * np.asarray(scale, value.dtype))
        return self.model


@pytest.fixture(scope="module")
def singles():
    return Reused(1)


@pytest.fixture(scope="module")
def pairs():
    return Reused(2)


@pytest.fixture
def model(singles):
    keras.utils.set_random_seed(7)
    return singles.anew()


def variables(model, part):
    holder, name = model, part
    if part == "optimizer_variables":
        holder, name = model.optimizer, "variables"
    return getattr(holder, name)


def state_of(model):
    """Copy the values of all variables."""
    return {
        part: [np.array(variable.value) for variable in variables(model, part)]
        for part in PARTS
    }


def same(one, other, parts=PARTS):
    return all(
        len(one[part]) == len(other[part])
        and all(map(np.array_equal, one[part], other[part]))
        for part in parts
    )


def fit(model, *callbacks, epochs=4, shuffle=False, batches=6, **options):
    return model.fit(
        X[: 5 * batches],
        Y[: 5 * batches],
        batch_size=5,
        epochs=epochs,
        shuffle=shuffle,
        callbacks=list(callbacks),
        verbose=0,
        **options,
    )


class Interrupted(Exception):
    pass


class Interrupt(keras.callbacks.Callback):
    """Acts, or else raises, after a batch of an epoch, or at the epoch's end."""

    def __init__(self, epoch, batch=None, act=None):
        super().__init__()
        self.at, self.act = (epoch, batch), act

    def strike(self, *at):
        if at == self.at:
            if self.act is None:
                raise Interrupted
            self.act()

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        self.strike(self.epoch, batch)

    def on_epoch_end(self, epoch, logs=None):
        self.strike(epoch, None)


def calls_of(model):
    return int(model.layers[1].calls.value)


def names(directory):
    return sorted(path.name for path in directory.iterdir() if path.name[0] != ".")


# ---- the scenarios of Keras's tests of ModelCheckpoint -------------------------------


@pytest.mark.parametrize(
    ("monitor", "best_only", "mode"),
    [
        ("val_loss", False, "auto"),
        ("val_loss", False, "min"),
        ("val_acc", False, "max"),
        ("val_acc", True, "max"),
    ],
)
def test_an_epoch_is_saved(tmp_path, model, monitor, best_only, mode):
    saver = ModelCheckpoint(
        tmp_path / "below" / "checkpoint", monitor, save_best_only=best_only, mode=mode
    )
    history = fit(model, saver, epochs=1, validation_data=(X, Y))
    (info,) = saver.checkpoints
    assert info.path == tmp_path / "below" / "checkpoint"
    assert info.logs[monitor] == pytest.approx(history.history[monitor][0])
    assert saver.latest.path == saver.best.path == info.path


def test_a_missing_metric_warns_and_saves_nothing(tmp_path, model):
    """Keras's callback warns and saves."""
    saver = ModelCheckpoint(
        tmp_path / "best", "unknown", save_best_only=True, mode="min"
    )
    with pytest.warns(UserWarning, match="unknown"):
        fit(model, saver, epochs=1)
    assert saver.checkpoints == ()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"save_freq": "batch"}, "save_freq='batch' cannot work"),
        ({"save_freq": 0.15}, "save_freq=0.15 cannot work"),
        ({"mode": "unknown"}, "mode='unknown' cannot work"),
        ({"filepath": ""}, "non-empty path"),
        ({"filepath": None}, "pass the path to save at"),
        (
            {"resume": True, "save_weights_only": True, "save_last": False},
            "save_last=False cannot work: weights alone are not enough",
        ),
    ],
)
def test_settings_that_cannot_work(tmp_path, arguments, error):
    with pytest.raises(ValueError, match=error):
        ModelCheckpoint(**{"filepath": tmp_path / "x", **arguments})


def test_an_unknown_argument(tmp_path):
    with pytest.raises(TypeError, match="Did you mean 'preserve'"):
        ModelCheckpoint(tmp_path / "x", save_top_k=3)


@pytest.mark.parametrize("weights_only", [False, True])
def test_every_so_many_batches(tmp_path, model, weights_only):
    saver = ModelCheckpoint(
        tmp_path / "{epoch:02d}", save_freq=18, save_weights_only=weights_only
    )
    fit(model, saver, epochs=10, validation_data=(X, Y))
    assert names(tmp_path) == ["03", "06", "09"]
    assert [info.weights_only for info in saver.checkpoints] == [weights_only] * 3


@pytest.mark.parametrize("weights_only", [False, True])
def test_batches_in_the_filepath(tmp_path, model, weights_only):
    saver = ModelCheckpoint(
        tmp_path / "{epoch:02d}-{batch:02d}",
        save_freq=3,
        save_weights_only=weights_only,
    )
    fit(model, saver, epochs=3)
    assert names(tmp_path) == ["01-03", "01-06", "02-03", "02-06", "03-03", "03-06"]


@pytest.mark.parametrize(
    ("monitor", "mode", "threshold", "is_saved"),
    [
        ("val_acc", "max", -0.01, True),
        ("val_loss", "auto", None, True),
        ("val_loss", "min", 0, False),
        ("val_loss", "auto", 0, False),
        ("val_acc", "auto", 1, False),
    ],
)
def test_a_threshold(tmp_path, model, monitor, mode, threshold, is_saved):
    saver = ModelCheckpoint(
        tmp_path / "best",
        monitor,
        save_best_only=True,
        mode=mode,
        initial_value_threshold=threshold,
    )
    fit(model, saver, epochs=1, validation_data=(X, Y))
    assert bool(saver.checkpoints) == is_saved


def test_loading_the_whole_and_the_weights(tmp_path, model):
    saver = ModelCheckpoint(tmp_path / "best", save_best_only=True)
    fit(model, saver, epochs=1, validation_data=(X, Y))
    want = model.predict(X, verbose=0)
    whole, weights, plain = make_model(), make_model(), make_model(compiled=False)
    load_into(whole, saver.best.path)
    assert same(state_of(whole), state_of(model), PARTS[:3])
    load_into(weights, saver.best.path, weights_only=True)
    assert same(state_of(weights), state_of(model), PARTS[:2])
    assert int(weights.optimizer.iterations) == 0
    load_into(plain, saver.best.path, weights_only=True)
    assert np.array_equal(plain.predict(X, verbose=0), want)
    tree = flaxckpt.load_weights(saver.best.path)
    assert sorted(tree) == sorted(PARTS[:2])
    found, _ = model.stateless_call(*(tree[part] for part in PARTS[:2]), X)
    assert np.allclose(found, want, rtol=1e-6)


def test_the_best_is_remembered_by_the_next_fit(tmp_path, model, singles):
    saver = ModelCheckpoint(tmp_path / "{epoch}", "loss", save_best_only=True)
    fit(model, saver, epochs=3)
    before = saver.checkpoints
    fit(singles.anew(), saver, epochs=1)  # no better than the third epoch
    assert saver.checkpoints == before


# ---- the scenarios of Keras's tests of OrbaxCheckpoint -------------------------------


@pytest.mark.parametrize(("mode", "choose"), [("min", min), ("max", max)])
def test_the_best_alone(tmp_path, model, mode, choose):
    saver = ModelCheckpoint(tmp_path / "best", "loss", save_best_only=True, mode=mode)
    losses = fit(model, saver, epochs=5).history["loss"]
    assert saver.best.logs["loss"] == pytest.approx(choose(losses))
    assert len(saver.checkpoints) == 1


def test_max_to_keep(tmp_path, model):
    saver = ModelCheckpoint(tmp_path / "{epoch}", "loss", max_to_keep=2)
    losses = fit(model, saver, epochs=5).history["loss"]
    kept = {"4", "5", str(1 + int(np.argmin(losses)))}
    assert set(names(tmp_path)) == kept


def test_weights_alone_need_to_be_asked_for(tmp_path, model):
    saver = ModelCheckpoint(tmp_path / "{epoch}", save_weights_only=True)
    fit(model, saver, epochs=1)
    other = make_model()
    before = state_of(other)
    with pytest.raises(flaxckpt.CheckpointMismatchError, match="weights_only=True"):
        load_into(other, saver.latest.path)
    assert same(state_of(other), before, PARTS[:2])
    load_into(other, saver.latest.path, weights_only=True)
    assert same(state_of(other), state_of(model), PARTS[:2])


def test_another_model_is_refused_before_anything_changes(tmp_path, model):
    saver = ModelCheckpoint(tmp_path / "{epoch}")
    fit(model, saver, epochs=1)
    other = make_model(hidden=6)
    fit(other, epochs=1)
    before = state_of(other)
    wanted = r"trainable_variables/0 \(.*/kernel\): checkpoint has float32\[3,5\]"
    with pytest.raises(flaxckpt.CheckpointMismatchError, match=wanted):
        load_into(other, saver.latest.path)
    with pytest.raises(flaxckpt.CheckpointMismatchError, match=wanted):
        fit(other, ModelCheckpoint(tmp_path / "{epoch}", resume=True))
    assert same(state_of(other), before, PARTS[:3])
    with pytest.raises(flaxckpt.SettingError, match=r"call model\.build"):
        load_into(keras.Sequential([keras.layers.Dense(3)]), saver.latest.path)


def test_a_sharded_model_is_loaded_in_another_layout(tmp_path):
    mesh = keras.distribution.DeviceMesh((8,), axis_names=["data"])

    def sharded(*sharded_names):
        layouts = keras.distribution.LayoutMap(mesh)
        for name in sharded_names:
            layouts[f".*{name}/kernel"] = keras.distribution.TensorLayout(
                (None, "data")
            )
        keras.distribution.set_distribution(
            keras.distribution.ModelParallel(layout_map=layouts)
        )
        made = keras.Sequential(
            [
                keras.Input((3,)),
                keras.layers.Dense(16, name="one"),
                keras.layers.Dense(8, name="two"),
            ]
        )
        made.compile("adam", "mse")
        return made

    x, y = np.ones((16, 3), "float32"), np.ones((16, 8), "float32")
    try:
        model = sharded("one", "two")
        saver = ModelCheckpoint(tmp_path / "{epoch}")
        model.fit(x, y, epochs=2, callbacks=[saver], verbose=0)
        assert not model.layers[0].kernel.value.sharding.is_fully_replicated
        other = sharded("two")
        load_into(other, saver.latest.path)
        assert same(state_of(other), state_of(model), PARTS[:3])
        assert other.layers[0].kernel.value.sharding.is_fully_replicated
        assert not other.layers[1].kernel.value.sharding.is_fully_replicated
    finally:
        keras.distribution.set_distribution(None)


# ---- the scenarios of Keras's tests of BackupAndRestore ------------------------------


def test_no_batch_is_trained_on_twice(tmp_path, model):
    """Keras's callback begins the epoch again, and trains twice on its first batches."""
    with pytest.raises(Interrupted):
        saver = ModelCheckpoint(tmp_path / "{epoch}-{batch}", save_freq=1, resume=True)
        fit(model, saver, Interrupt(0, 1))
    assert calls_of(model) == 2
    assert fit(model, saver, epochs=5).epoch == [0, 1, 2, 3, 4]
    assert calls_of(model) == 5 * 6


def test_the_next_epoch_is_gone_on_with(tmp_path, model):
    saver = ModelCheckpoint(tmp_path / "{epoch}", resume=True)
    with pytest.raises(Interrupted):
        fit(model, saver, Interrupt(1))
    assert fit(model, saver, epochs=5).epoch == [2, 3, 4]
    assert calls_of(model) == 5 * 6


def test_a_damaged_checkpoint_is_passed_over(tmp_path, model):
    saver = ModelCheckpoint(tmp_path / "{epoch}", resume=True)
    with pytest.raises(Interrupted):
        fit(model, saver, Interrupt(1))
    saver.ckpt.close()
    for path in (tmp_path / "2").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(b"0")
    with pytest.warns(UserWarning, match="PASSED OVER"):
        history = fit(
            model, ModelCheckpoint(tmp_path / "{epoch}", resume=True), epochs=5
        )
    assert history.epoch == [1, 2, 3, 4]
    assert calls_of(model) == 5 * 6


def test_a_finished_run_trains_no_more(tmp_path, model, singles):
    """Keras's callback deletes its backup at the end, and would train again."""
    fit(model, ModelCheckpoint(tmp_path / "{epoch}", resume=True), epochs=2)
    end = state_of(model)
    model = singles.anew(scale=0)
    saver = ModelCheckpoint(tmp_path / "{epoch}", resume=True)
    assert fit(model, saver, epochs=2).epoch == []
    assert same(state_of(model), end, PARTS[:3])
    assert fit(model, saver, epochs=3).epoch == [2]


def test_the_epoch_does_not_stay_in_the_model(tmp_path, model):
    """After a run that resumed, Keras's model begins each further fit there."""
    saver = ModelCheckpoint(tmp_path / "{epoch}", resume=True)
    fit(model, saver, epochs=2)
    fit(model, saver, epochs=3)
    assert fit(model, epochs=1).epoch == [0]
    fit(model, saver, epochs=3)  # nothing is left to do
    assert fit(model, epochs=1).epoch == [0]
    with pytest.raises(Interrupted):
        fit(model, saver, Interrupt(3))
    assert fit(model, epochs=1).epoch == [0]


# ---- bit for bit ---------------------------------------------------------------------


def resumed(reused, directory, name, interrupt, *, shuffle, run=fit, **settings):
    """Run whole, and run interrupted and resumed; return both ends and histories."""
    ends, histories = [], []
    keras.utils.set_random_seed(3)
    histories.append(run(reused.anew(), shuffle=shuffle).history)
    ends.append(state_of(reused.model))
    keras.utils.set_random_seed(3)
    saver = ModelCheckpoint(directory / name, resume=True, **settings)
    with pytest.raises((Interrupted, flaxckpt.Preempted)):
        run(reused.anew(), saver, interrupt, shuffle=shuffle)
    saver.ckpt.close()
    keras.utils.set_random_seed(4)  # none of it is left
    saver = ModelCheckpoint(directory / name, resume=True, **settings)
    found = saver.latest
    histories.append(run(reused.anew(scale=0), saver, shuffle=shuffle).history)
    ends.append(state_of(reused.model))
    return found, ends, histories


@pytest.mark.parametrize("shuffle", [False, True, "batch"])
@pytest.mark.parametrize(
    ("freq", "at", "trained"),
    [
        ("epoch", (1, None), 2),
        (4, (2, 3), 2),
        (3, (1, 5), 3),  # after the last batch of an epoch
    ],
)
def test_fit_goes_on_bit_for_bit(tmp_path, singles, shuffle, freq, at, trained):
    name = "{epoch}" if freq == "epoch" else "{epoch}-{batch}"
    strike = Interrupt(2, 0 if at[0] == 1 else 4)
    found, ends, (whole, rest) = resumed(
        singles, tmp_path, name, strike, shuffle=shuffle, save_freq=freq
    )
    assert (found.epoch, found.batch) == at
    assert same(*ends)
    for key in whole:  # of the epoch in the midst of which it was saved, too
        assert rest[key] == whole[key][-trained:]


@pytest.mark.parametrize(("freq", "at"), [("epoch", (1, None)), (3, (2, 3))])
def test_several_batches_in_one_execution(tmp_path, pairs, freq, at):
    name = "{epoch}" if freq == "epoch" else "{epoch}-{batch}"
    found, ends, _ = resumed(
        pairs, tmp_path, name, Interrupt(2, 3), shuffle=True, save_freq=freq
    )
    assert (found.epoch, found.batch) == at
    assert same(*ends)


@pytest.mark.parametrize("freq", ["epoch", 4])
def test_beside_a_callback_that_draws_numbers(tmp_path, singles, freq):
    class Draw(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            np.random.random()

    def run(model, *callbacks, shuffle):
        return fit(model, Draw(), *callbacks, shuffle=shuffle)

    _, ends, _ = resumed(
        singles,
        tmp_path,
        "{epoch}",
        Interrupt(2, 4),
        shuffle=True,
        save_freq=freq,
        run=run,
    )
    assert same(*ends)


def test_a_resumed_run_saves_at_the_same_batches(tmp_path, singles):
    def saver(name):
        return ModelCheckpoint(
            tmp_path / name / "{epoch}-{batch}", save_freq=5, resume=True
        )

    fit(singles.anew(), saver("whole"))
    first = saver("parts")
    with pytest.raises(Interrupted):
        fit(singles.anew(), first, Interrupt(2, 4))
    first.ckpt.close()
    assert fit(singles.anew(), saver("parts")).epoch == [2, 3]
    whole, parts = (flaxckpt.list_checkpoints(tmp_path / x) for x in ("whole", "parts"))
    assert [info.path.name for info in whole] == [info.path.name for info in parts]
    assert len(whole) == 4
    for one, other in zip(whole, parts, strict=True):
        assert one.logs == other.logs
        assert same(flaxckpt.load(one), flaxckpt.load(other))


def test_an_execution_that_was_seen_in_part(tmp_path, singles, pairs):
    """One batch was seen alone; then two are trained on at once, to the fifth."""
    saver = ModelCheckpoint(tmp_path / "{epoch}-{batch}", save_freq=1, resume=True)
    keras.utils.set_random_seed(3)
    with pytest.raises(Interrupted):
        fit(singles.anew(), saver, Interrupt(0, 0), batches=5)
    saver.ckpt.close()
    saver = ModelCheckpoint(tmp_path / "{epoch}-{batch}", save_freq=1, resume=True)
    fit(pairs.anew(scale=0), saver, epochs=2, batches=5)
    fit(singles.anew(), epochs=2, batches=5)
    assert same(state_of(pairs.model), state_of(singles.model))


def test_batches_that_are_fetched_one_ahead(tmp_path, singles, monkeypatch):
    """As Keras does where the device is no CPU."""
    from keras.src.backend.jax.trainer import JAXEpochIterator

    def one_ahead(self):
        return self._one_batch_ahead_iterator(self.data_adapter.get_jax_iterator())

    monkeypatch.setattr(JAXEpochIterator, "_get_iterator", one_ahead)
    found, ends, _ = resumed(
        singles,
        tmp_path,
        "{epoch}-{batch}",
        Interrupt(2, 4),
        shuffle="batch",
        save_freq=4,
    )
    assert (found.epoch, found.batch) == (2, 3)
    assert same(*ends)


def test_a_dataset_of_keras_in_the_order_of_pythons_generator(tmp_path, singles):
    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 6

        def __getitem__(self, index):
            return X[5 * index : 5 * index + 5], Y[5 * index : 5 * index + 5]

    def run(model, *callbacks, shuffle):
        return model.fit(
            Batches(), epochs=4, shuffle=shuffle, callbacks=list(callbacks), verbose=0
        )

    found, ends, _ = resumed(
        singles,
        tmp_path,
        "{epoch}-{batch}",
        Interrupt(2, 4),
        shuffle=True,
        save_freq=4,
        run=run,
    )
    assert (found.epoch, found.batch) == (2, 3)
    assert same(*ends)


def test_a_generator_that_begins_where_the_epoch_does(tmp_path, singles):
    """As docs/families/keras.md says: the callback passes over batches of one epoch alone."""

    def batches(first):
        for index in itertools.count(first):
            rows = np.random.default_rng(index).permutation(30)[:5]
            yield X[rows], Y[rows]

    def run(model, *callbacks, shuffle):
        last = callbacks[0].latest if callbacks else None
        epoch = 0 if last is None else last.epoch + (last.batch is None)
        return model.fit(
            batches(epoch * 6),
            steps_per_epoch=6,
            epochs=4,
            shuffle=shuffle,
            callbacks=list(callbacks),
            verbose=0,
        )

    for freq, name in (("epoch", "a/{epoch}"), (4, "b/{epoch}-{batch}")):
        _, ends, _ = resumed(
            singles,
            tmp_path,
            name,
            Interrupt(2, 4),
            shuffle=False,
            save_freq=freq,
            run=run,
        )
        assert same(*ends)


def test_a_run_that_was_told_to_end(tmp_path, singles):
    def end():
        os.kill(os.getpid(), signal.SIGTERM)

    found, ends, _ = resumed(
        singles,
        tmp_path,
        "best",
        Interrupt(2, 3, end),
        shuffle=True,
        monitor="loss",
        save_best_only=True,
        save_on_preemption=True,
    )
    assert found.epoch == 2
    assert found.batch in (3, 4)
    assert same(*ends)


def test_after_a_signal_the_same_process_can_go_on(tmp_path, model):
    """As in a notebook: nobody has the callback any more, and it listens no longer."""
    before = signal.getsignal(signal.SIGTERM)
    told = Interrupt(1, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    for callbacks in ([told], []):
        saver = ModelCheckpoint(
            tmp_path / "{epoch}", save_on_preemption=True, resume=True
        )
        if callbacks:
            with pytest.raises(flaxckpt.Preempted):
                fit(model, saver, *callbacks)
        else:
            fit(model, saver)
        assert signal.getsignal(signal.SIGTERM) is before
    assert saver.latest.epoch == 3


@pytest.mark.parametrize("kind", ["save_best_only", "save_weights_only"])
def test_what_cannot_be_resumed_has_the_last_state_beside_it(tmp_path, singles, kind):
    found, ends, _ = resumed(
        singles,
        tmp_path,
        "{epoch}",
        Interrupt(2, 0),
        shuffle=True,
        monitor="acc",
        initial_value_threshold=2,  # no epoch is better
        **{kind: True},
    )
    assert found.path == tmp_path / "last"
    assert same(*ends)


def test_a_model_that_fit_builds(tmp_path):
    def run(*callbacks):
        model = keras.Sequential([keras.layers.Dense(4), keras.layers.Dense(3)])
        model.compile("sgd", "mse")
        fit(model, *callbacks, epochs=3)
        return state_of(model)

    saver = ModelCheckpoint(tmp_path / "{epoch}", resume=True)
    keras.utils.set_random_seed(3)
    with pytest.raises(Interrupted):
        run(saver, Interrupt(1))
    saver.ckpt.close()
    keras.utils.set_random_seed(3)
    whole = run()
    assert same(run(ModelCheckpoint(tmp_path / "{epoch}", resume=True)), whole)


PROGRAM = """
import os, signal, sys
import absl.logging
absl.logging.set_verbosity("fatal")
import keras, numpy as np
from flaxckpt.integrations.keras import ModelCheckpoint

directory, seed, *kill_at = sys.argv[1], *map(int, sys.argv[2:])
keras.utils.set_random_seed(seed)
rng = np.random.default_rng(1)
x = rng.normal(size=(48, 4)).astype("float32")
y = np.sin(x.sum(axis=1, keepdims=True))
model = keras.Sequential([
    keras.Input((4,)),
    keras.layers.Dense(16, activation="relu"),
    keras.layers.BatchNormalization(),
    keras.layers.Dropout(0.3),
    keras.layers.Dense(1),
])
model.compile("adam", "mse", metrics=["mae"])
saver = ModelCheckpoint(
    directory + "/{epoch}-{batch}", "loss", save_freq=5, max_to_keep=2, resume=True
)


class Kill(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch
        saver.ckpt.wait()  # or a kill would lose all of this short run

    def on_train_batch_end(self, batch, logs=None):
        if [self.epoch, batch] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


history = model.fit(
    x, y, batch_size=6, epochs=5, verbose=0, validation_data=(x[:8], y[:8]),
    callbacks=[saver, Kill()] if directory else [],
)
for part in model.variables, model.optimizer.variables, model.metrics_variables:
    for variable in part:
        print(variable.path, np.asarray(variable.value).tobytes().hex())
print(history.history["loss"][-1], history.history["val_loss"][-1], np.random.random())
"""


def start(directory, *numbers):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(directory), *map(str, numbers)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "XLA_FLAGS": "", "KERAS_BACKEND": "jax"},
    )


def test_a_run_that_is_killed_goes_on_bit_for_bit(tmp_path):
    """Adam, dropout, batch normalization, a shuffled order; two kills in mid-epoch."""
    with start("", 0) as whole:
        for seed, epoch, batch in ((0, 1, 4), (1, 3, 6)):
            with start(tmp_path, seed, epoch, batch) as killed:
                assert not killed.communicate(timeout=120)[0]
            assert killed.returncode == -signal.SIGKILL
        assert flaxckpt.list_checkpoints(tmp_path)[-1].epoch >= 2
        with start(tmp_path, 2) as last:
            found, _ = last.communicate(timeout=120)
        assert last.returncode == 0
        assert found.splitlines() == whole.communicate(timeout=120)[0].splitlines()
        assert len(found.splitlines()) > 20


# ---- beside other callbacks ----------------------------------------------------------


def test_saves_are_of_the_moment(tmp_path, model):
    """`fit` donates the state to the next step while a save is under way."""
    saved = {}

    class Recorder(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.epoch = epoch

        def on_train_batch_end(self, batch, logs=None):
            saved[self.epoch, batch] = state_of(self.model)

    saver = ModelCheckpoint(tmp_path / "{epoch}-{batch}", save_freq=1)
    fit(model, saver, Recorder(), epochs=3)
    assert len(saver.checkpoints) == len(saved) == 18
    for info in saver.checkpoints:
        assert same(flaxckpt.load(info), saved[info.epoch, info.batch])


def test_fit_is_left_to_run_ahead(tmp_path, model):
    """Keras waits for each step's logs only for callbacks that want them."""
    by_epoch = ModelCheckpoint(tmp_path / "{epoch}")
    assert keras.callbacks.CallbackList([by_epoch])._async_train
    synced = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            synced.append(self._model._jax_state_synced)

    fit(model, ModelCheckpoint(tmp_path / "{epoch}-{batch}", save_freq=3), Look())
    assert not any(synced)  # a save writes nothing into the variables


def test_the_batches_that_were_seen_pass_before_the_others(tmp_path, singles):
    """They have the logs of the last of them."""
    seen = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append((batch, logs["loss"]))

    saver = ModelCheckpoint(tmp_path / "{epoch}-{batch}", save_freq=3, resume=True)
    with pytest.raises(Interrupted):
        fit(singles.anew(), saver, Interrupt(0, 3))
    saver.ckpt.wait()
    loss, own = saver.latest.logs["loss"], singles.model.train_function
    fit(singles.anew(), saver, Look(), epochs=1)
    assert singles.model.train_function is own
    assert [batch for batch, _ in seen] == [0, 1, 2, 3, 4, 5]
    assert [found for _, found in seen[:3]] == [pytest.approx(loss)] * 3
    assert seen[3][1] != seen[2][1]


def test_an_interrupt_while_batches_pass_leaves_the_model_as_it_was(tmp_path, singles):
    saver = ModelCheckpoint(tmp_path / "{epoch}-{batch}", save_freq=4, resume=True)
    with pytest.raises(Interrupted):
        fit(singles.anew(), saver, Interrupt(0, 4))
    own = singles.model.train_function
    with pytest.raises(Interrupted):
        fit(singles.anew(), saver, Interrupt(0, 1))
    fit(singles.anew(), epochs=1)
    assert calls_of(singles.model) == 6
    assert singles.model.train_function is own


def test_a_learning_rate_is_that_of_the_run(tmp_path, model, singles):
    """A callback in front of it sets the rate of the epoch that begins."""
    halve = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
    saver = ModelCheckpoint(tmp_path / "{epoch}", resume=True)
    with pytest.raises(Interrupted):
        fit(model, halve, saver, Interrupt(1))
    fit(singles.anew(), halve, saver)
    assert float(model.optimizer.learning_rate) == pytest.approx(0.1 / 2**4)


def test_the_documented_example_runs_and_runs_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs/families/keras.md").read_text()
    code = compile(
        re.search(r"^```python\n(.*?)^```", text, re.M | re.S)[1], "keras", "exec"
    )
    ends = []
    for epochs in (range(10), []):
        names = {}
        exec(code, names)
        assert names["model"].history.epoch == [*epochs]
        ends.append(names["best"].predict(names["x"], verbose=0))
        assert names["saver"].latest.epoch == 9
    assert np.array_equal(*ends)


# ---- where Keras is missing ----------------------------------------------------------


def test_a_model_where_a_tree_is_wanted_is_told_of_load_into(tmp_path, model):
    path = tmp_path / "checkpoint"
    flaxckpt.ModelCheckpoint(path).save({"w": np.ones(2)}, 0)
    for call in (
        lambda: flaxckpt.load(path, model),
        lambda: flaxckpt.load_weights(path, like=model),
        lambda: flaxckpt.load_weights(path, into=model),
        lambda: flaxckpt.ModelCheckpoint(path).restore(model),
    ):
        with pytest.raises(SettingError, match=r"keras\.load_into\(model, path\)"):
            call()


def test_the_backend_has_to_be_jax(tmp_path, monkeypatch, model):
    monkeypatch.setattr(keras.config, "backend", lambda: "torch")
    with pytest.raises(
        ImportError, match=r"backend is .torch.\. Set KERAS_BACKEND=jax"
    ):
        ModelCheckpoint(tmp_path / "x")
    with pytest.raises(ImportError, match="KERAS_BACKEND=jax"):
        load_into(model, tmp_path / "x")


@pytest.mark.parametrize(
    ("missing", "advice"),
    [("keras", "pip install '.[keras]'"), ("tensorflow", "KERAS_BACKEND=jax")],
)
def test_what_to_install_is_said(monkeypatch, missing, advice):
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "keras":
                raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.delitem(sys.modules, "keras")
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(ImportError) as raised:
        importlib.reload(integration)
    assert advice in str(raised.value)
