"""What do a look into checkpoints and a small part of one cost?

A part is one of 100 leaves of a checkpoint, 1% of its bytes, which are in the page
cache. The peer is Orbax's v1 `load`, which reads nothing where it gets a placeholder.
The look is the description of many checkpoints, from their small files alone; the peer
is Orbax's v1 `metadata`.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import harness
import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

import flaxckpt

LEAVES, NAME = 100, "w07"


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def parts(megabytes: int, options) -> None:
    """Load one leaf, and all of them."""
    size = megabytes * 2**20 // 4 // LEAVES
    keys = jax.random.split(jax.random.key(0), LEAVES)
    tree = {f"w{i:02}": jax.random.normal(key, (size,)) for i, key in enumerate(keys)}
    jax.block_until_ready(tree)
    with tempfile.TemporaryDirectory() as directory:
        with flaxckpt.ModelCheckpoint(f"{directory}/x", sync=False) as ckpt:
            path = ckpt.save(tree, epoch=0)
        like = harness.like(tree)
        form = {name: ocp.PLACEHOLDER for name in tree} | {NAME: like[NAME]}
        candidates = {
            "flaxckpt, the part": lambda: flaxckpt.load(path, select=NAME),
            "flaxckpt, the whole": lambda: flaxckpt.load(path),
            "Orbax v1 load, the part": lambda: ocp.load(path, form)[NAME],
            "Orbax v1 load, the whole": lambda: ocp.load(path, like),
        }
        timed = {
            name: lambda load=load: seconds(load) for name, load in candidates.items()
        }
        found = harness.rounds(timed, options.rounds)
    title = f"{megabytes} MB in {LEAVES} leaves: loads"
    harness.report(title, "s", found, options.json)
    for who in ("flaxckpt", "Orbax v1 load"):
        ratio = harness.median_ratio(
            found[f"{who}, the part"], found[f"{who}, the whole"]
        )
        harness.note(f"{who}: the part takes {ratio:.3f} of the whole", options.json)


def looks(number: int, options) -> None:
    """Describe checkpoints of 50 leaves."""
    tree = {f"w{i}": jnp.full(8, i) for i in range(50)}
    with tempfile.TemporaryDirectory() as directory:
        with flaxckpt.ModelCheckpoint(f"{directory}/{{step}}", sync=False) as ckpt:
            for step in range(number):
                ckpt.save(tree, step=step)
        paths = [Path(directory, str(step)) for step in range(number)]
        found = harness.rounds(
            {
                "flaxckpt": lambda: seconds(
                    lambda: [*map(flaxckpt.describe, paths)] and 0
                ),
                "Orbax v1 metadata": lambda: seconds(
                    lambda: [*map(ocp.metadata, paths)] and 0
                ),
            },
            options.rounds,
        )
    harness.report(f"{number} checkpoints described", "s", found, options.json)
    harness.ratios(found, options.json, "Orbax v1 metadata")


def main() -> None:
    options = harness.arguments(__doc__)
    parts(40 if options.quick else 400, options)
    looks(50 if options.quick else 1000, options)


if __name__ == "__main__":
    main()
