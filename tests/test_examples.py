"""The examples run, and run again where they left off."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def run(example, *arguments):
    result = subprocess.run(
        [sys.executable, example, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "XLA_FLAGS": ""},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_resumes(tmp_path, example):
    first = run(example, tmp_path)
    assert re.search(r"^epoch 1: (val_accuracy|episodic_return) \d", first, re.M)
    assert "resumed" not in first
    again = run(example, tmp_path)
    assert "resumed" in again
    assert "epoch 1:" not in again
    assert first.splitlines()[-1] == again.splitlines()[-1]


def test_there_are_examples():
    assert len(EXAMPLES) >= 3
    for example in EXAMPLES:
        assert len(example.read_text().splitlines()) <= 130, example.name
