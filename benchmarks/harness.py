"""What the benchmarks share: rounds in turn, medians, a table, and JSON.

Single timings on a shared machine swing by a factor of three: every benchmark times
all its candidates in each round, in turn, and reports the median of the rounds and
their spread, as ratios to one of them where a ratio is what counts.
"""

import argparse
import ctypes
import json
import mmap
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

_LIBC = ctypes.CDLL(None)


def arguments(description: str) -> argparse.Namespace:
    """Parse the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="little work, as in CI")
    parser.add_argument("--rounds", type=int, default=None, help="rounds to measure")
    parser.add_argument(
        "--json", type=Path, default=None, help="where to write results"
    )
    parser.add_argument("--only", default="", help="cases with this in their names")
    parser.add_argument("--peers", nargs="+", default=[], help="measure these only")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 5)
    return options


def rounds(
    candidates: Mapping[str, Callable[[], float]], number: int
) -> dict[str, list[float]]:
    """Measure all candidates, in turn, in each of a number of rounds.

    Args:
        candidates: Functions that return one measurement each.
        number: How many rounds.

    Returns:
        The measurements of each.
    """
    results: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(number):
        order = list(candidates)
        if index % 2:
            order.reverse()  # so that none is always the one after the slowest
        for name in order:
            results[name].append(candidates[name]())
    return results


def report(
    title: str, unit: str, results: Mapping[str, list[float]], json_path: Path | None
) -> None:
    """Print the medians as a table, and write all of it as JSON if asked to."""
    width = max(map(len, results))
    print(f"\n{title} ({unit}; median of {len(next(iter(results.values())))} rounds)\n")
    print(f"| {'':{width}} |     median |        min |        max |")
    print(f"| {'-' * width} | ---------: | ---------: | ---------: |")
    for name, values in results.items():
        cells = statistics.median(values), min(values), max(values)
        row = " | ".join(f"{cell:10.4g}" for cell in cells)
        print(f"| {name:{width}} | {row} |", flush=True)
    if json_path is not None:
        entry = {"title": title, "unit": unit, "results": results, "notes": []}
        append(json_path, {**entry, **environment()})


def append(json_path: Path, entry: Mapping[str, Any]) -> None:
    """Add an entry to the results."""
    old = json.loads(json_path.read_text()) if json_path.exists() else []
    json_path.write_text(json.dumps([*old, entry], indent=1))


def note(text: str, json_path: Path | None) -> None:
    """Print a conclusion, and write it to the last entry of the results."""
    print(f"\n{text}", flush=True)
    if json_path is not None:
        *old, last = json.loads(json_path.read_text())
        last["notes"].append(text)
        json_path.write_text(json.dumps([*old, last], indent=1))


def environment() -> dict[str, Any]:
    """Describe what the numbers were measured with."""
    packages = ("flaxckpt", "jax", "orbax-checkpoint", "keras", "flax", "numpy")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return {
        "versions": {name: version(name) for name in packages},
        "python": sys.version.split()[0],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "commit": commit.stdout.strip(),
        "devices": ", ".join(sorted({d.device_kind for d in jax.devices()})),
    }


def median_ratio(new: list[float], old: list[float]) -> float:
    """Return the median, over the rounds, of one measurement to another."""
    return statistics.median(a / b for a, b in zip(new, old, strict=True))


def ratios(
    results: Mapping[str, list[float]], json_path: Path | None, *bases: str
) -> None:
    """Note how flaxckpt compares with others: the ratio of their medians."""
    for base in bases:
        if {"flaxckpt", base} <= results.keys():
            ratio = statistics.median(results["flaxckpt"]) / statistics.median(
                results[base]
            )
            note(f"flaxckpt: {ratio:.2g} times {base}", json_path)


def tree_of(megabytes: int) -> dict[str, jax.Array]:
    """Make a state of 25 arrays."""
    rows = megabytes * 2**20 // 25 // 4 // 1024
    keys = jax.random.split(jax.random.key(0), 25)
    tree = {f"w{i:02}": jax.random.normal(keys[i], (rows, 1024)) for i in range(25)}
    return jax.block_until_ready(tree)


def like(tree: Any) -> Any:
    """Ask for a tree's arrays on the first device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree
    )


def settle(megabytes: int = 0) -> None:
    """Let the machine come to rest, so that nobody pays for the one before.

    Args:
        megabytes: How much memory the next one needs. All that is free is returned to
            the system, so that it is new to everybody, as it is to a process that has
            just begun. And so much is touched: a virtual machine may have given it
            back to its host within seconds, and to get it again takes longer than to
            read as much from a file.
    """
    os.sync()
    if megabytes and hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)
    memory = np.empty(megabytes << 20, np.uint8)
    memory[:: mmap.PAGESIZE] = 1
