"""What do many checkpoints in one directory cost?

10,000 of them: listing, latest and best; the first save, which reads all records; and
each save after it, beside saves into an empty directory. Orbax's v0 manager opens as
many step directories, empty ones.
"""

import dataclasses
import datetime
import shutil
import tempfile
import time
from pathlib import Path

import absl.logging
import harness
import numpy as np
import orbax.checkpoint as v0

import flaxckpt
from flaxckpt._checkpoints import finish as _finish
from flaxckpt._disk import record as _record

absl.logging.set_verbosity(absl.logging.ERROR)
TREE = {"w": np.zeros(16, np.float32)}


def fill(directory: Path, number: int) -> None:
    """Write one checkpoint, and the records of all the others."""
    with flaxckpt.ModelCheckpoint(directory / "{epoch:06d}", "loss") as ckpt:
        path = ckpt.save(TREE, epoch=0, logs={"loss": 1.0})
        ckpt.wait()
        (info,) = ckpt.checkpoints
    table = (path / _record.LEAVES_FILE).read_bytes()
    for epoch in range(1, number):
        other = directory / f"{epoch + 1:06d}"
        other.mkdir()
        changed = dataclasses.replace(
            info,
            path=other,
            epoch=epoch,
            step=epoch + 1,
            logs={"loss": 1.0 / (epoch + 1)},
            time=info.time + datetime.timedelta(microseconds=epoch),
        )
        record = _record.encode_record(changed, _finish.versions(), table)
        (other / _record.RECORD_FILE).write_bytes(record)


def main() -> None:
    options = harness.arguments(__doc__)
    number = 200 if options.quick else 10_000
    root = Path(tempfile.mkdtemp(prefix="flaxckpt-bench-"))
    fill(root / "many", number)
    for step in range(number):
        (root / "orbax" / str(step)).mkdir(parents=True)
    settings = {"mode": "min", "max_to_keep": number + 10**6}
    many = flaxckpt.ModelCheckpoint(root / "many/{epoch:06d}", "loss", **settings)
    few = flaxckpt.ModelCheckpoint(root / "few/{epoch:06d}", "loss", **settings)

    def timed(call):
        def measure():
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return measure

    def opened():
        path = root / "many/{epoch:06d}"
        with flaxckpt.ModelCheckpoint(path, "loss", **settings) as ckpt:
            ckpt.restore(which=root / "many/000001")
            assert ckpt.latest.epoch >= number - 1

    def opened_by_orbax():
        with v0.CheckpointManager(root / "orbax") as manager:
            assert manager.latest_step() == number - 1

    looks = {
        "flaxckpt: open, restore one, latest": timed(opened),
        "flaxckpt: latest": timed(lambda: many.latest),
        "flaxckpt: best": timed(lambda: many.best),
    }
    results = harness.rounds(looks, options.rounds)
    name = "Orbax v0 CheckpointManager: open, latest (once)"
    results[name] = [timed(opened_by_orbax)()]
    harness.report(f"{number} checkpoints", "s", results, options.json)

    epoch = number

    def saved(ckpt):
        def measure():
            nonlocal epoch
            epoch += 1
            start = time.perf_counter()
            ckpt.save(TREE, epoch=epoch, logs={"loss": 2.0})
            ckpt.wait()
            return (time.perf_counter() - start) * 1e3

        return measure

    saves = {f"beside {number}": saved(many), "beside none": saved(few)}
    print(f"\nThe first save took {saves[f'beside {number}']() / 1e3:.2f} s.")
    saves["beside none"]()
    results = harness.rounds(saves, options.rounds * 5)
    harness.report("A save, until it is on disk", "ms", results, options.json)
    one, other = results.values()
    added = sorted(a - b for a, b in zip(one, other, strict=True))[len(one) // 2]
    text = f"Bookkeeping for {number} adds {added:.2f} ms to a save"
    harness.note(text, options.json)
    many.close()
    few.close()
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
