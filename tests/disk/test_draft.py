"""What is written over, or linked, is nobody else's."""

import contextlib
import errno
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from flaxckpt._disk import files as _files
from flaxckpt._disk.files import Draft, keep_only


def draft(directory):
    return Draft(directory, sync=True)


def write(directory, name, parts):
    with draft(directory) as one:
        one.write(name, parts)
        one.finish()


def test_a_file_is_written_over_where_it_is(tmp_path):
    write(tmp_path, "a/b", [b"old, and longer"])
    before = (tmp_path / "a/b").stat().st_ino
    write(tmp_path, "a/b", [b"ne", b"w"])
    assert (tmp_path / "a/b").read_bytes() == b"new"
    assert (tmp_path / "a/b").stat().st_ino == before


def test_a_file_with_another_name_is_left_alone(tmp_path):
    """As when somebody keeps a checkpoint with `cp -al`."""
    write(tmp_path, "a", [b"old"])
    os.link(tmp_path / "a", tmp_path / "kept")
    write(tmp_path, "a", [b"new"])
    assert (tmp_path / "kept").read_bytes() == b"old"
    assert (tmp_path / "a").read_bytes() == b"new"


def test_a_file_that_is_open_is_left_alone(tmp_path):
    write(tmp_path, "a", [b"old"])
    with (tmp_path / "a").open("rb") as reader:
        write(tmp_path, "a", [b"new"])
        assert reader.read() == b"old"
    mapped = np.memmap(tmp_path / "a", np.uint8, "r")
    write(tmp_path, "a", [b"yet"])
    assert bytes(mapped) == b"new"
    assert (tmp_path / "a").read_bytes() == b"yet"


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_bytes(b"precious")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a").symlink_to(tmp_path / "elsewhere")
    write(tmp_path / "in", "a", [b"new"])
    assert (tmp_path / "elsewhere").read_bytes() == b"precious"
    assert not (tmp_path / "in/a").is_symlink()


def test_what_does_not_belong_goes(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").write_bytes(b"precious")
    inside = draft(tmp_path / "in")
    for name in ("a", "b/c", "b/d/e", "f/g"):
        inside.write(name, [b"x"])
    (tmp_path / "in/link").symlink_to(other)
    keep_only(tmp_path / "in", {"a", "b/c"})
    found = sorted(
        str(p.relative_to(tmp_path / "in")) for p in (tmp_path / "in").rglob("*")
    )
    assert found == ["a", "b", "b/c"]
    assert (other / "file").exists()


OPENER = """
    import os, sys
    parent = os.getppid()
    while os.getppid() == parent:  # not for ever, if the test is killed
        try:
            open(sys.argv[1], "rb").close()
        except FileNotFoundError:
            pass
"""


def test_who_opens_a_file_at_that_moment_does_no_harm(tmp_path):
    path = tmp_path / "a"
    write(tmp_path, "a", [b"0"])
    opener = subprocess.Popen([sys.executable, "-c", textwrap.dedent(OPENER), path])
    try:
        for number in range(20_000):  # without care, the kernel ends us in 10 ms
            Draft(tmp_path, sync=False).write("a", [str(number).encode()])
        assert path.read_text() == "19999"
    finally:
        opener.kill()
        opener.wait()


def linked(directory, source, stamp):
    one = draft(directory)
    return one.link("a/b", source, stamp), one


def test_a_link_is_another_name_of_the_same_file(tmp_path):
    source = draft(tmp_path / "one")
    source.write("x", [b"values"])
    stamp = source.stamp("x")
    for _ in range(2):  # the second time it is there
        done, other = linked(tmp_path / "other", tmp_path / "one/x", stamp)
        assert done
        assert other.stamp("a/b") == stamp
    other.write("a/b", [b"others"])
    assert (tmp_path / "one/x").read_bytes() == b"values"
    assert sorted(os.listdir(tmp_path / "other/a")) == ["b"]


def test_what_cannot_be_linked_leaves_what_is_there(tmp_path, monkeypatch):
    source = draft(tmp_path / "one")
    source.write("x", [b"values"])
    stamp = source.stamp("x")
    write(tmp_path / "other", "a/b", [b"mine"])
    done, _ = linked(tmp_path / "other", tmp_path / "gone", stamp)
    assert not done
    os.utime(tmp_path / "one/x")  # somebody has written to it
    done, _ = linked(tmp_path / "other", tmp_path / "one/x", stamp)
    assert not done
    stamp = source.stamp("x")
    (tmp_path / "one/x").unlink()
    source.write("x", [b"VALUES"])  # or put another one there
    done, _ = linked(tmp_path / "other", tmp_path / "one/x", stamp)
    assert not done
    assert (tmp_path / "other/a/b").read_bytes() == b"mine"
    assert sorted(os.listdir(tmp_path / "other/a")) == ["b"]


def test_what_the_disk_does_not_take_is_an_error(tmp_path, monkeypatch):
    """The disk takes a file while others are written: its error comes at the end."""

    def refuse(descriptor):
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(_files, "_sync_data", refuse)
    with draft(tmp_path) as one:
        for number in range(40):
            one.write(f"{number}", [b"x"])
        with pytest.raises(OSError, match="no"):
            one.finish()
    with contextlib.suppress(FileNotFoundError):  # others come and go
        for number in os.listdir("/proc/self/fd"):
            assert str(tmp_path) not in os.readlink(f"/proc/self/fd/{number}")
