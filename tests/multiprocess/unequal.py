"""Workers for what one process has or meets alone; see `pod.py`."""

import os
import signal
import time
import warnings

import jax
import numpy as np
import pytest
import workers
from jax.sharding import NamedSharding, PartitionSpec
from workers import place, say

import flaxckpt
from flaxckpt._pods import joint_saves
from flaxckpt._pods.saves import PodSaver

SIZE = 4  # elements of each device


def mesh_of_all():
    return jax.make_mesh((jax.device_count(),), ("data",))


def sharded(mesh):
    return place(np.arange(jax.device_count() * SIZE, dtype=np.float32), mesh, "data")


def replicated(mesh, make):
    """Return an array that claims to be replicated, made anew for each device."""
    sharding = NamedSharding(mesh, PartitionSpec())
    parts = [
        jax.device_put(make(device.id), device)
        for device in sorted(sharding.addressable_devices, key=lambda each: each.id)
    ]
    shape = np.shape(parts[0])
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def save_replicas(directory, differing):
    """Save arrays whose replicas differ between processes, devices, or not at all."""
    mesh = mesh_of_all()
    number = {
        "processes": lambda device: jax.process_index(),
        "devices": lambda device: device,
        "none": lambda device: 0,
    }[differing]
    make = lambda device: np.arange(64, dtype=np.float32) + number(device) / 8  # noqa: E731
    tree = {"w": sharded(mesh), "statistics": replicated(mesh, make)}
    with flaxckpt.ModelCheckpoint(f"{directory}/{{epoch}}") as ckpt:
        for epoch in range(3):
            ckpt.save(tree, epoch)
    say(ckpt.counts.direct)
    found = ckpt.restore(tree).tree["statistics"]
    say([np.asarray(part.data).tolist() for part in found.addressable_shards])


def save_two_of_a_name(directory):
    """Save two leaves whose paths read alike; the first one differs."""
    index, mesh = jax.process_index(), mesh_of_all()
    tree = {"w": sharded(mesh), "a": {"b": np.arange(3) + index}, "a/b": np.arange(3)}
    ckpt = flaxckpt.ModelCheckpoint(f"{directory}/{{epoch}}")
    ckpt.save(tree, 0)
    try:
        ckpt.wait()
    except flaxckpt.CheckpointError as error:
        say(str(error))


def save_texts(directory, kind):
    """Save texts of each process whose lengths change, and restore the last ones."""
    index, mesh = jax.process_index(), mesh_of_all()
    texts = ["x" * (3 + 2 * epoch + index) for epoch in range(6)]
    if kind == "bytes":
        texts = [text.encode() for text in texts]
    with flaxckpt.ModelCheckpoint(
        f"{directory}/{{epoch}}", per_process=lambda path, leaf: path != ("w",)
    ) as ckpt:
        for epoch, text in enumerate(texts):
            ckpt.save({"w": sharded(mesh), "text": text}, epoch)
            ckpt.wait()
    found = ckpt.restore({"w": sharded(mesh), "text": texts[0]}).tree["text"]
    say(ckpt.counts.direct, found == texts[-1])


def save_integers(directory):
    """Save integers of each process, small in one and large in the other."""
    index, mesh = jax.process_index(), mesh_of_all()
    pairs = [(7, 2**63 + 2), (2**64, -7), (2**100, 2**100 + 1), (-(2**90), 0), (3, 4)]
    own = {f"n{at}": pair[index] for at, pair in enumerate(pairs)}
    generator = np.random.default_rng(index)
    own["generator"] = generator.bit_generator.state
    with flaxckpt.ModelCheckpoint(
        f"{directory}/{{epoch}}", per_process=lambda path, leaf: path[0] == "own"
    ) as ckpt:
        for epoch in range(2):
            ckpt.save({"w": sharded(mesh), "own": own}, epoch)
            ckpt.wait()
    like = {"w": sharded(mesh), "own": jax.tree.map(lambda leaf: type(leaf)(), own)}
    say(ckpt.restore(like).tree["own"] == own, ckpt.counts.direct)


def train_on_grain(directory, stop):
    """Train with a Grain iterator of each process; say which examples it has seen."""
    import grain

    index, mesh = jax.process_index(), mesh_of_all()
    data = grain.MapDataset.range(20)[index :: jax.process_count()]
    batches = iter(data.shuffle(seed=5).repeat().batch(3).to_iter_dataset())
    seen = []
    with flaxckpt.ModelCheckpoint(
        f"{directory}/{{step}}",
        save_freq=1,
        per_process=lambda path, leaf: path == ("data",),
    ) as ckpt:
        tree = {"w": sharded(mesh), "data": batches}
        tree, state, start = ckpt.resume(tree)
        for step in range(start, int(stop)):
            seen.append(next(batches).tolist())
            state = ckpt.update(state, tree, {}, step=step)
    say(int(start), seen, tree["data"] is batches)


