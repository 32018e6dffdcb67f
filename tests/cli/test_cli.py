"""The command `flaxckpt`."""

import os
import re
import signal
import subprocess
import sys

import pytest

import flaxckpt
from flaxckpt._cli import main as cli


def command(
    *arguments, code="from flaxckpt._cli.main import main; main_status = main()"
):
    program = f"{code}\nimport sys; sys.exit(main_status)"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "XLA_FLAGS": ""},
    )


def test_the_demo_is_killed_resumes_and_ends_where_it_would_have(tmp_path):
    result = command("demo", "--directory", tmp_path / "demo", "--epochs", 4)
    assert result.returncode == 0, result.stderr + result.stdout
    lines = [line.strip() for line in result.stdout.splitlines()]
    assert lines[-1] == (
        "Resumed run ended bit for bit where the uninterrupted one did: yes"
    )
    assert any(
        re.fullmatch(r"epoch  3: killed after batch \d+", line) for line in lines
    )
    assert any(line.startswith("restored 'last', saved after batch") for line in lines)
    assert any(re.fullmatch(r"\d+ leaves of state, 0 differ", line) for line in lines)
    kept = flaxckpt.list_checkpoints(tmp_path / "demo/resumed")
    assert 1 <= len([info for info in kept if info.path.name != "last"]) <= 4
    for info in kept:
        assert any(line.startswith(info.path.name) for line in lines)


SLOW_DISK = """
import sys, threading
from pathlib import Path
from flaxckpt._checkpoints import series_writer
from flaxckpt._cli import demo

write = series_writer.write_checkpoint

def write_late(checkpoint, *args, **kwargs):
    if checkpoint.info.path.name != "last":
        threading.Event().wait(3)
    return write(checkpoint, *args, **kwargs)

series_writer.write_checkpoint = write_late
demo.train(Path(sys.argv[1]), 2, (1, 10))
"""


def test_on_a_slow_disk_the_demo_is_killed_once_the_best_is_there(tmp_path):
    result = command(tmp_path, code=SLOW_DISK)
    assert result.returncode == -signal.SIGKILL, result.stderr
    names = [info.path.name for info in flaxckpt.list_checkpoints(tmp_path)]
    assert any(name.startswith("01-") for name in names)


def test_a_directory_that_holds_something(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--directory", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"flaxckpt demo: directory {str(tmp_path)!r} is not empty. Pass one that is, or "
        "that does not exist yet.\n"
    )


def test_a_missing_extra_is_named():
    block = (
        "import sys; sys.modules['sklearn.datasets'] = sys.modules['sklearn'] = None"
    )
    result = command(
        "demo",
        code=f"{block}\nfrom flaxckpt._cli.main import main\nmain_status = main()",
    )
    assert result.returncode == 2
    assert result.stderr == (
        "flaxckpt demo: needs sklearn, which is not installed. "
        "In a clone of flaxckpt: pip install '.[demo]'\n"
    )


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"flaxckpt {flaxckpt.__version__}\n"
