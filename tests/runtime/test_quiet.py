"""What reaches the console: nothing but what was asked for, and a failure once."""

import contextlib
import errno
import logging
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import warnings

import absl.logging
import jax.numpy as jnp
import numpy as np
import pytest

import flaxckpt
from flaxckpt import ModelCheckpoint
from flaxckpt._checkpoints import series_writer as _series_writer
from flaxckpt._checkpoints import write as _write
from flaxckpt._runtime import failures as _failures
from flaxckpt._runtime import quiet as _quiet

# Orbax leaves tasks of its own behind where it raises.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("none_left_behind"),
]


def run(code, *arguments):
    """Run a program in Python's default configuration; return what it has printed."""
    code = textwrap.dedent(code)
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    environment.pop("PYTHONWARNINGS", None)
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=180,
        env=environment,
    )


def test_nothing_is_said_and_no_setting_changed(tmp_path):
    result = run(
        """
        import logging, sys, warnings
        import absl.logging

        def settings():
            names = None, "absl", "asyncio", "jax"
            loggers = [logging.getLogger(name) for name in names]
            return (
                [(l.level, l.disabled, l.propagate, list(l.handlers), list(l.filters))
                 for l in loggers],
                logging.root.manager.disable,
                absl.logging.get_verbosity(),
                absl.logging.log,
                absl.logging.info,
            )

        before = settings()
        import jax, numpy as np, jax.numpy as jnp
        import flaxckpt
        from flaxckpt._checkpoints import write as _write
        filters = list(warnings.filters)
        directory = sys.argv[1]
        tree = {"w": jnp.ones(9), "n": 3, "s": "text", "key": jax.random.key(0)}
        for large in (2**20, 0):
            _write._LARGE_LEAF = large
            for settings_ in ({}, {"compress": True}):
                path = f"{directory}/{large}-{len(settings_)}-{{epoch}}"
                with flaxckpt.ModelCheckpoint(path, **settings_) as ckpt:
                    for epoch in range(2):
                        saved = ckpt.save(tree, epoch)
                        ckpt.wait()
                    ckpt.restore()
                    ckpt.restore(like=tree)
                    flaxckpt.load(saved)
                    flaxckpt.load_weights(saved)
                    flaxckpt.verify(saved)
        with flaxckpt.ModelCheckpoint(f"{directory}/text") as ckpt:
            ckpt.save({"a": "only text"}, 0)
        flaxckpt.load(f"{directory}/text")
        flaxckpt.list_checkpoints(directory)
        flaxckpt.load(sys.argv[2])
        flaxckpt.load(sys.argv[2], {"w": jnp.ones(9)})
        assert settings() == before, (settings(), before)
        assert list(warnings.filters) == filters
        """,
        tmp_path / "ours",
        plain(tmp_path / "plain"),
    )
    assert result.returncode == 0, result.stderr
    assert (result.stdout, result.stderr) == ("", "")


def plain(path):
    from orbax.checkpoint import v1 as ocp

    ocp.save(path, {"w": jnp.ones(9)})
    return path


@pytest.mark.parametrize("files", [True, False], ids=["files", "database"])
def test_plain_orbax_takes_ours_for_whole(tmp_path, monkeypatch, files):
    monkeypatch.setattr(_write, "_LARGE_LEAF", 0 if files else 2**40)
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        for epoch in range(2):
            ckpt.save({"w": jnp.ones(9), "h": np.ones(2)}, epoch)
            ckpt.wait()
        ckpt.save({"a": "only text"}, 2)
    for name in ("1", "2", "3"):
        result = run(
            """
            import sys
            from orbax.checkpoint import v1 as ocp
            ocp.load(sys.argv[1])
            """,
            tmp_path / name,
        )
        assert result.returncode == 0, result.stderr
        assert "data files not found" not in result.stderr


def test_only_orbax_s_lines_of_a_call_are_dropped():
    said = []
    of_orbax = {"__name__": "orbax.checkpoint.anything", "absl": absl}
    exec("def error(message): absl.logging.error(message)", of_orbax)
    error = of_orbax["error"]

    def of_user(message):
        absl.logging.error(message)

    class Handler(logging.Handler):
        def emit(self, record):
            said.append((record.getMessage(), record.filename))

    logger, handler = logging.getLogger("absl"), Handler()
    other, ready = threading.Event(), threading.Event()

    def work():
        ready.set()
        other.wait(60)
        error("Orbax's, from a user's thread")

    worker = threading.Thread(target=work)
    worker.start()
    ready.wait(60)
    verbosity = absl.logging.get_verbosity()
    logger.addHandler(handler)
    try:
        absl.logging.set_verbosity(absl.logging.WARNING)
        with _quiet.quiet():
            error("from the caller's")
            for log in (error, of_user):
                own = threading.Thread(target=log, args=["of a thread since"])
                own.start()
                own.join()
            with _quiet.quiet():
                pass
            error("from the caller's")
            absl.logging.error("a user's own line")
            other.set()
            worker.join()
        absl.logging.warning("after it")
        absl.logging.set_verbosity(absl.logging.INFO)
        with _quiet.quiet():
            absl.logging.info("asked for")
    finally:
        absl.logging.set_verbosity(verbosity)
        logger.removeHandler(handler)
    here = os.path.basename(__file__)
    assert said == [
        ("of a thread since", here),
        ("a user's own line", here),
        ("Orbax's, from a user's thread", "<string>"),
        ("after it", here),
        ("asked for", here),
    ]


