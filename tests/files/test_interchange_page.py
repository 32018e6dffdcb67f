"""The table in docs/interchange.md is true."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from saved_trees import saved

import flaxckpt
from flaxckpt.errors import UnsupportedLeafError

PAGE = (Path(__file__).parents[2] / "docs/interchange.md").read_text()


EXAMPLES = {
    "text": "x",
    "bytes": b"x",
    "complex128": np.ones(2, np.complex128),
    "int4": jnp.ones(2, jnp.int4),
    "int2": jnp.ones(2, jnp.int2),
    "float4": jnp.ones(2, jnp.float4_e2m1fn),
    "bfloat16": jnp.ones(2, jnp.bfloat16),
    "float8": jnp.ones(2, jnp.float8_e4m3fn),
    "complex64": jnp.ones(2, jnp.complex64),
}


@pytest.mark.parametrize("row", [row for row in PAGE.splitlines() if row[:3] == "| `"])
def test_the_table_names_what_a_file_cannot_hold(tmp_path, row):
    suffix, *_, cannot = row.strip("| ").replace("`", "").split(" | ")
    suffix = suffix.partition(",")[0]
    if suffix == "Keras's":
        return
    refused = set()
    for name, value in EXAMPLES.items():
        try:
            path = saved(tmp_path / name, {"w": value})
        except UnsupportedLeafError:
            continue  # no checkpoint holds it
        try:
            file = flaxckpt.export(
                path, tmp_path / f"{name}{suffix}", weights_only=False
            )
        except UnsupportedLeafError:
            refused.add(name)
        else:
            flaxckpt.load(file, {"w": value})
    assert refused == {*cannot.split(", ")} & {*EXAMPLES}
