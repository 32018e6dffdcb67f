"""Killed at any time, a run of four processes loses nothing that it was told is there."""

import os
import random
import tempfile
import time

import pytest
from multiprocess import pod
from multiprocess.outcome import leftovers, there_below

import flaxckpt

KILLS = 200 if os.environ.get("FLAXCKPT_FAULTS") == "full" else 4
SEED = int(os.environ.get("FLAXCKPT_SEED", random.randrange(10**6)))
PROCESSES, KEPT = 4, 3  # as in `save_on`
# What every pod compiles again, it finds here.
PROGRAMS = {
    "JAX_COMPILATION_CACHE_DIR": f"{tempfile.gettempdir()}/flaxckpt-test-programs",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


@pytest.mark.slow
def test_killed_at_any_time_it_goes_on_from_what_was_on_disk(tmp_path):
    """Kill one of four at random, or all of them; those that live have to end, too."""
    chance, directory, before = random.Random(SEED), tmp_path / "run", -1
    for number in range(KILLS):
        victims = [[0], [1], range(PROCESSES)][number % 3]
        if len(victims) == 1 and number > 2:
            victims = [chance.randrange(PROCESSES)]
        told = f"seed {SEED}, kill {number} of {list(victims)}"
        running = pod.start(
            tmp_path, "save_on", PROCESSES, directory, script="faulty.py",
            faults=dict.fromkeys(range(PROCESSES), PROGRAMS),
        )  # fmt: skip
        _, first = running.wait_until(victims[0], ["starts at"], beginning=True)
        assert first == before + 1, f"{told}\n{running.told()}"
        time.sleep(chance.uniform(0, 1))
        for victim in victims:
            running.processes[victim].kill()
        said = running.wait(check=False)  # which tells of a hang
        told = f"{told}\n{running.told()}"
        saved = [line[1] for lines in said for line in lines if line[0] == "saved"]
        there = there_below(directory) if directory.exists() else set()
        before = max(there, default=-1)
        assert before >= max([first - 1, *saved]), told
        newest = range(max(before - KEPT + 1, 0), before + 1)
        assert there >= set(newest), told
        assert len(there) <= KEPT + 1, told
        assert len(leftovers(directory)) <= 3, told  # the next one deletes them
        for log in running.logs:
            log.unlink()
    with flaxckpt.ModelCheckpoint(directory / "{epoch}", max_to_keep=KEPT) as ckpt:
        ckpt.save({"w": 0}, before + 1)
    assert not leftovers(directory)
