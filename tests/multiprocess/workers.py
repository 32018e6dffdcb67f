"""What the processes of a pod run; see `pod.py`.

python workers.py WORKER INDEX COUNT PORT DEVICES ARGUMENT...
"""

import contextlib
import faulthandler
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

import flaxckpt
from flaxckpt._copies.programs import Program

P = PartitionSpec


def say(*what):
    print("SAY", json.dumps(what[0] if len(what) == 1 else what), flush=True)


def mesh_of(*shape):
    return jax.make_mesh(shape, ("data", "model")[: len(shape)])


def place(value, mesh, *spec):
    value = np.asarray(value)
    sharding = NamedSharding(mesh, P(*spec))
    return jax.make_array_from_callback(value.shape, sharding, lambda at: value[at])


def values():
    """What is saved, as numpy arrays and Python numbers."""
    random = np.random.default_rng(0)
    return {
        "float32": random.normal(size=(16, 8)).astype(np.float32),
        "bfloat16": random.normal(size=(64, 160)).astype(jnp.bfloat16),
        "int8": random.integers(-128, 127, (8,), np.int8),
        "bool": random.integers(0, 2, (8, 8)).astype(bool),
        "replicated": random.normal(size=(5, 3)).astype(np.float32),
        "scalar": np.float32(2.5),
        "host": np.arange(500, dtype=np.int32),
        "number": 3,
        "text": "some",
    }


SPECS = {
    "4x2": {"float32": ("data", "model"), "bfloat16": (None, "data"),
            "int8": ("model",), "bool": ("data",), "replicated": (), "scalar": ()},
    "rows": {"float32": ("data",), "bfloat16": ("data", None), "int8": ("data",),
             "bool": (), "replicated": (), "scalar": ()},
    "columns": {"float32": (None, "data"), "bfloat16": (), "int8": (),
                "bool": (None, "data"), "replicated": (), "scalar": ()},
}  # fmt: skip


def tree_of(mesh, specs):
    plain = values()
    placed = {name: place(plain[name], mesh, *spec) for name, spec in specs.items()}
    make_key = jax.jit(
        lambda: jax.random.key(7), out_shardings=NamedSharding(mesh, P())
    )
    return {**plain, **placed, "key": make_key()}


