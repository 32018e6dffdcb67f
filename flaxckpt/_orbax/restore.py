"""Has Orbax read leaves of a checkpoint that flaxckpt wrote.

Orbax's exceptions do not leave this module.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxckpt._disk.alias import aliased
from flaxckpt._disk.record import located
from flaxckpt._disk.vetting import check_plain, check_readable
from flaxckpt._object_store.source import Place
from flaxckpt._orbax.engine import (
    calls_of_orbax,
    ocp,
    orbax_context,
    orbax_narrows,
)
from flaxckpt._orbax.files import check_names, data_files
from flaxckpt._runtime.failures import in_one_line, listed
from flaxckpt._trees.layout import Layout
from flaxckpt._trees.leaf import Leaf, key_dtype
from flaxckpt._trees.wanted import Wanted, is_wide
from flaxckpt.errors import CheckpointCorruptError, CheckpointError


def read_by_orbax(place: Place, layout: Layout, wanted: Mapping[int, Wanted]) -> Any:
    """Have Orbax read the leaves in `wanted`; return a list of all leaves, in order."""
    path = place.path
    to_host = orbax_narrows()
    asked = [
        _abstract(leaf, wanted[index], wide_to_host=to_host)
        if index in wanted
        else ocp.PLACEHOLDER
        for index, leaf in enumerate(layout.leaves)
    ]
    try:
        place.complete()
        check_names(path, [layout.leaves[index] for index in wanted])
        needed = sum(layout.leaves[index].nbytes for index in wanted)
        check_plain(path, needed, layout.nbytes)
        with calls_of_orbax(orbax_context()), aliased(located(path)) as plain:
            tree = ocp.load(plain, layout.fill_for_orbax(asked))
            return layout.pick(tree)
    except (MemoryError, jax.errors.JaxRuntimeError, CheckpointError):
        raise
    except Exception as error:
        check_readable(path)
        leaves = [layout.leaves[index] for index in wanted]
        names = [leaf.name for leaf in leaves]
        files = data_files(located(path), leaves)
        problem = f"cannot be read: {listed(names)} (in one of the files "
        problem += f"{listed(files) or 'that hold it, which are missing'})"
        raise CheckpointCorruptError(
            str(path), f"{problem}: {in_one_line(error)}"
        ) from error


def _abstract(leaf: Leaf, want: Wanted, *, wide_to_host: bool) -> Any:
    """Describe to Orbax how to restore a leaf.

    Orbax restores it in the stored dtype, since Orbax would cast silently. It goes to
    the host if it stays there, or if the caller will convert it, or will place it
    without committing it, or if it has 64 bits and `wide_to_host` is set.
    """
    match leaf.kind:
        case "bool" | "int" | "float" | "str" if not leaf.dtype:
            return {"bool": False, "int": 0, "float": 0.0, "str": ""}[leaf.kind]
        case "key":
            sharding = want.sharding or jax.sharding.SingleDeviceSharding(
                jax.local_devices()[0]
            )
            return jax.ShapeDtypeStruct(
                leaf.shape, key_dtype(leaf.impl), sharding=sharding
            )
        case _:
            pass
    dtype = "complex128" if leaf.kind == "complex" else leaf.dtype
    to_host = wide_to_host and is_wide(dtype)
    if want.sharding is not None and dtype == want.leaf.dtype and not to_host:
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=want.sharding)
    return np.broadcast_to(np.zeros((), jnp.dtype(dtype)), leaf.shape)
