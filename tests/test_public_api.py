"""The public names: they are what they say, and are all described."""

import doctest
import importlib
import inspect
import os
import pickle
from pathlib import Path

import pytest

import flaxckpt


def test_all_is_what_there_is():
    public = {
        name
        for name in dir(flaxckpt)
        if not name.startswith("_")
        and (name == "errors" or not inspect.ismodule(getattr(flaxckpt, name)))
    }
    assert sorted(public - {"TYPE_CHECKING"}) == flaxckpt.__all__
    assert flaxckpt.__all__ == sorted(flaxckpt.__all__)
    for name in flaxckpt.__all__:
        assert getattr(flaxckpt, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        flaxckpt.nothing  # noqa: B018


@pytest.mark.parametrize("name", flaxckpt.__all__)
def test_every_public_name_is_described(name):
    thing = getattr(flaxckpt, name)
    assert inspect.getdoc(thing)
    if inspect.isclass(thing):
        for member, value in vars(thing).items():
            if not member.startswith("_") and (
                callable(value) or isinstance(value, property)
            ):
                assert inspect.getdoc(value), f"{name}.{member}"


@pytest.mark.parametrize("name", ["ModelCheckpoint.update", "ModelCheckpoint.restore",
                                  "step", "load", "load_weights", "export",
                                  "list_checkpoints",
                                  "CheckpointState.create", "Snapshot.like",
                                  "Snapshot.take", "Snapshot.entries", "watch",
                                  "delete", "ModelCheckpoint.finish",
                                  "ModelCheckpoint.save_snapshot"])  # fmt: skip
def test_every_argument_and_error_is_described(name):
    thing = flaxckpt
    for part in name.split("."):
        thing = getattr(thing, part)
    text = inspect.getdoc(thing)
    for argument in inspect.signature(thing).parameters:
        if argument not in ("self", "cls"):
            assert f"    {argument}: " in text, f"{name} does not describe {argument}"
    returns_any = inspect.signature(thing).return_annotation is not None
    assert ("Returns:\n" in text) == returns_any
    assert "Raises:\n" in text


PACKAGE = Path(flaxckpt.__file__).parent
EXAMPLES = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>> " in path.read_text()
]


# What the examples of a module need, beside the `demo` extra.
NEED = {
    "flaxckpt.integrations.tensorboard": "tensorboardX",
    "flaxckpt.integrations.mlflow": "mlflow",
    "flaxckpt.integrations.wandb": "wandb",
}


@pytest.mark.parametrize("module", EXAMPLES)
def test_examples_in_docstrings_run(module, tmp_path, monkeypatch, offline):
    pytest.importorskip(NEED.get(module, "flaxckpt"))
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(module)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
    assert result.attempted


def test_public_things_say_so():
    """Tracebacks and pickles show the public name's package."""
    state = flaxckpt.CheckpointState.create()
    assert type(pickle.loads(pickle.dumps(state))) is flaxckpt.CheckpointState


def test_version_is_that_of_the_package():
    import importlib.metadata

    assert flaxckpt.__version__ == importlib.metadata.version("flaxckpt")
    assert os.path.exists(os.path.join(os.path.dirname(flaxckpt.__file__), "py.typed"))
