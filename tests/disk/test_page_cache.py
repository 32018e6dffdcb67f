"""A file has what was written, whichever way the bytes took to the disk."""

import ctypes
import errno
import mmap
import os
import subprocess
import sys
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaxckpt._disk.files import Draft
from flaxckpt._disk.page_cache import BUFFER_BYTES, past_cache


def has_device(path):
    return os.major(os.stat(path).st_dev) != 0


def cached_bytes(path):
    """How much of a file the page cache has; reads nothing of it."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        pages = -(-len(mapped) // mmap.PAGESIZE)
        found = (ctypes.c_ubyte * pages)()
        at = (ctypes.c_char * len(mapped)).from_buffer(mapped)
        libc = ctypes.CDLL(None, use_errno=True)
        assert (
            libc.mincore(
                ctypes.c_void_p(ctypes.addressof(at)), len(mapped), ctypes.byref(found)
            )
            == 0
        )
        del at
    return sum(each & 1 for each in found) * mmap.PAGESIZE


SIZES = st.lists(
    st.one_of(
        st.integers(0, 3 * BUFFER_BYTES),
        st.sampled_from([BUFFER_BYTES - 1, BUFFER_BYTES, BUFFER_BYTES + 1, 4096]),
    ),
    max_size=4,
)


@given(sizes=SIZES)
def test_the_parts_are_there_in_order(tmp_path_factory, sizes):
    path = tmp_path_factory.mktemp("parts") / "a"
    parts = [os.urandom(size) for size in sizes]
    with Draft(path.parent, sync=True) as draft:
        with draft.writing("a", is_kept_in_cache=False) as write:
            for part in parts:
                write(part)
        draft.finish()
    assert path.read_bytes() == b"".join(parts)


def test_the_page_cache_keeps_only_what_it_is_asked_to(tmp_path):
    if not has_device(tmp_path):
        pytest.skip("no disk of this machine has the directory")
    content = os.urandom(3 * BUFFER_BYTES)
    for name, is_kept in ("kept", True), ("not", False), ("kept", False):
        with Draft(tmp_path, sync=True) as draft:
            with draft.writing(name, is_kept_in_cache=is_kept) as write:
                write(content)
            draft.finish()
    assert cached_bytes(tmp_path / "kept") == len(content)  # written over, too
    assert cached_bytes(tmp_path / "not") < BUFFER_BYTES
    assert (tmp_path / "not").read_bytes() == content


def test_what_a_disk_refuses_goes_through_the_cache(tmp_path):
    """Such as writes in the middle of a block."""
    path = tmp_path / "a"
    content = os.urandom(3 * BUFFER_BYTES)
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY)
    try:
        os.write(descriptor, b"x")
        with past_cache(descriptor) as write:
            write(memoryview(content))
    finally:
        os.close(descriptor)
    assert path.read_bytes() == b"x" + content


@pytest.mark.parametrize("limit", [BUFFER_BYTES + 4096, BUFFER_BYTES + 5, 100])
def test_a_disk_that_is_full_is_an_error(tmp_path, limit):
    """Wherever in the file the room ends."""
    program = textwrap.dedent(f"""
        import os, resource, signal
        from flaxckpt._disk.page_cache import past_cache
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        descriptor = os.open("a", os.O_CREAT | os.O_WRONLY)
        try:
            with past_cache(descriptor) as write:
                write(memoryview(bytes({3 * BUFFER_BYTES})))
        except OSError as error:
            print(error.errno)
    """)
    found = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        check=True,
        timeout=120,
    )
    assert found.stdout.split() == [str(errno.EFBIG)]


def test_what_fails_halfway_writes_no_more(tmp_path):
    with pytest.raises(RuntimeError), Draft(tmp_path, sync=True) as draft:
        with draft.writing("a", is_kept_in_cache=False) as write:
            write(bytes(BUFFER_BYTES + 1))
            raise RuntimeError
    assert (tmp_path / "a").stat().st_size == BUFFER_BYTES
