"""Where the lines of `verbose=1` go: once, to whoever listens, and into no bar."""

import contextlib
import io
import logging
import re
import sys

import numpy as np
import pytest
import rich.console
import rich.progress

from flaxckpt import ModelCheckpoint
from flaxckpt._runtime.log import LOGGER, log_line


class Kept(logging.Handler):
    """A handler that keeps what it gets."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append((record.levelname, record.getMessage()))


@contextlib.contextmanager
def bare_root():
    """The root logger as in a new process; pytest listens to it otherwise."""
    root = logging.root
    before, root.handlers, level = root.handlers, [], root.level
    try:
        yield root
    finally:
        root.handlers = before
        root.setLevel(level)
        LOGGER.setLevel(logging.NOTSET)
        LOGGER.handlers.clear()


@contextlib.contextmanager
def a_screen():
    """A terminal, of output and errors."""
    text = io.StringIO()
    with (
        bare_root(),
        contextlib.redirect_stdout(text),
        contextlib.redirect_stderr(text),
    ):
        yield text


LINE = ("INFO", "some line")


@pytest.mark.parametrize("level", ["NOTSET", "DEBUG", "INFO"])
def test_nobody_has_configured_anything_but_a_level(capsys, level):
    with bare_root():
        LOGGER.setLevel(level)
        log_line("some line")
        assert capsys.readouterr().out == "some line\n"


@pytest.mark.parametrize("level", ["NOTSET", "DEBUG", "INFO"])
def test_a_handler_of_the_logger_gets_the_line(capsys, level):
    with bare_root():
        handler = Kept()
        LOGGER.addHandler(handler)
        LOGGER.setLevel(level)
        log_line("some line")
        assert handler.lines == [LINE]
        assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("has_handler", [False, True])
def test_a_higher_level_keeps_the_line_away(capsys, has_handler):
    with bare_root():
        handler = Kept()
        if has_handler:
            LOGGER.addHandler(handler)
        LOGGER.setLevel(logging.WARNING)
        log_line("some line")
        logging.disable(logging.INFO)
        LOGGER.setLevel(logging.NOTSET)
        log_line("some line")
        logging.disable(logging.NOTSET)
        assert handler.lines == []
        assert capsys.readouterr() == ("", "")


def test_the_root_logger_gets_it_if_it_takes_such_lines(capsys):
    with bare_root() as root:
        handler = Kept()
        root.addHandler(handler)
        root.setLevel(logging.INFO)
        log_line("some line")
        assert handler.lines == [LINE]
        assert capsys.readouterr() == ("", "")


def test_a_root_logger_that_takes_warnings_only_is_no_answer(capsys):
    """So is the handler that a library has given it."""
    with bare_root() as root:
        handler = Kept()
        root.addHandler(handler)
        root.setLevel(logging.WARNING)
        log_line("some line")
        assert handler.lines == []
        assert capsys.readouterr().out == "some line\n"


def test_two_loggers_with_handlers_get_it_once_each(capsys):
    with bare_root() as root:
        above, own = Kept(), Kept()
        root.addHandler(above)
        root.setLevel(logging.INFO)
        LOGGER.addHandler(own)
        log_line("some line")
        assert above.lines == own.lines == [LINE]
        LOGGER.propagate = False
        log_line("some line")
        LOGGER.propagate = True
        assert (len(above.lines), len(own.lines)) == (1, 2)
        assert capsys.readouterr() == ("", "")


def test_a_save_logs_what_it_would_print(tmp_path, caplog, capsys):
    with (
        caplog.at_level(logging.INFO, logger="flaxckpt"),
        ModelCheckpoint(tmp_path / "{epoch}", verbose=1) as ckpt,
    ):
        ckpt.save({"w": np.ones(2)}, 0)
    assert [(each.name, each.message) for each in caplog.records] == [
        ("flaxckpt", f"Epoch 1: saving model to {tmp_path / '1'}"),
        ("flaxckpt", f"Epoch 1: finished saving model to {tmp_path / '1'}"),
    ]
    assert capsys.readouterr().out == ""


# ---- progress bars -------------------------------------------------------------------


def lines_on(text):
    """What a terminal shows, line by line: a carriage return begins a line anew."""
    lines = []
    for line in text.split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


@pytest.mark.parametrize("name", ["std", "auto"])
def test_a_bar_of_tqdm_is_not_torn(name):
    with a_screen() as screen:
        tqdm = pytest.importorskip(f"tqdm.{name}").tqdm
        with tqdm(total=3, file=sys.stderr, ncols=40) as bar:
            log_line("some line")
            bar.update(3)
            bar.refresh()
            log_line("another")
        first, second, shown, *_ = lines_on(screen.getvalue())
        assert (first, second) == ("some line", "another")
        assert shown.startswith("100%|")
        log_line("and one more")  # after the last bar
        assert lines_on(screen.getvalue())[-2:] == ["and one more", ""]


def test_a_bar_of_rich_is_not_torn():
    with a_screen() as screen:
        console = rich.console.Console(file=screen, force_terminal=True, width=60)
        with rich.progress.Progress(console=console) as progress:
            task = progress.add_task("training", total=3)
            log_line("some line")
            progress.update(task, completed=3)
            log_line("another")
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
        lines = [line.strip() for line in re.split("[\r\n]", plain)]
        assert lines.count("some line") == lines.count("another") == 1
        assert any(line.startswith("training") and "100%" in line for line in lines)