def share_a_state(directory):
    """Save iterators whose states differ, as if all processes had one."""
    index, mesh = jax.process_index(), mesh_of_all()
    generator = np.random.default_rng(index)
    ckpt = flaxckpt.ModelCheckpoint(f"{directory}/{{epoch}}", timeout_secs=20)
    ckpt.save({"w": sharded(mesh), "draws": generator}, 0)
    try:
        ckpt.wait()
    except flaxckpt.CheckpointError as error:
        say(str(error))


def choose_all(directory):
    """Choose all leaves as each process's own, an array of all processes, too."""
    index, mesh = jax.process_index(), mesh_of_all()
    tree = {"w": sharded(mesh), "n": index}
    with flaxckpt.ModelCheckpoint(
        f"{directory}/{{epoch}}", per_process=lambda path, leaf: True
    ) as ckpt:
        ckpt.save(tree, 0)
        number = ckpt.restore(tree).tree["n"]
        with pytest.raises(flaxckpt.SettingError) as refused:
            ckpt.save({"w": tree["w"]}, 1)
    say(number, str(refused.value))


def save_otherwise(directory, what):
    """Make another call in process 1, or write where no directory can be."""
    index, mesh = jax.process_index(), mesh_of_all()
    if what == "directory":
        directory = "/proc/none"
    with (
        pytest.raises(flaxckpt.CheckpointError) as refused,
        flaxckpt.ModelCheckpoint(
            f"{directory}/{{epoch}}-{{loss}}", "loss", timeout_secs=20
        ) as ckpt,
    ):
        epoch = index if what == "epoch" else 0
        logs = {"loss": float(index)} if what != "directory" else {"loss": 0.0}
        ckpt.update(ckpt.init(), {"w": sharded(mesh)}, logs, epoch)
        ckpt.wait()
    say(str(refused.value))


