"""What do digests cost, when saving and when restoring?

A state of 400 MB in 25 arrays, saved and restored with digests and without, beside
plain Orbax on the same tree. Each save is timed until it is on disk, and the call by
itself, which is how long the loop is blocked.
"""

import contextlib
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import absl.logging
import harness
import jax
from orbax.checkpoint import v1

import flaxckpt
from flaxckpt._direct import write as _write

pass

absl.logging.set_verbosity(absl.logging.ERROR)


def main() -> None:
    options = harness.arguments(__doc__)
    megabytes = 40 if options.quick else 400
    tree = harness.tree_of(megabytes)
    root = Path(tempfile.mkdtemp(prefix="flaxckpt-bench-"))
    blocked: dict[str, list[float]] = {"with digests": [], "without": []}

    opened = {name: flaxckpt.ModelCheckpoint(root / name) for name in blocked}

    def save(name, with_digests):
        def measure():
            harness.settle()
            with contextlib.nullcontext() if with_digests else no_digests():
                start = time.perf_counter()
                opened[name].save(tree, epoch=0)
                blocked[name].append(time.perf_counter() - start)
                opened[name].wait()
                return time.perf_counter() - start

        return measure

    def save_orbax():
        path = root / "orbax"
        shutil.rmtree(path, ignore_errors=True)
        harness.settle()
        start = time.perf_counter()
        v1.save(path, tree)
        return time.perf_counter() - start

    saves = {
        "with digests": save("with digests", True),
        "without": save("without", False),
        "plain Orbax (syncs no names)": save_orbax,
    }
    for measure in 3 * list(saves.values()):
        measure()  # compiles, learns Orbax's form, and has a spare to write over
    for values in blocked.values():
        values.clear()
    results = harness.rounds(saves, options.rounds)
    harness.report(f"Saving {megabytes} MB, until on disk", "s", results, options.json)
    added("digests add to a save", results, "with digests", "without", options)
    harness.report("The call to save", "s", blocked, options.json)
    for name, of in {"median": statistics.median, "least": min}.items():
        more = (of(blocked["with digests"]) - of(blocked["without"])) * 1e3
        harness.note(f"digests add {more:.2f} ms to the {name} call", options.json)

    for ckpt in opened.values():
        ckpt.close()

    def restore(verify):
        def measure():
            harness.settle(megabytes)
            start = time.perf_counter()
            path = root / "with digests"
            jax.block_until_ready(flaxckpt.load(path, like, verify=verify))
            return time.perf_counter() - start

        return measure

    def restore_orbax():
        harness.settle(megabytes)
        start = time.perf_counter()
        jax.block_until_ready(v1.load(root / "orbax", like))
        return time.perf_counter() - start

    like = harness.like(tree)
    pair = {"verified": restore(True), "not verified": restore(False)}
    for measure in [*pair.values(), *pair.values(), restore_orbax]:
        measure()
    results = harness.rounds(pair, 6 * options.rounds)  # short, and they scatter
    results |= harness.rounds({"plain Orbax": restore_orbax}, options.rounds)
    title = f"Restoring {megabytes} MB, verified or not"
    harness.report(title, "s", results, options.json)
    added("verifying adds to a restore", results, "verified", "not verified", options)
    verified, not_verified, orbax = map(statistics.median, results.values())
    share = (verified - not_verified) / orbax
    harness.note(f"verifying takes {share:.1%} of plain Orbax's restore", options.json)
    share = verified / orbax
    harness.note(f"verified: {share:.2g} times plain Orbax's restore", options.json)
    shutil.rmtree(root)


@contextlib.contextmanager
def no_digests():
    """Save without digests, which are the checksums of files that hold a whole leaf."""
    with mock.patch.object(_write, "xxhash", mock.Mock(xxh3_64=NoMarks)):
        yield


class NoMarks:
    """A checksum that is not taken."""

    def update(self, block):
        pass

    def hexdigest(self):
        return "0" * 16


def added(what, results, new, old, options):
    added = statistics.median(results[new]) / statistics.median(results[old]) - 1
    harness.note(f"{what}: {added:+.1%}", options.json)


if __name__ == "__main__":
    main()
