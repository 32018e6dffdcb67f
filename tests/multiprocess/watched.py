"""A worker that notes which messages and which collectives saves and restores cost."""

import os

os.environ["XLA_FLAGS"] = (
    f"--xla_dump_to={os.environ.get('FLAXCKPT_TEST_DUMP')} --xla_dump_hlo_as_text"
)

import threading

import jax
import jax.numpy as jnp
import numpy as np
import workers
from jax.experimental import multihost_utils
from workers import check_same, mesh_of, place, say

import flaxckpt
from flaxckpt._processes import messages

FORBIDDEN = (
    "sync_global_devices", "broadcast_one_to_all", "process_allgather",
    "assert_equal", "host_local_array_to_global_array",
)  # fmt: skip


def train_watched(directory):
    """Train and save; say how many messages each step has sent, and what was called."""
    sent, forbidden = [], []

    def counted(*args, put=messages._set, **kwargs):
        if (
            threading.current_thread().name != messages.SIGNS
        ):  # how many goes by the time
            sent.append(args[0])
        return put(*args, **kwargs)

    def refused(name):
        def called(*args, **kwargs):
            forbidden.append(name)
            raise AssertionError(name)

        return called

    messages._set = counted
    for name in FORBIDDEN:
        assert hasattr(multihost_utils, name)
        setattr(multihost_utils, name, refused(name))
    mesh = mesh_of(jax.device_count() // 2, 2)

    @jax.jit
    def users_step(w):
        return w * jnp.float32(0.9), jnp.sum(w)

    w = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    tree = {
        "w": place(w, mesh, "data", "model"),
        "own": jax.process_index(),
        "host": np.arange(8, dtype=np.float32),
        "number": 2.5,
    }
    settings = {"per_process": lambda path, leaf: path == ("own",), "timeout_secs": 20}
    numbers = []
    with flaxckpt.ModelCheckpoint(
        f"{directory}/{{batch}}", "loss", save_freq=10, save_best_only=True, mode="min",
        save_last=True, max_to_keep=2, **settings,
    ) as ckpt:  # fmt: skip
        state = ckpt.init()
        for batch in range(30):
            tree["w"], loss = jax.block_until_ready(users_step(tree["w"]))
            sent.clear()
            logs = {"loss": loss * 0 - batch}
            state = ckpt.update(state, tree, logs, 0, batch)
            ckpt.wait()
            numbers.append([batch, len(sent)])
        found = ckpt.restore(tree)
        check_same(found.tree["w"], tree["w"])
        like = {**tree, "host": place(np.zeros(8, np.float32), mesh)}
        like["number"] = place(np.float32(0), mesh)
        found = ckpt.restore(like)
        check_same(found.tree["number"], place(np.float32(2.5), mesh))
        check_same(found.tree["host"], place(tree["host"], mesh))
        say(numbers)
        say("saved", ckpt.counts.saved)
    say("forbidden", forbidden)


if __name__ == "__main__":
    workers.main(globals())
