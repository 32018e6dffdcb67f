"""The TPU compiler's word, for pods of up to 1024 chips, on a machine with none."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TOPOLOGIES = {"v5e:4x4": (4, 4), "v6e:16x16": (16, 16), "v5p:8x8x16": (64, 16)}
PROGRAM = """
import json, sys
import bench_tpu
print(json.dumps(bench_tpu.facts(sys.argv[1], tuple(map(int, sys.argv[2:])))))
"""

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="needs libtpu: pip install 'flaxckpt[tpu]'",
    ),
    pytest.mark.skipif(
        not BENCHMARKS.is_dir(), reason="what is compiled is in benchmarks/"
    ),
]


@pytest.fixture(scope="module", params=list(TOPOLOGIES))
def facts(request):
    """What the compiler says, from a process of its own: libtpu is loaded there."""
    shape = map(str, TOPOLOGIES[request.param])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, request.param, *shape],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": f"{BENCHMARKS}:{BENCHMARKS.parent}"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["step", "snapshot"])
def test_the_host_is_left_alone(facts, kind):
    assert facts[kind]["host"] == 0


@pytest.mark.parametrize("kind", ["step", "snapshot"])
def test_no_collective_is_added(facts, kind):
    assert facts["alone"]["collectives"]
    assert facts[kind]["collectives"] == facts["alone"]["collectives"]


def test_step_takes_next_to_no_memory(facts):
    assert facts["step"]["bytes"] - facts["alone"]["bytes"] < 64 * 2**10


def test_a_slot_takes_one_copy_of_the_shards(facts):
    """And what the compiler rounds up to; all chips' shards would be many times that."""
    added = facts["snapshot"]["bytes"] - facts["alone"]["bytes"]
    assert added <= facts["shard_bytes"] + 2**19
