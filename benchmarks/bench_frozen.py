"""What does a save write where 1% of a tree trains?

A state of 400 MB, of which 1% changes from save to save, as in fine-tuning with LoRA:
how many bytes a save writes, in units of the bytes that train, and how long it takes.
Once with the frozen arrays as they are, once with all of them donated in each step, so
that they are others each time.
"""

import shutil
import tempfile
import time
from pathlib import Path

import absl.logging
import harness
import jax
import jax.numpy as jnp
import numpy as np

import flaxckpt

absl.logging.set_verbosity(absl.logging.ERROR)


def main() -> None:
    options = harness.arguments(__doc__)
    megabytes = 20 if options.quick else 400
    rows = megabytes * 2**20 // 24 // 4 // 1024
    keys = jax.random.split(jax.random.key(0), 24)
    base = {f"w{i:02}": jax.random.normal(keys[i], (rows, 1024)) for i in range(24)}
    small = jnp.zeros((megabytes * 2**20 // 100 // 24 // 4,))
    tree = {"base": base, "lora": {name: jnp.copy(small) for name in base}}
    trained = sum(leaf.nbytes for leaf in jax.tree.leaves(tree["lora"]))
    root = Path(tempfile.mkdtemp(prefix="flaxckpt-bench-"))
    train = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    renew = jax.jit(lambda t: t, donate_argnums=0, keep_unused=True)
    trees = {}

    def opened(name, **settings):
        path = root / name / "{epoch}"
        trees[name] = jax.tree.map(jnp.copy, tree)
        return flaxckpt.ModelCheckpoint(path, max_to_keep=2, **settings)

    def is_frozen(path, leaf):
        return path[0] == "base"

    all_written = {
        "frozen": opened("frozen", frozen=is_frozen),
        "frozen, donated": opened("frozen, donated", frozen=is_frozen),
        "all of it": opened("all of it"),
    }
    written: dict[str, list[float]] = {name: [] for name in all_written}
    epoch = 0

    def saved(name, ckpt):
        def measure():
            nonlocal epoch
            epoch += 1
            now = trees[name]
            now["lora"] = train(now["lora"])
            if name == "frozen, donated":
                now["base"] = renew(now["base"])
            jax.block_until_ready(now)
            harness.settle()
            before, start = bytes_written(), time.perf_counter()
            ckpt.save(now, epoch)
            ckpt.wait()
            took = time.perf_counter() - start
            written[name].append((bytes_written() - before) / trained)
            return took

        return measure

    saves = {name: saved(name, ckpt) for name, ckpt in all_written.items()}
    for save in 4 * list(saves.values()):
        save()
    for values in written.values():
        values.clear()
    results = harness.rounds(saves, options.rounds)
    title = f"{megabytes} MB of which 1% trains"
    unit = "times the trained bytes"
    harness.report(f"{title}: bytes written by a save", unit, written, options.json)
    harness.report(f"{title}: a save, until on disk", "s", results, options.json)
    for name, ckpt in all_written.items():
        found = flaxckpt.load(ckpt.latest.path)
        jax.tree.map(np.testing.assert_array_equal, found, trees[name])
        ckpt.close()
    shutil.rmtree(root)


def bytes_written() -> int:
    """Count what this process has given to the system's `write` so far."""
    fields = Path("/proc/self/io").read_text().split()
    return int(fields[fields.index("wchar:") + 1])


if __name__ == "__main__":
    main()
