"""Orbax's handler writes this process's share of a tree that several processes hold.

Orbax's `save` has the devices of all processes compute together, on the thread that
calls it. So flaxckpt calls the handler that `save` calls, which computes nothing on
devices. The handler is told that this process is the only one, so it waits for no
other: each process writes an OCDBT database of its own. Process 0 merges all databases
that it finds.
"""

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from flaxckpt._copies.held import HostCopy
from flaxckpt._direct.zarr import ARRAYS_METADATA, STATE
from flaxckpt._disk.alias import aliased
from flaxckpt._disk.record import ORBAX_FILE
from flaxckpt._orbax.engine import calls_of_orbax, orbax_context, with_key
from flaxckpt._orbax.state_handler import v1
from flaxckpt._processes.mesh import replicated
from flaxckpt._processes.messages import LEADER, process_index
from flaxckpt._runtime.quiet import quiet
from flaxckpt._trees.layout import Layout
from flaxckpt._trees.leaf import Leaf
from flaxckpt._trees.owned_shards import is_shared
from flaxckpt._trees.ties import PyTree


def have_orbax_write_share(
    directory: Path,
    layout: Layout,
    leaves: list[Any],
    wait_for_others: Callable[[], None],
    *,
    is_database: bool,
    spreads: bool,
    compress: bool,
) -> None:
    """Have Orbax write this process's share of a tree, and process 0 the rest, too.

    Args:
        directory: The checkpoint; its directory of the tree exists.
        layout: The tree's layout.
        leaves: Its leaves.
        wait_for_others: Returns once the other processes have written their shares.
            Orbax calls it on a thread, and then merges the databases in process 0.
        is_database: Whether each process writes a database. If not, each writes the
            files of its shards.
        spreads: Whether each process that has a replica of an array writes a part of
            it. Orbax divides only arrays in some memories, so this must not be set if
            the processes have an array in different memories.
        compress: Whether Orbax compresses the arrays.
    """
    values = list(map(_as_orbax_takes_it, layout.as_stored.leaves, leaves))
    tree = layout.fill_for_orbax(values)
    context = orbax_context(is_database=is_database, compress=compress)
    context.multiprocessing.active_processes = {process_index()}
    # Without a database, each process writes the description of each array as well.
    context.multiprocessing.primary_host = LEADER if is_database else None
    context.array.saving.use_replica_parallel = spreads
    with calls_of_orbax(context), aliased(directory) as plain:
        begun = time.time_ns()
        # Orbax would have a process wait for process 0 to make it, up to ten minutes.
        (directory / STATE / ARRAYS_METADATA).mkdir(exist_ok=True)
        asyncio.run(_save(_Awaited(epath.Path(plain) / STATE, wait_for_others), tree))
        if process_index() == LEADER:
            _write_metadata(plain, begun)


def finish_shares(directory: Path, begun: int) -> None:
    """Merge the databases of all processes, and write Orbax's file on the whole.

    Args:
        directory: The checkpoint.
        begun: When the save began, in ns since 1970.
    """
    from orbax.checkpoint._src.serialization import ocdbt_utils, tensorstore_utils

    context = tensorstore_utils.get_ts_context(use_ocdbt=True)
    with quiet(), aliased(directory) as plain:
        state = epath.Path(plain) / STATE
        merged = ocdbt_utils.merge_ocdbt_per_process_files(
            state, context, use_zarr3=True, enable_validation=False
        )
        asyncio.run(merged)
        _write_metadata(plain, begun)


class _Awaited:
    """A directory that exists; what awaits its creation waits for other processes."""

    def __init__(self, path: epath.Path, wait: Callable[[], None]) -> None:
        self.path, self._wait = path, wait

    async def await_creation(self) -> epath.Path:
        # The handler awaits this once it has begun to write, and before it merges.
        await asyncio.to_thread(self._wait)
        return self.path


async def _save(directory: Any, tree: PyTree) -> None:
    await (await v1.handlers.PyTreeHandler().save(directory, tree))


def _as_orbax_takes_it(leaf: Leaf, value: Any) -> Any:
    """Convert a leaf for Orbax: an array of this process alone becomes a host array.

    Orbax takes no such array. Keys cannot be host arrays, so they
    become one array of all processes, which have equal values.
    """
    is_whole = isinstance(value, jax.Array) and not is_shared(value)
    if is_whole or isinstance(value, HostCopy):
        value = np.asarray(value)
    if leaf.kind == "key" and not is_shared(value):
        value = replicated(np.asarray(value))
    return with_key(leaf, value)


def _write_metadata(directory: Path, begun: int) -> None:
    """Write the file that tells which handler wrote the tree, as Orbax's `save` does.

    Args:
        directory: The checkpoint.
        begun: When the save began, in ns since 1970.
    """
    from orbax.checkpoint._src.metadata import step_metadata_serialization

    kind = v1.handlers.PyTreeHandler
    metadata = step_metadata_serialization.InternalCheckpointMetadata.create(
        handler_typestrs={STATE: f"{kind.__module__}.{kind.__qualname__}"},
        init_timestamp_nsecs=begun,
        commit_timestamp_nsecs=time.time_ns(),
    )
    (directory / ORBAX_FILE).write_text(json.dumps(metadata.serialize()))
