"""All small files of a checkpoint, as anybody may write them: an error, or equal values.

`mutants.py` makes them and looks what becomes of them; here are the processes, with
little memory, and a watch over their time. With FLAXCKPT_FAULTS=full there are 2,000.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import hypothesis.strategies as st
import mutants
import numpy as np
import pytest
from hypothesis import example, given

import flaxckpt
from flaxckpt import ModelCheckpoint
from flaxckpt._direct import zarr as _zarr
from flaxckpt._disk import record_fields as _record_fields
from flaxckpt._disk import table as _table
from flaxckpt._disk import zarr_json as _zarr_json
from flaxckpt._disk.fields import MalformedError
from flaxckpt._disk.record import FORMAT

FULL = os.environ.get("FLAXCKPT_FAULTS") == "full"
COUNT, PROCESSES = (2000, 2) if FULL else (48, 1)
SILENT_SECS = 180  # without a word, which takes one mutant


@pytest.fixture(scope="module")
def good():
    """The good checkpoints: in memory, where that can be had."""
    memory = Path("/dev/shm")
    where = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="flaxckpt-fuzz-", dir=where) as here:
        mutants.make(Path(here))
        yield Path(here)


def start(good, first, count):
    return subprocess.Popen(
        [sys.executable, mutants.__file__, str(good), str(first), str(count)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def watched(process):
    """Return what a process prints; kill it where it is silent for too long."""
    output, errors, heard = [], [], [time.monotonic()]

    def listen():
        for line in process.stderr:
            heard[0] = time.monotonic()
            errors.append(line)

    threads = [
        threading.Thread(target=listen),
        threading.Thread(target=lambda: output.extend(process.stdout)),
    ]
    for thread in threads:
        thread.start()
    while True:
        try:
            process.wait(1)
            break
        except subprocess.TimeoutExpired:
            if time.monotonic() - heard[0] > SILENT_SECS:
                process.kill()
    for thread in threads:
        thread.join()
    return output, "".join(errors)


def test_a_mutant_is_an_error_or_equal_and_in_nobody_s_way(good):
    share = COUNT // PROCESSES
    processes = [start(good, 1 + index * share, share) for index in range(PROCESSES)]
    try:
        for process in processes:
            output, errors = watched(process)
            assert process.returncode == 0, f"{output}\n{errors[-4000:]}"
            counts = json.loads(output[-1])
            assert counts.pop("wrong") == 0, "".join(output)
            assert sum(counts.values()) == share
            assert counts["CheckpointCorruptError"] > share // 3
            assert counts["equal"] > share // 50
            print(counts)  # with -s
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_the_same_mutants_are_made_again(good, tmp_path):
    import random
    import shutil

    for name in ("a", "b"):
        shutil.copytree(good / "files/good/3", tmp_path / name)
    done = [mutants.mutate(tmp_path / name, random.Random(7)) for name in ("a", "b")]
    assert done[0] == done[1]


# ---- the parser --------------------------------------------------------------------------

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([o for o in mutants.ODD if not isinstance(o, list | dict)]),
)
names = st.one_of(
    st.text(max_size=4),
    st.sampled_from(
        ["path", "kind", "dtype", "shape", "dict", "list", "tuple", "float"]
    ),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=4)
    ),
    max_leaves=20,
)
PARSERS = (
    lambda data: _record_fields.check_record(_record_fields.parse_record(data)[0]),
    lambda data: _table.parse_table(data, FORMAT),
    _zarr_json.parse_zarr,
    _zarr_json.parse_texts,
)


def tried(parse, data):
    """Return what is parsed; None where it is malformed, which is said in one line."""
    try:
        return parse(data)
    except MalformedError as error:
        problem = str(error)
    assert "\n" not in problem
    assert len(problem) < 400
    return None


@given(st.binary(max_size=64), values)
@example(b"[" * 10**6, None)
@example(b'{"a":' * 10**5, None)
@example(b"9" * 10**5, None)
@example(b"", None)
def test_a_parser_raises_one_error_whatever_there_is(data, value):
    for parse in PARSERS:
        tried(parse, data)
        tried(parse, json.dumps(value).encode())


@given(st.data())
def test_a_value_of_another_kind_is_refused(good, data):
    """Wherever in a record, a table or a zarr.json: it parses to the same, or not."""
    path = good / "files/good/3"
    file = data.draw(st.sampled_from(["flaxckpt.json", "flaxckpt_leaves.json",
                                      "state/w/zarr.json"]))  # fmt: skip
    fields = json.loads((path / file).read_bytes())
    place = data.draw(st.sampled_from(list(mutants.places(fields))[1:]))
    mutants.parent_of(fields, place)[place[-1]] = data.draw(values)
    parse = dict(zip(("flaxckpt.json", "flaxckpt_leaves.json"), PARSERS, strict=False))
    found = tried(parse.get(file, _zarr_json.parse_zarr), json.dumps(fields).encode())
    if file == "flaxckpt_leaves.json" and found is not None:
        for leaf in found["leaves"]:
            assert all(type(name) is str for name in leaf["path"])
            assert all(type(n) is int and n >= 0 for n in leaf.get("shape", []))
    if file == "state/w/zarr.json" and found is not None:
        assert all(0 < part <= size for size, part in zip(found.shape, found.chunk, strict=True))  # fmt: skip
    if file == "flaxckpt.json" and found is not None:
        assert found["epoch"] is None or type(found["epoch"]) is int
        assert found["time"].tzinfo is not None


def test_what_is_written_parses(good):
    for kind in mutants.KINDS:
        path = good / kind / "good/3"
        record, is_whole = _record_fields.parse_record(
            (path / "flaxckpt.json").read_bytes()
        )
        assert is_whole
        _record_fields.check_record(record)
        _table.parse_table((path / "flaxckpt_leaves.json").read_bytes(), FORMAT)
        for file in path.rglob("zarr.json"):
            _zarr_json.parse_zarr(file.read_bytes())
        flaxckpt.verify(path)


def test_what_strangers_add_to_a_description_is_not_kept(tmp_path):
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        path = ckpt.save({"w": np.ones(2**18, np.float32)}, 0)
    (file,) = path.glob("state/w/zarr.json")
    description = file.read_bytes()
    known = _zarr.parsed("w", description, "float32")
    kept = _zarr._known_grid.cache_info().currsize
    padded = _zarr.parsed("w", description + b" " * 2**20, "float32")
    assert padded.shape == known.shape
    assert _zarr._known_grid.cache_info().currsize == kept
