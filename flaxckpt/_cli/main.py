"""The command `flaxckpt`: a demo, to see that resuming works on this machine."""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import flaxckpt
from flaxckpt._runtime.extras import how_to_install

_EXTRA = ("flax", "optax", "sklearn")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The arguments; None for the arguments of the process.

    Returns:
        The exit status: 0 for success, 1 for a failure, 2 if it could not begin.
    """
    parser = argparse.ArgumentParser(
        prog="flaxckpt", description="Model checkpoints for JAX training loops."
    )
    parser.add_argument(
        "--version", action="version", version=f"flaxckpt {flaxckpt.__version__}"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    demo = commands.add_parser(
        "demo",
        help="train, be killed, resume, and compare",
        description="Train a small classifier of handwritten digits twice: once "
        "without interruption, and once in a process that is killed in the middle of "
        "an epoch and resumed from its checkpoints. Both must end bit for bit alike. "
        "Takes about half a minute, and downloads nothing.",
    )
    demo.add_argument(
        "--directory",
        type=Path,
        metavar="DIR",
        help="where to keep the checkpoints; empty, or not there yet "
        "(default: a temporary directory, removed at the end)",
    )
    demo.add_argument(
        "--epochs",
        type=_epochs,
        default=12,
        metavar="N",
        help="epochs of each run, at least 2 (default: %(default)s)",
    )
    given = parser.parse_args(argv)
    return _demo(given.directory, given.epochs)


def _demo(directory: Path | None, epochs: int) -> int:
    if directory is not None and (problem := _problem(directory)):
        return _fail(f"directory {str(directory)!r} {problem}", 2)
    try:
        from flaxckpt._cli import demo as demo
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        return _fail(
            f"needs {missing}, which is not installed. {how_to_install('demo')}",
            2,
        )
    try:
        if directory is not None:
            return 0 if demo.run(directory, epochs) else 1
        with tempfile.TemporaryDirectory(prefix="flaxckpt-demo-") as temporary:
            is_same = demo.run(Path(temporary), epochs)
            print("To keep the checkpoints, pass --directory DIR.")
            return 0 if is_same else 1
    except flaxckpt.CheckpointError as error:
        return _fail(str(error), 1)


def _problem(directory: Path) -> str:
    """Say what is wrong with the directory, if anything is."""
    try:
        if any(directory.iterdir()):
            return "is not empty. Pass one that is, or that does not exist yet."
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"cannot be used: {error.strerror}."
    return ""


def _epochs(text: str) -> int:
    """Parse a number of epochs: at least 2, so that one is whole before the kill."""
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 1 in digits")
    return int(text)


def _fail(problem: str, status: int) -> int:
    print(f"flaxckpt demo: {problem}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