def be_warned(directory):
    """Take a warning, which one process alone gets, for an error; then go on."""
    from flaxckpt._direct import write

    mesh, original = mesh_of_all(), write.trailer_of

    def fail(*args):
        write.trailer_of = original
        raise RuntimeError("injected")

    ckpt = flaxckpt.ModelCheckpoint(f"{directory}/{{epoch}}", timeout_secs=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for epoch in range(7):
            if epoch == 1 and jax.process_index() == 1:
                write.trailer_of = fail
            try:
                ckpt.save({"w": sharded(mesh)}, epoch)
            except (flaxckpt.CheckpointError, UserWarning):
                say(epoch)
        ckpt.close()
    say([info.path.name for info in ckpt.checkpoints])


def fail_once(directory, what, way, victim):
    """Fail once in one process, at the second call of four, and go on."""
    mesh, tree = mesh_of_all(), {}
    tree["w"], is_victim = sharded(mesh), jax.process_index() == int(victim)
    real = PodSaver._copy

    def fail(*args, **kwargs):
        PodSaver._copy = real
        raise MemoryError

    settings = {"timeout_secs": 20, "snapshot": "none" if way == "none" else "auto"}
    seen = []
    with flaxckpt.ModelCheckpoint(f"{directory}/{{epoch}}", **settings) as ckpt:
        state = ckpt.init(tree)
        for epoch in range(4):
            given = tree
            if epoch == 1 and is_victim:
                if what == "leaf":
                    given = {"w": object()}
                else:
                    PodSaver._copy = fail
            try:
                state = ckpt.update(state, given, {}, epoch)
                if way == "wait":
                    ckpt.wait()
            except (flaxckpt.CheckpointError, MemoryError) as error:
                notes = getattr(error, "__notes__", [])
                seen.append([epoch, " ".join([str(error), *notes])])
    say(seen, sorted(info.path.name for info in ckpt.checkpoints))


def be_interrupted(directory):
    """Interrupt process 1 while its update waits for the save before."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    real, number = joint_saves.write_share, 0

    def wait(*args, **kwargs):
        joint_saves.write_share = real
        time.sleep(0.5)  # until the loop waits
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        return real(*args, **kwargs)

    tree = {"w": sharded(mesh_of_all())}
    with flaxckpt.ModelCheckpoint(f"{directory}/{{epoch}}", timeout_secs=20) as ckpt:
        state = ckpt.init(tree)
        for epoch in range(5):
            if jax.process_index() == 1 and epoch == 1:
                joint_saves.write_share = wait
            try:
                ckpt.update(state, tree, {}, epoch)
            except (KeyboardInterrupt, flaxckpt.CheckpointError) as error:
                number += 1
                told = f"{type(error).__name__}: {error}"
    say(number, told, sorted(int(info.path.name) for info in ckpt.checkpoints))


def leave_alone(directory):
    """Interrupt process 1 in an update to which process 0 never comes."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    index, real, notes = jax.process_index(), joint_saves.write_share, None

    def wait(*args, **kwargs):
        time.sleep(0.5)  # until the loop waits
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        return real(*args, **kwargs)

    joint_saves.write_share = wait if index == 1 else real
    tree = {"w": sharded(mesh_of_all())}
    warnings.simplefilter("error", UserWarning)
    try:
        with flaxckpt.ModelCheckpoint(f"{directory}/{{epoch}}", timeout_secs=5) as ckpt:
            state = ckpt.init(tree)
            for epoch in range(1 + index):
                state = ckpt.update(state, tree, {}, epoch)
    except KeyboardInterrupt as error:
        notes = getattr(error, "__notes__", [])
    say(notes, len(ckpt.checkpoints))


def be_preempted_after_a_failure(directory):
    """Fail in process 1's first save, and be told to end at the next call."""
    from flaxckpt._processes.preemption import AgreedWatch

    real, signals = joint_saves.write_share, [None]

    def look(self):
        self.signal = signals[-1]
        return self.signal

    def fail(*args, **kwargs):
        joint_saves.write_share = real
        raise OSError("injected")

    AgreedWatch.look = look
    joint_saves.write_share = fail if jax.process_index() == 1 else real
    tree = {"w": sharded(mesh_of_all())}
    ckpt = flaxckpt.ModelCheckpoint(
        f"{directory}/{{epoch}}", save_on_preemption=True, timeout_secs=20
    )
    state = ckpt.update(ckpt.init(tree), tree, {}, 0)
    signals.append("SIGTERM")
    try:
        ckpt.update(state, tree, {}, 1)
    except flaxckpt.Preempted as error:
        say(error.__notes__, [info.path.name for info in ckpt.checkpoints])


def fail_while_interrupted(directory):
    """Fail in a call that has an interrupt still to raise."""
    tree, told = {"w": sharded(mesh_of_all())}, []
    ckpt = flaxckpt.ModelCheckpoint(f"{directory}/{{epoch}}", timeout_secs=20)
    state = ckpt.init(tree)
    for epoch in range(4):
        given = tree
        if epoch == 1 and jax.process_index() == 1:
            ckpt._saves._earlier = KeyboardInterrupt()
            given = {"w": object()}
        try:
            state = ckpt.update(state, given, {}, epoch)
        except (flaxckpt.CheckpointError, KeyboardInterrupt) as error:
            told.append([epoch, type(error).__name__, getattr(error, "__notes__", [])])
    ckpt.close()
    say(told, [info.path.name for info in ckpt.checkpoints])


def save_wide_empty(directory, snapshot):
    """Save arrays of 64-bit dtypes without elements."""
    mesh = mesh_of_all()
    with jax.enable_x64(True):
        tree = {
            name: place(np.zeros((0, jax.device_count()), name), mesh, None, "data")
            for name in ("int64", "float64")
        }
    with flaxckpt.ModelCheckpoint(
        f"{directory}/{{epoch}}", snapshot=snapshot, timeout_secs=20
    ) as ckpt:
        ckpt.save(tree | {"w": sharded(mesh)}, 0)
    say([leaf.dtype for leaf in flaxckpt.describe(ckpt.latest.path).leaves])


def close_at_once(directory):
    """Close while the first save is under way."""
    with flaxckpt.ModelCheckpoint(f"{directory}/{{epoch}}") as ckpt:
        ckpt.save({"w": sharded(mesh_of_all())}, 0)
    say(ckpt._saves._parts.ahead._told is None)


def save_empty(directory, snapshot):
    """Save an array without elements, and donate it at once."""
    mesh = mesh_of_all()
    step = jax.jit(
        lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0
    )
    empty = place(np.zeros((0, jax.device_count())), mesh, None, "data")
    tree = {"w": sharded(mesh), "empty": empty}
    with flaxckpt.ModelCheckpoint(
        f"{directory}/{{epoch}}", snapshot=snapshot, timeout_secs=20
    ) as ckpt:
        state = ckpt.init(tree)
        for epoch in range(4):
            state = ckpt.update(state, tree, {}, epoch)
            tree = step(tree)
    say(len(ckpt.checkpoints), ckpt.restore(tree).tree["empty"].shape)


def restore_otherwise(directory, *kinds):
    """Have each process fail in its own way at the newest checkpoint."""
    from flaxckpt import _restoring

    mesh = mesh_of_all()
    ckpt = flaxckpt.ModelCheckpoint(f"{directory}/{{epoch}}", timeout_secs=20)
    for epoch in range(2):
        ckpt.save({"w": sharded(mesh), "n": epoch}, epoch)
    ckpt.wait()
    restore, tried = _restoring.restore, []
    errors = {
        "gone": flaxckpt.CheckpointNotFoundError("/some", (), "it was replaced"),
        "damaged": flaxckpt.CheckpointCorruptError("/some", "of a test"),
    }

    def fail_once(*args, **kwargs):
        tried.append(args)
        if len(tried) == 1:
            raise errors[kinds[jax.process_index()]]
        return restore(*args, **kwargs)

    _restoring.restore = fail_once
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        say(ckpt.restore().epoch)


if __name__ == "__main__":
    workers.main(globals())
