"""`ModelCheckpoint`, a callback for Keras's `model.fit` on JAX, and `load_into`.

A checkpoint holds the variables by their place in Keras's own lists, not by name, since
Keras numbers names by what was built before. Beside them, it holds the states of
Python's and numpy's random generators, from which Keras draws the order of the data.
"""

import contextlib
import itertools
import json
import os
import random
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np

import flaxckpt
from flaxckpt._runtime.extras import how_to_install
from flaxckpt.errors import CheckpointMismatchError, SettingError

try:
    import keras
except ImportError as error:
    advice = (
        how_to_install("keras")
        if error.name == "keras"
        else "Set KERAS_BACKEND=jax in the environment before Keras is imported."
    )
    raise ImportError(
        f"flaxckpt.integrations.keras cannot import Keras: {error}. {advice}"
    ) from error

__all__ = ["ModelCheckpoint", "load_into"]

_WEIGHTS = ("trainable_variables", "non_trainable_variables")
_OPTIMIZER, _METRICS, _RANDOM = "optimizer_variables", "metrics_variables", "random"
_Tree: TypeAlias = dict[str, Any]
# Keras's training function: from the state and an iterator to logs and the new state.
_TrainFunction: TypeAlias = Callable[[Any, Iterator[Any]], tuple[Any, Any]]


