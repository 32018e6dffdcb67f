"""The examples run, resume, and end after a SIGKILL where an unbroken run ends.

A line of an example is for flaxckpt if it is a line of a statement, or of the header of a
`with`, `for` or `def`, whose code has one of these names: `flaxckpt`, `ckpt`, and `state`
and `start`, which `ckpt.resume` returns. The import is one. Comments, docstrings and blank
lines are none.
"""

import ast
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import flaxckpt

ROOT = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(ROOT.glob("*.py"))
SHAPES = ["ppo", "transformer", "neural_ode", "nnx_vae"]  # of whole public programs
NAMES = {"flaxckpt", "ckpt", "state", "start"}
FIRST = r"\b(epoch 1|step 0): (val_accuracy|episodic_return|loss) \d"
PROGRESS = r"^.*\b(?:epoch|step) \d+: .*$"
# Kill each when a checkpoint of this name is there.
KILLS = [
    ("linen_train_state", "best"),
    ("neural_ode", "1/[0-9]*"),
    ("neural_ode", "2/[0-9]*"),
    ("nnx_vae", "[0-9]*"),
    ("ppo", "15"),
    ("transformer", "75"),
]


def start(example, directory, **pipes):
    return subprocess.Popen(
        [sys.executable, example, directory],
        text=True,
        env={**os.environ, "XLA_FLAGS": ""},
        **pipes,
    )


def run(example, directory):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start(example, directory, **pipes) as process:
        try:
            out, errors = process.communicate(timeout=180)
        except BaseException:
            process.kill()
            raise
    assert process.returncode == 0, errors
    assert "UserWarning" not in errors, errors
    return out


def run_until(example, directory, pattern):
    """Run an example, and kill it as soon as there is a checkpoint of some name."""
    deadline = time.monotonic() + 180
    with start(example, directory, stdout=subprocess.DEVNULL) as process:
        try:
            while not any(directory.glob(pattern)):
                assert process.poll() is None, (
                    "it ended before the checkpoint was there"
                )
                assert time.monotonic() < deadline
                time.sleep(0.005)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a function that runs an example once, without a break."""

    @functools.cache
    def run_once(example):
        directory = tmp_path_factory.mktemp(example.stem)
        return run(example, directory), directory

    return run_once


def checkpoints(directory):
    """Return the leaves of all checkpoints, as bytes, by path."""
    found = {}
    for record in directory.rglob("flaxckpt.json"):
        tree = flaxckpt.load(record.parent)
        leaves, treedef = jax.tree.flatten(tree)
        found[record.parent.relative_to(directory)] = treedef, [*map(as_bytes, leaves)]
    return found


def as_bytes(leaf):
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(
        leaf.dtype, jax.dtypes.prng_key
    ):
        leaf = jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array | np.ndarray):
        return leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()
    return repr(leaf)


def lines_for_flaxckpt(source, wanted=frozenset(NAMES)):
    counted = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt):
            parts = [
                each
                for each in ast.iter_child_nodes(node)
                if not isinstance(each, ast.stmt)
            ]
            named = [inner for part in parts for inner in ast.walk(part)]
            names = {
                getattr(each, name, None)
                for each in named
                for name in ("id", "arg", "name", "asname")  # of a Name, arg, alias
            }
            if names & wanted:
                ends = [getattr(each, "end_lineno", None) or 0 for each in named]
                is_simple = not hasattr(node, "body")
                end = node.end_lineno if is_simple else max(ends)
                counted.update(range(node.lineno, end + 1))
    return len(counted)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_resumes(tmp_path, example, whole):
    first, directory = whole(example)
    assert re.search(FIRST, first)
    assert "resumed" not in first
    shutil.copytree(directory, tmp_path / "again")
    again = run(example, tmp_path / "again")
    assert "resumed" in again
    assert not re.search(FIRST, again)
    assert first.splitlines()[-1] == again.splitlines()[-1]


@pytest.mark.parametrize(("name", "pattern"), KILLS)
def test_a_killed_example_ends_bit_for_bit_as_a_whole_one(
    tmp_path, name, pattern, whole
):
    example = ROOT / f"{name}.py"
    unbroken, directory = whole(example)
    run_until(example, tmp_path, pattern)
    resumed = run(example, tmp_path)
    assert "resumed" in resumed
    assert "digest: " in resumed.splitlines()[-1]
    assert resumed.splitlines()[-1] == unbroken.splitlines()[-1]
    steps = set(re.findall(PROGRESS, resumed, re.M))
    assert set() < steps < set(re.findall(PROGRESS, unbroken, re.M))
    assert checkpoints(tmp_path) == checkpoints(directory)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_has_few_lines_for_flaxckpt(example):
    source = example.read_text()
    assert len(source.splitlines()) <= 130
    count = lines_for_flaxckpt(source)
    if example.stem in SHAPES:
        assert count <= 8
    row = rf"^\| \[{example.name}\]\({example.name}\) \|.*\| {count} \|"
    assert re.search(row, (ROOT / "README.md").read_text(), re.M), count


def test_lines_for_flaxckpt_are_counted():
    source = '''
    """flaxckpt"""
    import flaxckpt  # 1
    import jax

    def main(train):
        with flaxckpt.ModelCheckpoint(  # 2
            "runs"  # 3
        ) as ckpt:  # 4
            train, state, start = ckpt.resume(train)  # 5

            for i in range(start, 9):  # 6
                # ckpt
                train = nnx.state(train)
                state = ckpt.update(state, train)  # 7
        print(f"{start}")  # 8
    '''
    assert lines_for_flaxckpt(re.sub("^    ", "", source, flags=re.M)) == 8


def test_there_are_examples():
    assert set(SHAPES) < {example.stem for example in EXAMPLES}