def save_tree(directory):
    """Save a tree that is sharded over all devices, twice."""
    tree = tree_of(mesh_of(jax.device_count() // 2, 2), SPECS["4x2"])
    with flaxckpt.ModelCheckpoint(f"{directory}/{{epoch}}") as ckpt:
        for epoch in range(2):  # the first one is learnt from Orbax
            ckpt.save(tree, epoch, logs={"loss": 1.0})
        ckpt.wait()
        say([info.path.name for info in ckpt.checkpoints])


def save_in_ways(directory, setting, faulty="", process="0"):
    """Save three times, in one process with a fault of the direct way at the second."""
    from flaxckpt._direct import ocdbt, write

    tree = tree_of(mesh_of(jax.device_count() // 2, 2), SPECS["4x2"])
    settings = {"compress": {"compress": True}, "orbax": {"engine": "orbax"}}
    settings = settings.get(setting, {})
    if setting == "many":
        ocdbt.NODE_BYTES = 50  # so that any tree has too many keys
    original = getattr(write, faulty, None)

    def fail(*args, **kwargs):
        setattr(write, faulty, original)
        raise RuntimeError("injected")

    with (
        warnings.catch_warnings(record=True) as caught,
        flaxckpt.ModelCheckpoint(f"{directory}/{{epoch}}", **settings) as ckpt,
    ):
        warnings.simplefilter("always")
        for epoch in range(3):
            if epoch == 1 and faulty and jax.process_index() == int(process):
                setattr(write, faulty, fail)
            ckpt.save(tree, epoch, logs={"loss": 1.0})
            ckpt.wait()
    say(ckpt.counts.direct, ckpt.counts.by_orbax)
    say([str(each.message) for each in caught if "direct way" in str(each.message)])


def fail_as_it_finishes(directory, what):
    """Have process 0 fail at the second save, once all shares are written."""
    from flaxckpt._checkpoints import looks, share

    tree = tree_of(mesh_of(jax.device_count() // 2, 2), SPECS["4x2"])
    owner, name, error = {
        "merge": (share, "finish_shares", RuntimeError("injected")),
        "look": (looks, "_problem_of", None),
    }[what]
    original = getattr(owner, name)

    def fail(*args, **kwargs):
        setattr(owner, name, original)
        if error is not None:
            raise error
        return "injected"

    with flaxckpt.ModelCheckpoint(f"{directory}/{{epoch}}") as ckpt:
        for epoch in range(3):
            if epoch == 1 and jax.process_index() == 0:
                setattr(owner, name, fail)
            try:
                ckpt.save(tree, epoch, logs={"loss": 1.0})
                ckpt.wait()
            except flaxckpt.CheckpointError as told:
                say(epoch, str(told))
    say(ckpt.counts.direct, ckpt.counts.by_orbax)


def count_steps(directory):
    """Save by global steps; fail where the processes do not give the same one."""
    step, tree = make_step(mesh_of(jax.device_count() // 2, 2))
    for runs in range(2):
        with flaxckpt.ModelCheckpoint(f"{directory}/{{step}}", save_freq=3) as ckpt:
            tree, state, start = ckpt.resume(tree)
            for at in range(start, 8 + 4 * runs):
                tree, loss = step(tree)
                state = ckpt.update(state, tree, {"loss": loss}, step=at)
        say([info.path.name for info in ckpt.checkpoints], int(start))
    with flaxckpt.ModelCheckpoint(f"{directory}/{{step}}") as ckpt:
        try:
            ckpt.save(tree, step=20 + jax.process_index())
            ckpt.wait()
        except flaxckpt.CheckpointError as error:
            say(str(error))


def count_stale(directory, save_best_only):
    """Say the stale checks of a loop that stops and goes on, metrics on all devices."""
    mesh, losses = mesh_of(jax.device_count()), [0.5, 0.4, 0.6, 0.45, 0.3, 0.3]
    mean = jax.jit(jnp.mean)
    settings = (
        {"save_best_only": True, "save_last": True} if int(save_best_only) else {}
    )
    counted = []
    for until in (3, len(losses)):
        path = f"{directory}/{{epoch}}"
        with flaxckpt.ModelCheckpoint(path, "loss", **settings) as ckpt:
            tree = {"w": place(np.ones(8, np.float32), mesh, "data")}
            tree, state, start = ckpt.resume(tree)
            for epoch in range(start, until):
                tree = {
                    "w": jax.jit(lambda w, loss: w * 0 + loss)(tree["w"], losses[epoch])
                }
                state = ckpt.update(state, tree, {"loss": mean(tree["w"])}, epoch)
                counted.append(int(state.stale))
    say(counted)


def learn_nothing(directory, process):
    """Have one process not know what Orbax has written."""
    from flaxckpt._direct import forms

    if jax.process_index() == int(process):
        forms.learn_share = lambda *args, **kwargs: None
    mesh = mesh_of(jax.device_count() // 2, 2)
    tree = {"replica": place(np.arange(64.0, dtype=np.float32).reshape(8, 8), mesh)}
    with flaxckpt.ModelCheckpoint(f"{directory}/{{epoch}}") as ckpt:
        for epoch in range(3):
            try:
                ckpt.save(tree, epoch)
                ckpt.wait()
            except flaxckpt.CheckpointError as told:
                say(epoch, str(told))
        say(ckpt.counts.direct, ckpt.counts.by_orbax)


def save_first(directory, way):
    """Save into the memory that was claimed ahead, and compile nothing for it."""
    mesh = mesh_of(jax.device_count())
    own, compiled = threading.get_ident(), []

    def listen(event, *_, **__):
        if event.endswith("backend_compile_duration") and threading.get_ident() == own:
            compiled.append(event)

    def tree_of(epoch):
        tree = {
            f"w{i}": place(np.full(4096 * 8, i + epoch, np.float32), mesh, "data")
            for i in range(3)
        }
        with jax.enable_x64(True):
            tree["wide"] = place(np.arange(8) + (epoch << 40), mesh, "data")
        tree["replicated"] = place(np.full(9, epoch, np.int8), mesh)
        tree["number"] = epoch
        if way == "own values":
            tree["own"] = jnp.full(5, epoch, jnp.int8)
        return tree

    def where(copies):
        large = [each for each in copies.arrays if each.size > 4096]
        shards = [shard for each in large for shard in each.addressable_shards]
        return sorted(shard.data.unsafe_buffer_pointer() for shard in shards)

    def wait_for_compiler():
        for thread in threading.enumerate():
            if "flaxckpt-compile" in thread.name:
                thread.join(60)

    if way == "resumed":
        with flaxckpt.ModelCheckpoint(f"{directory}/{{epoch}}") as ckpt:
            ckpt.save(tree_of(7), 0)
    settings = {"save_best_only": True} if way in ("best", "late best") else {}
    with flaxckpt.ModelCheckpoint(f"{directory}/{{epoch}}", "loss", **settings) as ckpt:
        with jax.enable_x64(True):
            queue = ckpt._saves.queue
            ckpt.restore(tree_of(0))
            assert queue._thread is None  # a program may only read
            called, refill = [], Program.refill
            Program.refill = lambda *given: called.append(given[0]) or refill(*given)
            _, state, _ = ckpt.resume(tree_of(0))
            assert queue._thread.is_alive()
        wait_for_compiler()
        Program.refill = refill
        lent = ckpt._saves._parts.ahead.blank._copies
        assert len(called) == len({each.program for each in lent.plan.batches})
        before = where(lent)
        jax.monitoring.register_event_duration_secs_listener(listen)
        for epoch in range(3):
            loss = 3.0 - epoch
            if way == "late best" and epoch == 0:
                loss = np.nan
            if way in ("metric", "best"):
                loss = place(np.float32(loss), mesh)
            tree, number = tree_of(epoch), len(compiled)
            state = ckpt.update(state, tree, {"loss": loss}, epoch)
            number = len(compiled) - number
            ckpt.wait()
            wait_for_compiler()
            if np.isfinite(loss).all():
                say(where(queue._memory[0]) == before, number)
        assert lent.is_blank
        assert lent.arrays[0].is_deleted()
        assert ckpt._saves._parts.ahead.blank.take() is None
        with jax.enable_x64(True):
            found = ckpt.restore(tree_of(0)).tree
            for name, leaf in tree_of(2).items():
                assert jnp.array_equal(found[name], leaf), name
                assert np.result_type(found[name]) == np.result_type(leaf), name


def restore_tree(directory, *ways):
    """Restore it, in each way that it is to be sharded here, and compare all values."""
    for specs in ways:
        _restore_as(directory, specs)
        say("same")


def _restore_as(directory, specs):
    like = tree_of(mesh_of(jax.device_count()), SPECS[specs])
    with flaxckpt.ModelCheckpoint(f"{directory}/{{epoch}}") as ckpt:
        tree = ckpt.restore(like).tree
    for name, value in values().items():
        found = tree[name]
        if isinstance(found, jax.Array):
            assert found.sharding == like[name].sharding, name
            for shard in found.addressable_shards:
                same = np.asarray(shard.data) == value[shard.index]
                assert same.all(), name
        else:
            assert np.array_equal(found, value), name
        assert getattr(found, "dtype", None) == getattr(value, "dtype", None), name
    data = jax.random.key_data(tree["key"]).addressable_data(0)
    assert (np.asarray(data) == jax.random.key_data(jax.random.key(7))).all()


def save_names(directory):
    """Save and restore leaves whose names no file has."""
    names = ("/x", "x", "x/", "../up", "a.b", "a", "", "_METADATA", "L" * 300)
    mesh = mesh_of(jax.device_count())
    tree = {
        name: {"b": place(np.arange(8.0) + i, mesh, "data"), "text~": f"some{i}"}
        for i, name in enumerate(names)
    }
    with flaxckpt.ModelCheckpoint(f"{directory}/{{epoch}}") as ckpt:
        for epoch in range(2):
            ckpt.save(tree, epoch)
        ckpt.wait()
        found = ckpt.restore(tree).tree
    for name, leaves in tree.items():
        check_same(found[name]["b"], leaves["b"])
        assert found[name]["text~"] == leaves["text~"], name
    say("same")


def offload_tree(directory, kind):
    """Save a tree that is in the host's memory, and restore it to there."""
    mesh, plain = mesh_of(jax.device_count() // 2, 2), values()
    tree = tree_of(mesh, SPECS["4x2"])
    for name, spec in SPECS["4x2"].items():
        sharding = NamedSharding(mesh, P(*spec), memory_kind=kind)
        value = np.asarray(plain[name])
        tree[name] = jax.make_array_from_callback(
            value.shape, sharding, lambda at, value=value: value[at]
        )
    with flaxckpt.ModelCheckpoint(f"{directory}/{{epoch}}") as ckpt:
        for epoch in range(2):
            ckpt.save(tree, epoch)
        found = ckpt.restore(tree)
    for name in SPECS["4x2"]:
        assert found.tree[name].sharding == tree[name].sharding, name
        assert found.tree[name].sharding.memory_kind == kind, name
    say(found.epoch)
    restore_tree(directory, "rows")


def make_step(mesh):
    """Make a training step: all devices have a part in the loss."""

    @jax.jit
    def step(tree):
        w = tree["w"] * jnp.float32(0.9) + tree["v"]
        return {"w": w, "v": tree["v"]}, jnp.sum(w * w)

    w = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    return step, {
        "w": place(w, mesh, "data", "model"),
        "v": place(np.zeros(64, np.float32), mesh, "model"),
    }


def train(directory, epochs, pause="0", **settings):
    """Train, saving the best, from wherever an earlier run has got to."""
    mesh = mesh_of(jax.device_count() // 2, 2)
    step, tree = make_step(mesh)
    with flaxckpt.ModelCheckpoint(
        f"{directory}/{{epoch:03d}}",
        "loss",
        save_best_only=True,
        mode="min",
        max_to_keep=2,
        **{"timeout_secs": 20, **settings},
    ) as ckpt:
        found = ckpt.restore(tree)
        state, first = ckpt.init(), 0
        if found:
            tree, state, first = found.tree, found.state, found.epoch + 1
        say("starts at", first)
        for epoch in range(first, int(epochs)):
            tree, loss = step(tree)
            state = ckpt.update(state, tree, {"loss": loss}, epoch)
            time.sleep(float(pause))
            if epoch % 4 == 3:
                ckpt.wait()
                say("on disk", epoch)
        ckpt.wait()
        say("best", float(state.best), ckpt.best.path.name)
        shards = [
            np.asarray(shard.data).tobytes() for shard in tree["w"].addressable_shards
        ]
        say("ends", float(loss), _sum(shards))


def _sum(shards):
    return int(np.frombuffer(b"".join(shards), np.uint32).astype(np.uint64).sum())


def train_until_told(directory):
    """Train until one of the processes is told to end."""
    mesh = mesh_of(jax.device_count() // 2, 2)
    step, tree = make_step(mesh)
    with flaxckpt.ModelCheckpoint(
        f"{directory}/{{epoch}}", "loss", mode="min", save_freq=1000,
        save_on_preemption=True, timeout_secs=20,
    ) as ckpt:  # fmt: skip
        state = ckpt.init()
        for batch in range(100_000):
            tree, loss = step(tree)
            try:
                state = ckpt.update(state, tree, {"loss": loss}, 0, batch)
            except flaxckpt.Preempted as told:
                say("preempted", batch, os.path.basename(told.path))
                return
            loss.block_until_ready()
            if batch == 20:
                say("runs")


def donate_at_once(directory, *kinds):
    """Donate each tree right after `update`, and compare what was saved with a twin."""
    names = "float32", "bfloat16", "int8", "replicated"
    mesh, index = mesh_of(jax.device_count() // 2, 2), jax.process_index()
    beside = {"host": np.arange(3.0), "text": "b"}
    if kinds[0] == kinds[1]:  # arrays on other devices would be decided on the host
        beside["local"] = jnp.arange(3.0)

    def make():
        return {
            name: place(values()[name], mesh, *SPECS["4x2"][name]) for name in names
        }

    def step(tree, loss):
        new = {name: x + jnp.ones((), x.dtype) for name, x in tree.items()}
        return new, loss + 0 * new["float32"].sum()

    donate, keep = jax.jit(step, donate_argnums=0), jax.jit(step)
    tree, twin, twins = make(), make(), {}
    with flaxckpt.ModelCheckpoint(
        f"{directory}/{{epoch}}",
        "loss",
        save_best_only=True,
        save_last=True,
        snapshot=kinds[index],
        timeout_secs=20,
    ) as ckpt:
        state, at = ckpt.init(), 0
        for epoch, value in enumerate(np.float32([3, 2, 4, 1])):
            tree, loss = donate(tree, value)
            if kinds[index] == "host" and epoch:  # nobody held on to what was donated
                assert tree["float32"].addressable_data(0).unsafe_buffer_pointer() == at
            twin, _ = keep(twin, value)
            twins[str(epoch + 1)] = twin
            logs = {"loss": loss, "negative": -loss}
            state = ckpt.update(state, {**tree, **beside}, logs, epoch)
            at = tree["float32"].addressable_data(0).unsafe_buffer_pointer()
        ckpt.wait()
        assert [info.logs["negative"] for info in ckpt.checkpoints] == [-3, -2, -1]
        saved = [info.path.name for info in ckpt.checkpoints]
        for name in saved:
            found = ckpt.restore({**tree, **beside}, f"{directory}/{name}").tree
            assert found.pop("text") == "b"
            for each in beside.keys() & found.keys():
                assert (np.asarray(found.pop(each)) == np.arange(3)).all()
            jax.tree.map(check_same, found, twins[name])
        say(saved, float(state.best))


def check_same(one, other):
    """Check that the shards that are here are the same bit for bit."""
    pairs = zip(one.addressable_shards, other.addressable_shards, strict=True)
    for found, wanted in pairs:
        assert np.asarray(found.data).tobytes() == np.asarray(wanted.data).tobytes()


def differ(directory, kind):
    """Pass metrics that are not the same in all processes."""
    mesh = mesh_of(jax.device_count() // 2, 2)
    step, tree = make_step(mesh)
    index, values = jax.process_index(), [1.0, 0.5, 0.25, 0.125]
    ckpt = flaxckpt.ModelCheckpoint(
        f"{directory}/{{epoch}}", "loss", save_best_only=True, timeout_secs=20
    )
    state = ckpt.init()
    for epoch in range(4):
        tree, _ = step(tree)
        loss = values[epoch]
        if epoch == 2:
            if kind == "host":
                loss = loss + index  # one improves, the others do not
            elif kind == "device":
                loss = jnp.float32(loss) * (1 + index)  # all improve
            elif kind == "nan":
                loss = float("nan") if index else loss
        try:
            state = ckpt.update(state, tree, {"loss": loss}, epoch)
        except flaxckpt.CheckpointError as error:
            say(type(error).__name__, epoch, str(error))
            break
    ckpt.close()
    say([info.path.name for info in ckpt.checkpoints])


def fail_early(directory, kind):
    """Fail in one process, before it has looked at the tree; then go on."""
    mesh = mesh_of(jax.device_count() // 2, 2)
    step, tree = make_step(mesh)
    index = jax.process_index()
    ckpt = flaxckpt.ModelCheckpoint(
        f"{directory}/{{epoch}}", "loss", save_best_only=True, timeout_secs=300
    )
    state = ckpt.init()
    for epoch in range(4):
        tree, _ = step(tree)
        logs = {"loss": 1.0 - epoch / 10}
        if epoch == 1 and index == 1:
            logs = {"loss": np.ones(2)} if kind == "metric" else "no logs"
        try:
            state = ckpt.update(state, tree, logs, epoch)
        except flaxckpt.CheckpointError as error:
            say(epoch, type(error).__name__, str(error))
    ckpt.close()
    say([info.path.name for info in ckpt.checkpoints])


def stay_away(directory):
    """Leave one process out of a call."""
    mesh = mesh_of(jax.device_count() // 2, 2)
    step, tree = make_step(mesh)
    ckpt = flaxckpt.ModelCheckpoint(f"{directory}/{{epoch}}", timeout_secs=3)
    for epoch in range(2):
        tree, _ = step(tree)
        if epoch == 0 or jax.process_index() == 0:
            ckpt.save(tree, epoch)
        if epoch == 0:
            ckpt.wait()
    if jax.process_index() == 0:
        start = time.monotonic()
        try:
            ckpt.wait()
        except flaxckpt.CheckpointError as error:
            say(str(error), time.monotonic() - start < 10)
    multihost_utils.sync_global_devices("all are here")
    say([info.path.name for info in ckpt.checkpoints])


def own_values(index):
    """Values that differ between processes, of each kind of leaf."""
    return {
        "array": np.arange(3, dtype=np.int64) + 10**12 * index,
        "scalar": np.float16(index),
        "number": -index,
        "fraction": index / 3,
        "complex": complex(index, 1),
        "flag": bool(index % 2),
        "text": "é" * 50 * index,
        "bytes": b"\xff" * 70 * index,
        "local": jnp.arange(2, dtype=jnp.bfloat16) + index,
        "key": jax.random.key(index),
    }


def keep_own(directory, names="all"):
    """Save, and restore, values that each process has for itself."""
    index = jax.process_index()
    mesh = mesh_of(jax.device_count() // 2, 2)
    tree = {"own": own_values(index), **tree_of(mesh, SPECS["4x2"])}

    def is_own(path, leaf):
        return path[0] == "own" and (names == "all" or path[1] in names.split(","))

    settings = {"per_process": is_own, "save_last": True, "timeout_secs": 20}
    with flaxckpt.ModelCheckpoint(f"{directory}/{{epoch}}", **settings) as ckpt:
        try:
            for epoch in range(2):
                ckpt.save(tree, epoch)
                ckpt.wait()
        except flaxckpt.CheckpointError as error:
            say(str(error))
            return
        check_own(ckpt.restore(tree).tree["own"], index)
        check_own(flaxckpt.load(f"{directory}/2")["own"], index)
    say("same")


def load_own(directory):
    """Load values that other processes had for themselves."""
    with warnings.catch_warnings(record=True) as caught:
        try:
            found = flaxckpt.load(f"{directory}/2")
        except flaxckpt.CheckpointError as error:
            say(str(error))
            return
    check_own(found["own"], 0)
    say([str(each.message) for each in caught])


def check_own(found, index):
    wanted = own_values(index)
    assert jax.random.key_data(found.pop("key")).tolist() == [0, index]
    wanted.pop("key")
    for name, value in wanted.items():
        assert type(found[name]) is type(value), name
        assert getattr(found[name], "dtype", 0) == getattr(value, "dtype", 0), name
        assert np.array_equal(found[name], value), name


def meet(directory):
    """Say at which call of update all processes are told that they cannot save."""
    mesh = mesh_of(jax.device_count() // 2, 2)
    step, tree = make_step(mesh)
    ckpt = flaxckpt.ModelCheckpoint(f"{directory}/{{epoch}}", save_freq=10)
    state = ckpt.init()
    for batch in range(5):
        tree, loss = jax.block_until_ready(step(tree))
        try:
            state = ckpt.update(state, tree, {"loss": loss}, 0, batch)
        except flaxckpt.CheckpointError as error:
            say(batch, str(error))
            return


def lose_the_mount(directory):
    """Have one process see another directory from the second save on."""
    mesh = mesh_of(jax.device_count() // 2, 2)
    step, tree = make_step(mesh)
    ckpt = flaxckpt.ModelCheckpoint(f"{directory}/{{epoch}}", timeout_secs=20)
    for epoch in range(2):
        tree, _ = step(tree)
        ckpt.save(tree, epoch)
        try:
            ckpt.wait()
        except flaxckpt.CheckpointError as error:
            say(epoch, str(error))
        if jax.process_index() == 1:
            subprocess.run(["mount", "-t", "tmpfs", "none", directory], check=True)
    say([ckpt.counts.saved])


def restore_blind(directory):
    """Restore where one process does not see the checkpoints."""
    mesh = mesh_of(jax.device_count() // 2, 2)
    _, tree = make_step(mesh)
    with flaxckpt.ModelCheckpoint(f"{directory}/{{epoch}}") as ckpt:
        ckpt.save(tree, 0)
    if jax.process_index() == 1:
        subprocess.run(["mount", "-t", "tmpfs", "none", directory], check=True)
    with flaxckpt.ModelCheckpoint(f"{directory}/{{epoch}}") as ckpt:
        try:
            ckpt.restore(tree)
        except flaxckpt.CheckpointError as error:
            say(type(error).__name__, str(error))


def be_slow(directory, slow, what):
    """Save while one process takes far longer than the time-out, but is alive."""
    from flaxckpt._pods import joint_saves

    mesh = mesh_of(jax.device_count() // 2, 2)
    step, tree = make_step(mesh)
    settings = {"timeout_secs": 2, "max_to_keep": 1}
    with flaxckpt.ModelCheckpoint(f"{directory}/{{epoch}}", **settings) as ckpt:
        owner = joint_saves if what == "share" else ckpt._series.area
        name = {"share": "write_share"}.get(what, what)
        done = getattr(owner, name)

        def late(*args, **kwargs):
            time.sleep(7)
            return done(*args, **kwargs)

        if jax.process_index() == int(slow):
            setattr(owner, name, late)
        for epoch in range(2):
            tree, loss = step(tree)
            ckpt.save(tree, epoch, logs={"loss": loss})
        ckpt.wait()
    say(ckpt.counts.saved)


def be_mute(directory, when):
    """Save while process 0 takes far longer than the time-out, and gives no sign."""
    from flaxckpt._checkpoints import together

    mesh = mesh_of(jax.device_count() // 2, 2)
    _, tree = make_step(mesh)
    ckpt = flaxckpt.ModelCheckpoint(f"{directory}/{{epoch}}", timeout_secs=2)
    if jax.process_index() == 0:
        owner, name = {
            "before": (together, "finish"), "after": (ckpt._series.area, "commit"),
        }[when]  # fmt: skip
        done = getattr(owner, name)

        def late(*args, **kwargs):
            time.sleep(7)
            return done(*args, **kwargs)

        setattr(owner, name, late)
        ckpt._saves._joint._channel.at_work = contextlib.nullcontext
    try:
        ckpt.save(tree, 0)
        ckpt.wait()
    except flaxckpt.CheckpointError as error:
        say(str(error))
    say(ckpt.counts.saved, [info.epoch for info in ckpt.checkpoints])


def be_stopped(directory):
    """Save again and again; say what each process is told."""
    faulthandler.dump_traceback_later(45)
    from jax._src import distributed

    mesh = mesh_of(jax.device_count() // 2, 2)
    _, tree = make_step(mesh)
    ckpt = flaxckpt.ModelCheckpoint(f"{directory}/{{epoch}}", timeout_secs=2)
    for epoch in range(1000):  # without steps, in which the others would wait
        try:
            ckpt.save(tree, epoch)
            ckpt.wait()
        except flaxckpt.CheckpointError as error:
            say("failed", epoch, str(error))
            break
        if epoch == 2:
            say("saves")
    distributed.global_state.client.wait_at_barrier("all are here", 60_000)
    say("saved", [info.epoch for info in ckpt.checkpoints][-1])


def run_out_of_room(directory):
    """Have the system refuse to write large files in one of the processes, once."""
    mesh = mesh_of(jax.device_count() // 2, 2)
    rows = 1024 * mesh.shape["data"]
    tree = {"w": place(np.ones((rows, 512), np.float32), mesh, "data", "model")}
    with flaxckpt.ModelCheckpoint(f"{directory}/{{epoch}}", timeout_secs=20) as ckpt:
        for epoch in range(4):
            limit = (
                2**16
                if (epoch, jax.process_index()) == (1, 1)
                else resource.RLIM_INFINITY
            )
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                ckpt.save(tree, epoch)
                ckpt.wait()
            except flaxckpt.CheckpointWriteError as error:
                say("failed", epoch, error.cause)
        say([info.path.name for info in ckpt.checkpoints])


def fill_a_disk(url, directory):
    """Have no room left where one of the processes writes its share, once."""
    mesh = mesh_of(jax.device_count(), 1)
    tree = {"w": place(np.ones((16 * 1024, 512), np.float32), mesh, "data")}
    filler = Path(directory, "filler")
    with flaxckpt.ModelCheckpoint(f"{url}/{{epoch}}", timeout_secs=20) as ckpt:
        for epoch in range(3):
            if (epoch, jax.process_index()) == (1, 1):
                filler.write_bytes(bytes(shutil.disk_usage(directory).free - 2**20))
            try:
                ckpt.save(tree, epoch)
                ckpt.wait()
            except flaxckpt.CheckpointWriteError as error:
                say("failed", epoch, error.path, error.cause)
            filler.unlink(missing_ok=True)
        say([info.path.name for info in ckpt.checkpoints])


def save_by_hand(directory):
    """Save by hand what is worse than what is there, again and again."""
    mesh = mesh_of(jax.device_count(), 1)

    def tree_of(value):
        return {"w": place(np.full(64, value, np.float32), mesh, "data")}

    path = f"{directory}/best"
    with flaxckpt.ModelCheckpoint(path, "loss", save_best_only=True) as ckpt:
        state = ckpt.update(ckpt.init(), tree_of(0.2), {"loss": 0.2}, 0)
        ckpt.wait()
        for epoch, value in enumerate([0.7, 0.8], start=1):
            ckpt.save(tree_of(value), epoch, logs={"loss": value})
            ckpt.wait()
            found = [ckpt.restore(tree_of(0), which=w) for w in (path, "best")]
            values = [float(each.tree["w"].addressable_data(0)[0]) for each in found]
            say(np.float32(values).round(3).tolist(), len(ckpt.checkpoints))
        state = ckpt.update(state, tree_of(0.1), {"loss": 0.1}, 4)
        ckpt.wait()
        say([info.logs["loss"] for info in ckpt.checkpoints])


def train_by_the_clock(directory):
    """Train until three checkpoints are due by clocks that differ, as the speeds do."""
    from flaxckpt._processes.clock import AgreedInterval
    from flaxckpt._processes.messages import Channel

    mesh = mesh_of(jax.device_count() // 2, 2)
    step, tree = make_step(mesh)
    index = jax.process_index()
    with flaxckpt.ModelCheckpoint(
        f"{directory}/{{batch}}", "loss", save_interval_secs=0.2, timeout_secs=20
    ) as ckpt:

        def clock():
            return time.monotonic() * (1 + 9 * index) + 1e6 * index

        ckpt._triggers.interval = AgreedInterval(0.2, clock, channel=Channel("skewed"))
        state, saved = ckpt.init(), {}
        for batch in range(1_000_000):
            tree, loss = step(tree)
            state = ckpt.update(state, tree, {"loss": loss}, 0, batch)
            if ckpt._triggers.interval._calls == 0:
                shard = tree["w"].addressable_data(0)
                saved[str(batch + 1)] = np.asarray(shard).tobytes()
                if len(saved) == 3:
                    break
            loss.block_until_ready()  # on CPU, JAX itself hangs without
            if index == (batch // 50) % 2:  # now the one is behind, now the other
                time.sleep(0.002)
        ckpt.wait()
        say(list(saved), [info.path.name for info in ckpt.checkpoints])
        for name, wanted in saved.items():
            found = ckpt.restore(tree, f"{directory}/{name}").tree["w"]
            assert np.asarray(found.addressable_data(0)).tobytes() == wanted
        say("same")


def count_messages(directory, **settings):
    """Say how many messages are sent where nothing is due, and where something is."""
    from jax._src import distributed

    mesh = mesh_of(jax.device_count() // 2, 2)
    step, tree = make_step(mesh)
    sent = []

    class Counted:
        """The client, of which every call is noted."""

        def __init__(self, client):
            self._client = client

        def __getattr__(self, name):
            sent.append(name)
            return getattr(self._client, name)

    distributed.global_state.client = Counted(distributed.global_state.client)
    with flaxckpt.ModelCheckpoint(
        f"{directory}/{{epoch}}", save_freq=10, **settings
    ) as ckpt:
        state = ckpt.init()
        for batch in range(19):
            tree, loss = step(tree)
            state = ckpt.update(state, tree, {"loss": loss}, 0, batch)
            if batch == 0:  # at the first call, all processes meet
                sent.clear()
            if batch == 8:
                say(len(sent))
            if batch == 9:
                ckpt.wait()
                before = len(sent)
        say(len(sent) - before, before > 0)


def count_meetings(directory):
    """Do that where the clock counts, too, and shows nothing yet."""
    count_messages(directory, save_interval_secs=1e6)


def fail_as_leader():
    """Say what each process is told where process 0 fails before it has an answer."""
    from flaxckpt._processes.messages import from_leader

    def fail():
        raise PermissionError(13, "Permission denied", "runs")

    try:
        from_leader("test", fail)
    except (OSError, flaxckpt.CheckpointError) as error:
        say(type(error).__name__, str(error))


def refuse(directory):
    """Pass the arguments that work in one process only."""
    for name, value in {
        "max_in_flight": 2,
        "frozen": jax.Array,
    }.items():
        try:
            flaxckpt.ModelCheckpoint(f"{directory}/last", **{name: value})
        except flaxckpt.SettingError as error:
            say(error.name)
    flaxckpt.ModelCheckpoint(f"{directory}/last", max_in_flight=1).close()


def trace(directory):
    """Call update within jit, where several processes cannot."""
    mesh = mesh_of(jax.device_count() // 2, 2)
    step, tree = make_step(mesh)
    ckpt = flaxckpt.ModelCheckpoint(f"{directory}/best", "loss", save_best_only=True)

    def body(carry, epoch):
        tree, state = carry
        tree, loss = step(tree)
        return (tree, ckpt.update(state, tree, {"loss": loss}, epoch)), loss

    try:
        jax.lax.scan(body, (tree, ckpt.init()), jnp.arange(3))
    except flaxckpt.CheckpointError as error:
        say(str(error))


def keep_the_better(directory):
    """Save the best of three runs at one path, none of which restores."""
    mesh = mesh_of(jax.device_count() // 2, 2)
    _, tree = make_step(mesh)
    decide = jax.jit(lambda tree, loss: loss + 0 * tree["w"].sum())
    warnings.simplefilter("ignore", UserWarning)
    for losses in ([0.2], [0.75, 0.5], [0.125]):
        with flaxckpt.ModelCheckpoint(
            f"{directory}/best", "loss", save_best_only=True, timeout_secs=20
        ) as ckpt:
            state = ckpt.init()
            for epoch, loss in enumerate(losses):
                logs = {"loss": decide(tree, np.float32(loss))}
                state = ckpt.update(state, tree, logs, epoch)
            ckpt.wait()
        shown = {info.path.name: info.logs["loss"] for info in ckpt.checkpoints}
        say(shown, float(ckpt.restore(tree, "best").state.best))


def call_hooks(directory):
    """Have functions called, of which one fails at the first save; mark the end."""
    seen = []

    def fail(info):
        if info.epoch == 0:
            raise ValueError("boom")

    hooks = [seen.append, fail]
    with flaxckpt.ModelCheckpoint(f"{directory}/{{epoch}}", on_saved=hooks) as ckpt:
        ckpt.save({"w": np.ones(3)}, 0)
        try:
            ckpt.wait()
        except flaxckpt.HookError as error:
            say("failed", error.cause)
        ckpt.save({"w": np.ones(3)}, 1)
        ckpt.wait()
        assert seen in ([], [*ckpt.checkpoints])
        ckpt.finish()
        say(len(seen), ckpt.counts.saved, ckpt.counts.failed)


def main(workers):
    """Run the worker that the command line names.

    Args:
        workers: The workers, by name.
    """
    worker, index, count, port, devices, *arguments = sys.argv[1:]
    faulthandler.dump_traceback_later(110, exit=True)  # tells where it hangs
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_num_cpu_devices", int(devices))
    if int(count) > 1:
        jax.distributed.initialize(
            f"localhost:{port}",
            int(count),
            int(index),
            heartbeat_timeout_seconds=10,
            shutdown_timeout_seconds=20,
        )
    workers[worker](*arguments)


if __name__ == "__main__":
    main(globals())
