"""The README's Python runs, its commands are there, and its tables are true."""

import inspect
import re
from pathlib import Path

import jax

import flaxckpt

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_python_runs_as_one_program(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    with jax.numpy_dtype_promotion("standard"):  # Optax needs it
        for block in blocks("python"):
            exec(compile(block, "README.md", "exec"), names)
    (best,) = names["ckpt"].checkpoints
    assert best.logs["loss"] == min(names["losses"])
    # The loop again, in the same directory: it resumes.
    found = flaxckpt.list_checkpoints("runs")
    assert len(found) == 3
    last = found[-1]
    with jax.numpy_dtype_promotion("standard"):
        exec(compile(blocks("python")[0], "README.md", "exec"), names)
    assert names["start"] == last.epoch + 1


def test_two_commands():
    assert [block.strip() for block in blocks("bash")] == [
        'pip install ".[demo]" && flaxckpt demo',
        'pip install -e ".[test]" && pytest -n auto --dist loadfile -m "not slow"',
    ]


def test_table_of_arguments_is_complete():
    table = README[README.index("## Arguments") : README.index("## Coming from Keras")]
    named = re.findall(r"^\| `(\w+)(?:=([^`]*))?`", table, re.MULTILINE)
    parameters = list(inspect.signature(flaxckpt.ModelCheckpoint).parameters.values())
    described = [each for each in parameters if each.name not in ("weights", "unknown")]
    assert [name for name, _ in named] == [each.name for each in described]
    for (_, default), each in zip(named[1:], described[1:], strict=True):
        assert repr(each.default).replace("'", '"') == default


def test_length():
    assert len(README.splitlines()) <= 130
