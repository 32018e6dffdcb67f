"""Errors: their tree, their pickling, and what of Orbax's gets out."""

import copy
import importlib
import inspect
import pickle
import pkgutil

import numpy as np
import orbax.checkpoint as v0
import pytest
from orbax.checkpoint import v1 as ocp

import flaxckpt
from flaxckpt import errors
from flaxckpt._checkpoints import looks
from flaxckpt._processes import messages as _messages

EXAMPLES = [
    errors.CheckpointError("text"),
    errors.SettingError("mode", "x", "advice"),
    errors.TemplateError("{", "problem"),
    errors.MetricError("loss", "is wrong"),
    errors.CheckpointPathError("/p", "is wrong"),
    errors.UnsupportedLeafError((("a/b", "an object"),)),
    errors.CheckpointNotFoundError("/p", ("a",)),
    errors.CheckpointMismatchError("/p", [("a", "int", "str")], "advice"),
    errors.CheckpointCorruptError("/p", "problem"),
    errors.CheckpointWriteError("/p", "cause"),
    errors.HookError("/p", "cause", "function"),
    errors.CheckpointLockedError("/p", "host", 7),
    errors.Preempted("SIGTERM", "/p"),
]


def all_errors():
    return {
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, Exception)
    }


def is_ours(kind):
    return kind.__module__.startswith("flaxckpt.")


def below(kind):
    return {kind}.union(*map(below, kind.__subclasses__()))


class Told(dict):
    """The coordination service, as a process sees it that runs alone."""

    def key_value_set(self, key, text, again):
        self[key] = text

    def blocking_key_value_get(self, key, milliseconds):
        return self[key]


def test_an_error_of_another_class_reaches_others_as_the_nearest_here(monkeypatch):
    """`Round.hear` makes an error from what `Round.tell` has told of another one."""
    for module in pkgutil.walk_packages(flaxckpt.__path__, "flaxckpt."):
        if not module.name.startswith("flaxckpt._cli"):
            importlib.import_module(module.name)
    own = {
        each for each in below(errors.CheckpointError) if is_ours(each)
    } - all_errors()
    assert {"IncompleteError", "_NoHandlerError"} <= {kind.__name__ for kind in own}
    for kind in own:
        name = _messages._name_of(kind)
        assert getattr(errors, name) in all_errors()
        assert issubclass(kind, getattr(errors, name))
    told = Told()
    monkeypatch.setattr(_messages, "_client", lambda: told)
    exchange = _messages.Round("key", 1.0, "signs")
    error = looks.IncompleteError("/p", "cause")
    exchange.tell("save", error)
    with pytest.raises(errors.CheckpointWriteError) as raised:
        exchange.hear("save")
    assert str(raised.value) == str(error)


def test_every_error_is_a_checkpoint_error_and_has_an_example():
    assert all(issubclass(kind, errors.CheckpointError) for kind in all_errors())
    assert {type(example) for example in EXAMPLES} == all_errors()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda each: type(each).__name__)
def test_errors_cross_processes(example):
    for moved in (pickle.loads(pickle.dumps(example)), copy.copy(example)):
        assert type(moved) is type(example)
        assert str(moved) == str(example)
        assert vars(moved) == vars(example)


def test_the_tree_in_the_docstring_is_the_tree():
    picture = errors.__doc__
    for kind in all_errors():
        assert kind.__name__ in picture
        base = next(each for each in kind.__mro__ if not is_ours(each))
        if kind is not errors.CheckpointError:
            line = picture[picture.index(kind.__name__) :].split("──")[0]
            assert f"({base.__name__})" in line


def test_messages():
    assert str(EXAMPLES[5]).startswith(
        "1 leaf of the tree cannot be saved:\n  a/b: an "
    )
    assert str(EXAMPLES[6]) == (
        "No checkpoint at '/p' (checkpoints near it: a). "
        "flaxckpt.list_checkpoints(directory) lists those of flaxckpt."
    )
    assert "near it: none" in str(errors.CheckpointNotFoundError("/p"))
    assert str(EXAMPLES[8]) == (
        "Checkpoint '/p' is damaged: problem. Load another one; "
        "flaxckpt.list_checkpoints(directory) lists them."
    )
    assert str(EXAMPLES[9]) == (
        "Saving '/p' failed: cause. No earlier checkpoint was touched; this one does "
        "not exist. Training can go on and save again."
    )


@pytest.mark.parametrize(
    "raised",
    [ValueError, TypeError, KeyError, OSError, FileNotFoundError, AssertionError,
     NotImplementedError, RuntimeError, TimeoutError, ocp.errors.InvalidLayoutError,
     v0.errors.DeletionInProgressError if hasattr(v0, "errors") else ValueError],
)  # fmt: skip
def test_what_orbax_raises_while_loading_comes_out_as_ours(
    tmp_path, monkeypatch, raised
):
    """Whatever its kind: here the one place where Orbax is told to fail."""
    with flaxckpt.ModelCheckpoint(tmp_path / "{epoch}", compress=True) as ckpt:
        path = ckpt.save({"w": np.ones(9)}, epoch=0)  # Orbax reads what is compressed

    def fail(*args, **kwargs):
        raise raised("of Orbax")

    monkeypatch.setattr(ocp, "load", fail)
    monkeypatch.setattr(ocp, "metadata", fail)
    with pytest.raises(errors.CheckpointCorruptError, match="of Orbax") as caught:
        flaxckpt.load(path)
    assert isinstance(caught.value.__cause__, raised)
