"""Orbax writes a tree into a directory.

This uses the free functions of Orbax's v1 API, each on one directory, and none of
Orbax's managers. flaxckpt itself does listing, retention and replacement.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tensorstore

from flaxckpt._copies.held import HostCopy
from flaxckpt._direct.form import Form, recognized
from flaxckpt._direct.forms import FORMS, placements_of, thawed
from flaxckpt._disk.alias import plainly
from flaxckpt._runtime.locks import new_lock
from flaxckpt._runtime.quiet import quiet
from flaxckpt._trees.digest import digests
from flaxckpt._trees.layout import Layout
from flaxckpt._trees.leaf import Leaf

with quiet():  # it logs when it is imported
    from orbax.checkpoint import v1
# Orbax annotates its paths with a class of its own, but takes any path.
ocp: Any = v1
# Held while Orbax saves: it numbers saves globally, and each `ModelCheckpoint` saves
# from a thread of its own.
SAVING = new_lock()
# Orbax's v1 functions read what these classes write.
HANDLERS = frozenset(
    "PyTreeHandler PyTreeCheckpointHandler StandardCheckpointHandler JsonHandler "
    "JsonCheckpointHandler ProtoHandler ProtoCheckpointHandler MetricsHandler "
    "StatefulCheckpointableHandler".split()
)


@functools.cache
def storable(dtype: str) -> bool:
    """Tell whether arrays of the dtype with this name can be stored."""
    try:
        tensorstore.dtype(dtype)
    except (TypeError, ValueError):
        return False
    return dtype not in ("object", "string", "ustring", "json", "char", "byte")


def write_by_orbax(
    written: Path,
    layout: Layout,
    leaves: list[Any],
    held: list[Any],
    *,
    is_database: bool,
    compress: bool,
) -> tuple[list[str], Sequence[Sequence[str]], Form | None]:
    """Have Orbax write a tree, and learn its form; return digests, checksums, form.

    Without a form, or in a database, there are no checksums.
    """
    leaves, values, handed_over = _unpacked(leaves), _unpacked(held), thawed(held)
    keyed = list(map(with_key, layout.leaves, leaves))
    context = orbax_context(is_database=is_database, compress=compress)
    with SAVING, quiet(), context, plainly(written) as plain:
        ocp.save(plain, layout.fill_for_orbax(keyed))
    form = None if compress else recognized(written, layout, values)
    if form is None:
        return digests(handed_over), [], None
    FORMS.appendleft((layout, placements_of(values), form))
    return *form.marks(handed_over), form


def with_key(leaf: Leaf, value: Any) -> Any:
    """Return a leaf's value; wrap the data of PRNG keys as typed keys."""
    if leaf.kind != "key":
        return value
    if isinstance(value, jax.Array):
        is_data = not jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        return jax.random.wrap_key_data(value, impl=leaf.impl) if is_data else value
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return jax.random.wrap_key_data(jnp.asarray(value), impl=leaf.impl)


def _unpacked(leaves: list[Any]) -> list[Any]:
    """Return leaves as Orbax takes them, without `FrozenLeaf` and `HostCopy`."""
    return [
        leaf.placed() if isinstance(leaf, HostCopy) else leaf for leaf in thawed(leaves)
    ]


def orbax_context(*, is_database: bool = True, compress: bool = False) -> v1.Context:
    """Return Orbax's settings for all of flaxckpt's reads and writes.

    Orbax writes its sharding file: without it, plain `ocp.load(path)` cannot place the
    arrays. Orbax makes directories synchronously. Otherwise it would find the signals
    that it waits for by a global number, which another thread's save changes. Then it
    writes before the directories exist, or hangs.
    """
    context = v1.Context()
    context.asynchronous.create_directories_asynchronously = False
    context.array.saving.use_ocdbt = is_database
    context.array.saving.use_compression = compress
    context.array.saving.enable_post_merge_validation = False
    context.memory.deepcopy_host_arrays = False
    return context