def test_loads_on_several_threads_leave_the_warnings_filters(tmp_path):
    path = plain(tmp_path / "plain")
    before = list(warnings.filters)
    loads = [threading.Thread(target=flaxckpt.load, args=[path]) for _ in range(4)]
    for each in loads:
        each.start()
    for each in loads:
        each.join()
    assert list(warnings.filters) == before


# ---- a save that fails -------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(directory, size):
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    try:
        done = subprocess.run(mount, capture_output=True)
    except OSError:
        pytest.skip("no mount")
    if done.returncode:
        pytest.skip("needs the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


FULL_DISK = """
    import sys
    import jax.numpy as jnp
    import flaxckpt
    from flaxckpt._checkpoints import write as _write

    directory, large, way = sys.argv[1:]
    _write._LARGE_LEAF = int(large)
    ckpt = flaxckpt.ModelCheckpoint(directory + "/{epoch}")
    if way == "with":
        with ckpt:
            ckpt.save({"w": jnp.ones(2_000_000)}, 0)
    else:
        ckpt.save({"w": jnp.ones(2_000_000)}, 0)
    if way == "wait":
        ckpt.wait()
"""


@pytest.mark.parametrize(
    ("way", "large"), [("with", 2**40), ("wait", 0), ("neither", 2**40)]
)
def test_a_full_disk_is_said_once_with_what_was_needed(tmp_path, way, large):
    with small_disk(tmp_path / "disk", "4m"):
        result = run(FULL_DISK, tmp_path / "disk", large, way)
    assert result.returncode == (way != "neither")
    found = re.findall(
        r"Saving '\S+/disk/1' failed: No space left on device: it needs about 8.0 MB, "
        rf"and [34]\.\d MB are free on '{tmp_path}/disk'\.",
        result.stderr,
    )
    assert len(found) == 1, result.stderr
    assert "absl" not in result.stderr
    assert ("At the program's end" in result.stderr) == (way == "neither")
    assert "Warning" not in result.stderr or way == "neither"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "and 5.0 MB are free on '/d'",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "and the quota of this user on"),
        (ValueError("RESOURCE_EXHAUSTED: x: No space left on device [y]"), "5.0 MB"),
    ],
)
def test_space_that_was_needed(monkeypatch, error, said):
    fields = {"f_bavail": 5000, "f_frsize": 1000, "f_files": 9, "f_favail": 9}
    there = type("There", (), fields)()
    monkeypatch.setattr(_failures.os, "statvfs", lambda _: there)
    with (
        pytest.raises(flaxckpt.CheckpointWriteError, match=r"needs about 7\.0 MB") as e,
        _failures.space_told("/d/1", 7_000_000, "/d"),
    ):
        raise error
    assert said in str(e.value)
    assert e.value.__cause__ is error
    with pytest.raises(KeyError), _failures.space_told("/d/1", 7, "/d"):
        raise KeyError("another")


def test_what_fails_while_a_save_s_error_ends_the_loop_is_a_note(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EIO, "no disk")

    monkeypatch.setattr(_series_writer, "write_checkpoint", fail)
    ckpt = ModelCheckpoint(tmp_path / "{epoch}")
    with pytest.raises(flaxckpt.CheckpointWriteError, match="no disk") as caught, ckpt:
        ckpt.save({"w": np.ones(2)}, 0)
        with contextlib.suppress(flaxckpt.CheckpointError):
            ckpt.wait()
        ckpt.save({"w": np.ones(2)}, 1)
        raise flaxckpt.CheckpointWriteError("/x", "no disk, too")
    assert len(caught.value.__notes__) == 1


# ---- damage ------------------------------------------------------------------------------


def files_below(path):
    return sorted(p for p in path.rglob("*") if p.is_file() and p.stat().st_size)


@pytest.mark.parametrize("written", ["files", "database", "zstd"])
def test_damage_is_one_line_that_names_leaf_and_file(tmp_path, monkeypatch, written):
    monkeypatch.setattr(_write, "_LARGE_LEAF", 0 if written == "files" else 2**40)
    tree = {f"leaf{i}": jnp.arange(700.0) + i for i in range(9)}
    with ModelCheckpoint(tmp_path / "good", compress=written == "zstd") as ckpt:
        good = ckpt.save(tree, 0)
    for file in files_below(good / "state"):
        bad = shutil.copytree(good, tmp_path / "bad")
        there = bad / file.relative_to(good)
        there.write_bytes(there.read_bytes()[: there.stat().st_size // 2])
        try:
            flaxckpt.load(bad)
        except flaxckpt.CheckpointCorruptError as error:
            problem = error.problem
            assert "\n" not in problem
            assert len(problem) < 1000
            assert "tensorstore_spec" not in problem
            assert "leaf" in problem
            assert "state/" in problem
        shutil.rmtree(bad)


def test_a_long_error_is_shortened_and_keeps_both_ends():
    spec = "[tensorstore_spec='{\\\"a\\\": \\'b\\'}'] [source locations='x.cc:1']"
    error = ValueError(f"NOT_FOUND: leaf w {spec} end\nmore")
    assert _failures.in_one_line(error) == "ValueError: NOT_FOUND: leaf w end"
    line = _failures.in_one_line(ValueError("begin " + "x" * 5000 + " end"))
    assert line.startswith("ValueError: begin")
    assert line.endswith(" end")
    assert len(line) < 400
    assert _failures.in_one_line(KeyError()) == "KeyError"
    assert _failures.listed(list("abcdefgh")) == "a, b, c, d, e and 3 more"
