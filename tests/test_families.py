"""Each family of JAX libraries, killed and resumed in a new process, bit for bit."""

import ast
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "families.py"
FAMILIES = [
    each.name
    for each in ast.parse(SCRIPT.read_text()).body
    if isinstance(each, ast.FunctionDef)
    and any(getattr(mark, "id", "") == "family" for mark in each.decorator_list)
]
SLOW = ["optax_s_optimizers"]  # which compiles some seventy of them


def run(*arguments, status=0):
    result = subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "XLA_FLAGS": ""},
    )
    assert result.returncode == status, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "names",
    [
        [name for name in FAMILIES if name not in SLOW],
        pytest.param(SLOW, marks=pytest.mark.slow),
    ],
    ids=["families", "optax"],
)
def test_a_killed_run_ends_as_one_that_was_not(tmp_path, names):
    whole = run(tmp_path / "whole", 7, *names)
    killed = run(tmp_path / "parts", 4, "--kill", *names, status=-signal.SIGKILL)
    resumed = run(tmp_path / "parts", 7, *names)
    assert list(whole) == names
    for name in names:
        (begun, end), (_, middle), (start, again) = (
            each[name] for each in (whole, killed, resumed)
        )
        assert (begun, start) == (0, 3), name  # the last save was after step 2
        assert again == end, name
        assert middle != end, name