class ModelCheckpoint(keras.callbacks.Callback):
    """Save the whole state of `model.fit` through flaxckpt, and resume from it.

    The arguments are those of Keras's callback of the same name, and mean what they
    mean for `flaxckpt.ModelCheckpoint`: each checkpoint is a directory. With `resume`,
    the callback also does what Keras's `BackupAndRestore` does.

    A checkpoint holds the trainable and non-trainable variables (the states of seed
    generators included), the variables of the optimizer and of the metrics, and the
    states of Python's and numpy's global random generators. A save copies the arrays on
    their devices, and is written in the background. `fit` returns when all is on disk.

    Attributes:
        ckpt: The `flaxckpt.ModelCheckpoint` that saves.

    Example:
        >>> import keras, numpy as np
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        >>> model.compile("sgd", "mse")
        >>> saver = ModelCheckpoint("fits/{epoch}", "loss", max_to_keep=2, resume=True)
        >>> x, y = np.ones((8, 3), "float32"), np.ones((8, 1), "float32")
        >>> history = model.fit(x, y, epochs=3, verbose=0, callbacks=[saver])
        >>> [info.path.name for info in saver.checkpoints]
        ['2', '3']
        >>> load_into(model, saver.latest.path)
    """

    def __init__(
        self,
        filepath: str | os.PathLike[str],
        monitor: str = "val_loss",
        verbose: int = 0,
        save_best_only: bool = False,
        save_weights_only: bool = False,
        mode: str = "auto",
        save_freq: str | int = "epoch",
        initial_value_threshold: float | None = None,
        *,
        resume: bool = False,
        **options: Any,
    ) -> None:
        """Check the settings; write nothing.

        Args:
            filepath: As for `flaxckpt.ModelCheckpoint`, like the next seven.
            monitor: Key in the logs of the value to compare.
            verbose: 1 prints decisions and saves.
            save_best_only: Whether to save only what improves on the best.
            save_weights_only: Whether to save only the model's own variables.
            mode: `"min"`, `"max"` or `"auto"`.
            save_freq: `"epoch"`, or a number of batches.
            initial_value_threshold: The first best value.
            resume: Whether `fit` goes on from the newest checkpoint of the filepath.
                With `save_best_only` or `save_weights_only` this sets `save_last=True`.
            **options: Further arguments of `flaxckpt.ModelCheckpoint`, such as
                `max_to_keep`, `save_last` or `save_on_preemption`.

        Raises:
            CheckpointError: If a setting cannot work; see `flaxckpt.ModelCheckpoint`.
            ImportError: If Keras has another backend than JAX.
            TypeError: If an argument is unknown.
        """
        _need_jax()
        super().__init__()
        if resume and (save_best_only or save_weights_only):
            options.setdefault("save_last", True)
        if resume and save_weights_only and not options["save_last"]:
            advice = "weights alone are not enough to resume. Leave it out."
            raise SettingError("save_last", options["save_last"], advice)
        options.setdefault("weights", _weights_of)
        self.ckpt = flaxckpt.ModelCheckpoint(
            filepath,
            monitor,
            verbose,
            save_best_only,
            save_weights_only,
            mode,
            save_freq,
            initial_value_threshold,
            **options,
        )
        self._resumes = bool(resume)
        self._state: flaxckpt.CheckpointState | None = None
        self._start, self._restored = flaxckpt.Start(is_new=True), _Tree()
        self._epoch, self._random = 0, _Tree()
        by_clock = options.get("save_interval_secs") is not None
        if save_freq != "epoch" or by_clock or options.get("save_on_preemption"):
            # Only here: Keras waits for each batch's logs if any callback has this.
            self.on_train_batch_end = self._on_train_batch_end

    # ---- what `fit` calls ------------------------------------------------------------

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Restore the newest checkpoint if the run is to resume."""
        model: Any = self.model
        if not self._resumes:
            if self._state is None:
                self._state = self.ckpt.init(_values_of(model))
            return
        with _naming_variables(model):
            tree, self._state, self._start = self.ckpt.resume(
                {**_values_of(model), _RANDOM: _random_state()}
            )
        if not self._start.is_new:
            _assign(model, tree)
            _set_random_state(tree[_RANDOM])
            self._restored = {key: tree[key] for key in (_METRICS, _RANDOM)}
            model._initial_epoch = self._start.epoch  # `fit` reads it next

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Go on within the epoch if it was saved in the midst of it."""
        model: Any = self.model
        model._initial_epoch = None  # or the next `fit` would begin there, too
        seen = self._start.batch_in(epoch)
        if seen:
            _assign(model, self._restored)  # `fit` has reset the metrics
            _set_random_state(self._restored[_RANDOM])
            model.train_function = _passing_over(model, seen)
        self._epoch, self._random, self._restored = epoch, _random_state(), {}

    def _on_train_batch_end(
        self, batch: int, logs: Mapping[str, Any] | None = None
    ) -> None:
        """Save if a check is due; the batches that were passed over do not count."""
        if batch >= self._start.batch_in(self._epoch):
            self._update(self._random, logs, batch)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Save if a check is due."""
        self._update(_random_state(), logs)

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Wait until all is on disk."""
        model: Any = self.model
        model._initial_epoch = None
        self.ckpt.close()

    def _update(
        self, state: _Tree, logs: Mapping[str, Any] | None, batch: int | None = None
    ) -> None:
        tree = {**self._values(), _RANDOM: state}
        assert self._state is not None  # since `on_train_begin`
        try:
            self._state = self.ckpt.update(self._state, tree, logs, self._epoch, batch)
        except flaxckpt.Preempted:
            self.ckpt.close()  # `fit` ends without `on_train_end`
            raise

    def _values(self) -> _Tree:
        """Return the state that `fit` carries; within an epoch, no variable has it."""
        held: Any = self._model
        if not getattr(held, "_jax_state_synced", True):
            return {part: list(values) for part, values in held._jax_state.items()}
        model: Any = self.model  # which would write that state into the variables
        return _values_of(model)

    # ---- what there is ---------------------------------------------------------------

    @property
    def checkpoints(self) -> tuple[flaxckpt.CheckpointInfo, ...]:
        """The checkpoints of this filepath that are on disk, oldest first."""
        return self.ckpt.checkpoints

    @property
    def latest(self) -> flaxckpt.CheckpointInfo | None:
        """The newest checkpoint on disk, the slot of `save_last` included, or None."""
        return self.ckpt.latest

    @property
    def best(self) -> flaxckpt.CheckpointInfo | None:
        """The checkpoint on disk with the best monitored value, or None."""
        return self.ckpt.best


def load_into(
    model: keras.Model, path: str | os.PathLike[str], *, weights_only: bool = False
) -> None:
    """Load a checkpoint of the callback into a model, outside of `fit`.

    The values of the metrics are left out, since `fit` and `evaluate` reset them, and
    so are the states of Python's and numpy's random generators.

    Args:
        model: A built model, of the structure of the one that was saved.
        path: The checkpoint's directory or URL, or its `CheckpointInfo`.
        weights_only: Whether to load only the model's own variables, and not the
            optimizer's. A checkpoint of weights needs it, and so does a model that is
            not compiled.

    Raises:
        SettingError: If the model is not built.
        CheckpointMismatchError: If the number, a shape or a dtype of the variables
            differs; lists each. Nothing is changed then.
        CheckpointError: As `flaxckpt.load`.
        ImportError: If Keras has another backend than JAX.
    """
    _need_jax()
    if not model.built:
        advice = "build it first: call model.build(input_shape), or call it on a batch."
        raise SettingError("model", model, advice)
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and not optimizer.built:
        optimizer.build(model.trainable_variables)
    like = _values_of(model)
    parts = _WEIGHTS if weights_only else (*_WEIGHTS, _OPTIMIZER)
    with _naming_variables(model):
        if weights_only:
            tree = flaxckpt.load_weights(path, _weights_of(like))
        else:
            tree = flaxckpt.load(path, {**like, _METRICS: None, _RANDOM: None})
    _assign(model, {part: tree[part] for part in parts})


