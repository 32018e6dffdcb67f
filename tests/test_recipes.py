"""The recipes run, and the docs have their counts of lines.

A line of a recipe is for the checkpoints if it is a line of a statement, or of the
header of a block, that has a name of the library or a name that the recipe made for it.
NAMES lists them.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_examples import lines_for_flaxckpt

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "examples" / "recipes"
HERE = {"flaxckpt", "ckpt", "state", "start"}
ORBAX = {"ocp", "manager", "options", "policies"}
NAMES = {  # of each recipe, and of the same with a peer
    "fine_tune": (HERE | {"loaded"}, ORBAX | {"context", "wanted", "loaded"}),
    "evaluate_beside": (HERE, ORBAX | {"checkpointer"}),
    "keras_fit": (
        HERE | {"saver", "load_into", "path"},
        {"saver", "backup", "path"},
    ),
    "to_safetensors": (HERE, ORBAX | {"flatten_dict", "flat", "save_file"}),
    "early_stopping": (HERE, ORBAX | {"EarlyStopping", "stopping", "loss_in"}),
}
SHOWN = {  # in what a recipe, and the same with a peer, prints
    "fine_tune": (
        r"loss 2\.\d+, and 0\.\d+ after 50",
        r"loss 2\.\d+, and 0\.\d+ after",
    ),
    "evaluate_beside": (
        r"evaluated \d+ checkpoints; the last: 0\.0",
        r"evaluated \d+ checkpoints; the last: 0\.0",
    ),
    "keras_fit": ("without the stop: True", "without the stop: False"),
    "to_safetensors": ("same predictions: True", "same predictions: True"),
    "early_stopping": (
        r"after epoch (\d+), .* after epoch \1\b",
        r"after epoch (\d+), .* after epoch \1\b",
    ),
}


def peer_of(name):
    (peer,) = (RECIPES / "peers").glob(f"{name}_*.py")
    return peer


def run(script, directory):
    done = subprocess.run(
        [sys.executable, script, directory],
        text=True,
        capture_output=True,
        timeout=180,
        env={**os.environ, "XLA_FLAGS": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_shows_what_it_is_for(tmp_path, name):
    assert re.search(SHOWN[name][0], run(RECIPES / f"{name}.py", tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_peer_does_the_same_job(tmp_path, name):
    assert re.search(SHOWN[name][1], run(peer_of(name), tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_the_docs_have_the_counts_of_lines(name):
    scripts = RECIPES / f"{name}.py", peer_of(name)
    here, there = (
        lines_for_flaxckpt(script.read_text(), names)
        for script, names in zip(scripts, NAMES[name], strict=True)
    )
    table = (ROOT / "docs" / "recipes.md").read_text()
    row = rf"^\|.*/{name}\.py\) \| {here} \|.*/{scripts[1].name}\) \| {there} \|"
    assert re.search(row, table, re.M), (here, there)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_and_its_peer_differ_only_in_these_lines(name):
    """What both share is the same code, so that the counts compare the rest."""
    shared = [
        {ast.unparse(node) for node in ast.parse(script.read_text()).body}
        for script in (RECIPES / f"{name}.py", peer_of(name))
    ]
    common = shared[0] & shared[1]
    assert len(common) >= 5


def test_every_recipe_is_listed():
    assert {path.stem for path in RECIPES.glob("*.py")} == set(NAMES) == set(SHOWN)
