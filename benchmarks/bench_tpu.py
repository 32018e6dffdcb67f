"""What does the TPU compiler make of it?

A training scan, compiled ahead of time for whole pods, on a machine that has none: by
itself, with `step`, and with `step` and a `Snapshot`. What it sends to the host, which
collectives it has, and how much memory it takes on each chip, by the compiler's word.
Needs the extra `tpu`, and no TPU.
"""

import collections
import importlib.util
import os
import re
import sys

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no such server here
os.environ.setdefault("TPU_LOG_DIR", "disabled")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing to share

import harness
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import flaxckpt

TOPOLOGIES = {"v5e:4x4": (4, 4), "v6e:16x16": (16, 16), "v5p:8x8x16": (64, 16)}
KINDS = ("alone", "step", "snapshot")
LAYERS, WIDTH, STEPS = 4, 4096, 10
COLLECTIVES = re.compile(
    r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)"
    r"(?:-start)?\("
)
HOST = re.compile(
    r" (infeed|outfeed|send|recv)(?:-done)?\(|callback|is_host_transfer=t"
)


def compiled(topology, shape, kind):
    """Compile the scan for a topology.

    Its weights are sharded over both axes of a mesh, its data over one; its loss is a
    mean over all data, so that it is replicated.
    """
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    devices = np.array(described.devices).reshape(shape)
    mesh = Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def struct(shape, *spec, dtype=jnp.float32):
        sharding = NamedSharding(mesh, P(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    weights = [struct((WIDTH, WIDTH), "data", "model") for _ in range(LAYERS)]
    data = struct((STEPS, 64 * shape[0], WIDTH), None, "data")
    state = flaxckpt.CheckpointState.create("loss", save_best_only=True)
    state = jax.tree.map(lambda leaf: struct((), dtype=leaf.dtype), state)
    logs = {"loss": jax.ShapeDtypeStruct((), jnp.float32)}
    snapshot = jax.eval_shape(lambda: flaxckpt.Snapshot.like(weights, logs))
    places = [weights for _ in snapshot.trees]
    rest = jax.tree.map(lambda leaf: struct(leaf.shape, dtype=leaf.dtype), snapshot)
    snapshot = type(snapshot)(**{**vars(rest), "trees": tuple(places)})

    def train(weights, data, state, snapshot):
        def body(carry, batch):
            weights, state, snapshot, epoch = carry

            def loss_of(weights):
                x = batch
                for w in weights:
                    x = jnp.tanh(x @ w)
                return jnp.mean(x**2)

            loss, grads = jax.value_and_grad(loss_of)(weights)
            weights = jax.tree.map(lambda w, g: w - 0.1 * g, weights, grads)
            if kind != "alone":
                state, save = flaxckpt.step(state, {"loss": loss}, epoch)
            if kind == "snapshot":
                snapshot = snapshot.take(save, weights, {"loss": loss}, epoch)
            return (weights, state, snapshot, epoch + 1), loss

        carry = weights, state, snapshot, jnp.int32(0)
        (weights, state, snapshot, _), losses = jax.lax.scan(body, carry, data)
        kept = {"alone": (), "step": (state,), "snapshot": (state, snapshot)}
        return weights, losses, kept[kind]

    place = lambda tree: jax.tree.map(lambda leaf: leaf.sharding, tree)  # noqa: E731
    kept = {"alone": (), "step": (state,), "snapshot": (state, snapshot)}[kind]
    run = jax.jit(
        train,
        donate_argnums=(0, 2, 3),
        out_shardings=(
            place(weights),
            NamedSharding(mesh, P()),
            place(kept),
        ),
    )
    return run.lower(weights, data, state, snapshot).compile(), devices.size


def facts(topology, shape):
    """Return what the compiler says of each kind of scan, in bytes on each chip."""
    found = {}
    for kind in KINDS:
        program, chips = compiled(topology, shape, kind)
        text, memory = program.as_text(), program.memory_analysis()
        found[kind] = {
            "collectives": dict(collections.Counter(COLLECTIVES.findall(text))),
            "host": len(HOST.findall(text)),
            "bytes": memory.temp_size_in_bytes
            + memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes,
        }
    found["chips"] = chips
    found["shard_bytes"] = LAYERS * WIDTH * WIDTH * 4 // chips
    return found


def main() -> None:
    options = harness.arguments(__doc__)
    if importlib.util.find_spec("libtpu") is None:
        print("libtpu is not installed: pip install 'flaxckpt[tpu]'")
        return
    for topology, shape in TOPOLOGIES.items():
        if options.only not in topology:
            continue
        found = facts(topology, shape)
        alone = found["alone"]["bytes"]
        shard = found["shard_bytes"]
        results = {kind: [(found[kind]["bytes"] - alone) / 1024] for kind in KINDS} | {
            "(the sharded weights)": [shard / 1024]
        }
        chips = f"{found['chips']} chips ({topology})"
        title = f"Memory on each of {chips}, as the compiler tells"
        harness.report(title, "KiB", results, options.json)
        for kind in KINDS:
            entry = found[kind]
            there = ", ".join(
                f"{n} {k}" for k, n in sorted(entry["collectives"].items())
            )
            harness.note(
                f"{kind}: {there or 'no collectives'}; "
                f"{entry['host'] or 'no'} transfers to or from the host",
                options.json,
            )


if __name__ == "__main__":
    sys.exit(main())
