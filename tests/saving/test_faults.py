"""What was acknowledged survives: kills and errors at file calls of the real program."""

import os
import re
import shutil
import sys

import pytest
from faults import harness

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux" or shutil.which("cc") is None,
        reason="needs Linux and a C compiler",
    ),
]
FULL = os.environ.get("FLAXCKPT_FAULTS") == "full"
SAMPLE = None if FULL else 6


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return harness.build(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="module")
def disk(library):
    with harness.serving(library) as servers:
        yield servers


@pytest.fixture(scope="module")
def store(_s3):
    with harness.serving(None) as servers:
        yield servers


@pytest.mark.parametrize("mode", harness.MODES)
@pytest.mark.parametrize("scenario", harness.SCENARIOS)
def test_nothing_acknowledged_is_lost(disk, scenario, mode):
    seed = os.environ.get("FLAXCKPT_SEED", "0")
    _, points, problems = harness.survey(
        disk, scenario, mode, sample=SAMPLE, seed=f"{seed}{scenario}{mode}"
    )
    assert points
    assert not problems


@pytest.mark.parametrize("mode", harness.MODES)
@pytest.mark.parametrize("scenario", ["replace the best", "make way"])
def test_without_an_exchange_of_directories(disk, scenario, mode):
    """On file systems that cannot exchange, three renames do."""
    _, points, problems = harness.survey(
        disk, scenario, mode, exchange=False, sample=SAMPLE, seed=mode
    )
    assert points
    assert not problems


@pytest.mark.parametrize("mode", harness.STORE_MODES)
@pytest.mark.parametrize("scenario", harness.STORE_SCENARIOS)
def test_nothing_acknowledged_is_lost_in_a_store(
    store, s3, monkeypatch, scenario, mode
):
    monkeypatch.setenv("FLAXCKPT_TEST_STORE", s3)
    seed = os.environ.get("FLAXCKPT_SEED", "0")
    _, points, problems = harness.survey(
        store, scenario, mode, sample=SAMPLE, seed=f"{seed}{scenario}{mode}"
    )
    assert points
    assert not problems


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "renames"])
@pytest.mark.parametrize("scenario", ["replace the best", "write over the replaced"])
def test_order_of_syncs_and_renames(library, tmp_path, scenario, exchange):
    """From a recorded trace: a name never comes before what it names."""
    server, log = harness.Server(library), tmp_path / "trace"
    try:
        problem, _ = harness.attempt(server, scenario, "kill", 0, exchange, log=log)
    finally:
        server.close()
    assert not problem
    calls = [line.split(" ", 1) for line in log.read_text().splitlines()]
    swaps = [
        index
        for index, (call, path) in enumerate(calls)
        if re.search(r"/new -> best$", path) and call in ("rename", "exchange")
    ]
    swaps = [i for i in swaps if not (calls[i][0] == "rename" and is_refused(calls, i))]
    assert len(swaps) == 2
    for swap in swaps:
        written = calls[swap][1].split(" -> ")[0].split("/")[-2]
        before = calls[:swap]
        names = {
            final_name(path)
            for call, path in before
            if call == "write" and path.startswith(written)
        }
        assert len(names) > 8  # TensorStore's, Orbax's and ours
        for name in names:
            wrote = last(before, "write", name)
            synced = last(before, "sync", name)
            assert synced > wrote, name
            directory = name.rpartition("/")[0]
            if ["open", name] in before:  # not one written over
                assert last(before, "sync", directory) > wrote, name
        # The new name is on disk before the old files go, or are written over.
        after = calls[swap + 1 :]
        assert after[0] == ["sync", "."]
        if scenario == "write over the replaced":
            continue
        removals = [
            i
            for i, (call, path) in enumerate(after)
            if call == "unlink" and path.startswith(written)
        ]
        assert removals
        assert removals[0] > 0
    if scenario == "write over the replaced":
        between = calls[swaps[0] : swaps[1]]
        new = [path for call, path in between if call in ("open", "unlink")]
        values = [
            path for path in new if re.search(r"/state/(?!array_metadatas)", path)
        ]
        if os.environ.get("FLAXCKPT_TEST_ENGINE") != "orbax":  # which writes new files
            assert values == []  # they are written over
        # Nothing is written to where a checkpoint is.
        writes = [path for call, path in between if call in ("write", "truncate")]
        assert not any(path.startswith("best") for path in writes)


def is_refused(calls, index):
    """Whether a rename was the first try, onto a directory that was there."""
    return (
        calls[index + 1][0] in ("exchange", "rename") and "best" in calls[index + 1][1]
    )


def final_name(path):
    """A file's path when its directory has got its last name before the exchange."""
    return path.replace("new.orbax-checkpoint-tmp", "new").removesuffix(".__lock")


def last(calls, call, name):
    found = [
        i for i, (c, path) in enumerate(calls) if c == call and final_name(path) == name
    ]
    assert found, f"no {call} of {name}"
    return found[-1]