# ---- the state of a model ------------------------------------------------------------


def _need_jax() -> None:
    """Check Keras's backend.

    Raises:
        ImportError: If it is not JAX.
    """
    if (backend := keras.config.backend()) != "jax":
        raise ImportError(
            f"flaxckpt saves the state of Keras on JAX, and Keras's backend is "
            f"{backend!r}. Set KERAS_BACKEND=jax before Keras is imported."
        )


def _variables_of(model: keras.Model) -> dict[str, list[keras.Variable]]:
    """Return a model's variables, as `fit` on JAX orders them."""
    optimizer = getattr(model, "optimizer", None)
    return {
        "trainable_variables": model.trainable_variables,
        "non_trainable_variables": model.non_trainable_variables,
        _OPTIMIZER: [] if optimizer is None else optimizer.variables,
        _METRICS: model.metrics_variables,
    }


def _values_of(model: keras.Model) -> _Tree:
    """Return the values of a model's variables, which hold them outside of an epoch."""
    return {
        part: [variable.value for variable in variables]
        for part, variables in _variables_of(model).items()
    }


def _weights_of(tree: _Tree) -> _Tree:
    """Return the parts that `Model.stateless_call` takes."""
    return {part: tree[part] for part in _WEIGHTS}


def _assign(model: keras.Model, tree: _Tree) -> None:
    """Put values into a model's variables; a tree may lack parts."""
    for part, variables in _variables_of(model).items():
        for variable, value in zip(variables, tree.get(part, ()), strict=part in tree):
            variable.assign(value)


@contextlib.contextmanager
def _naming_variables(model: keras.Model) -> Generator[None]:
    """Have the error of a mismatch tell the paths of the variables, too.

    Raises:
        CheckpointMismatchError: If one is raised within the context.
    """
    try:
        yield
    except CheckpointMismatchError as error:
        names = {
            f"{part}/{index}": f"{part}/{index} ({variable.path})"
            for part, variables in _variables_of(model).items()
            for index, variable in enumerate(variables)
        }
        raise CheckpointMismatchError(
            error.path,
            [
                each._replace(path=names.get(each.path, each.path))
                for each in error.differences
            ],
            "Build and compile the model as the one that was saved, with the same "
            "layers trainable. load_into(model, path, weights_only=True) loads the "
            "model's own variables alone.",
        ) from error


# ---- the order of the data -----------------------------------------------------------


def _random_state() -> _Tree:
    """Return the states of the generators from which Keras draws orders of data."""
    return {
        "numpy": np.random.get_state(legacy=False),
        "python": json.dumps(random.getstate()),
    }


def _set_random_state(state: _Tree) -> None:
    """Set the states that `_random_state` returned."""
    np.random.set_state(state["numpy"])
    version, words, gauss = json.loads(state["python"])
    random.setstate((version, tuple(words), gauss))


def _passing_over(model: keras.Model, seen: int) -> _TrainFunction:
    """Return a training function that draws the first batches and does not train.

    The other callbacks see these batches pass, with the logs of the last of them. Once
    they have passed, or data of another epoch come, the model gets its own training
    function back.

    Args:
        model: The model.
        seen: How many batches to pass over.
    """
    train: Any = model.train_function
    at_once = model.steps_per_execution
    logs, left, known = model.get_metrics_result(), seen, None

    def pass_over(state: Any, batches: Iterator[Any]) -> tuple[Any, Any]:
        nonlocal left, known
        known = batches if known is None else known
        passed = min(left, at_once) if batches is known else 0
        left -= passed
        if not left or batches is not known:
            model.train_function = train
        for _ in itertools.islice(batches, passed):
            pass
        if passed == at_once:
            return logs, state
        logs_and_state: tuple[Any, Any] = train(
            state, itertools.islice(batches, at_once - passed)
        )
        return logs_and_state

    return pass_over
