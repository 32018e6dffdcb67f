"""The Python in docs/following.md runs, as one program."""

import logging
import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[2] / "docs/following.md").read_text()


def test_python_runs_as_one_program(tmp_path, monkeypatch, offline):
    for library in ("tensorboardX", "mlflow", "wandb"):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    names = {}
    try:
        for block in re.findall(
            r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE
        ):
            exec(compile(block, "following.md", "exec"), names)
    finally:
        logger = logging.getLogger("flaxckpt")
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
