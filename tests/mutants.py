"""Mutants of a checkpoint's small files, and what becomes of them.

Each mutant is loaded, verified, listed and restored beside good checkpoints. It must give
a `CheckpointError`, or the values that were saved, and must not keep `restore` from the
good ones. Run as a program, for a process of its own with little memory:

    python tests/mutants.py DIRECTORY FIRST COUNT

It prints what does not hold, a line each, and the number of mutants of each outcome.
"""

import copy
import gc
import hashlib
import json
import os
import random
import shutil
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

KINDS = ("database", "files", "compressed", "sharded")
SLOW_SECS = 60
RECORD, TABLE = "flaxckpt.json", "flaxckpt_leaves.json"
ODD = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63),
    10**30, 10**400, 0.0, -0.0, 0.5, 1e308, -1e308, 1.0, "", "x", "0", "nan", "..",
    "../..", "/", "/etc/passwd", "a/../../b", ".", "\0", "\ud800", "\u202e", "w" * 5000,
    [], {}, [[]], [{}], {"": None}, {"float": "nan"}, {"float": 7}, {"dict": []},
    {"list": [0]}, {"tuple": [0]}, "int32", "float32", "float64", "bfloat16", "object",
    "O", "i4,f8", "key<fry>", "rbg", "jax", "numpy", "static", "str", "bytes", "key",
    [2**40], [2**62], [-1], [0], [1, -1], [2**20, 2**20], [1] * 70,
    "xxh3:0000000000000000", "sum:0000000000000000", "0000000000000000",
)  # fmt: skip
TIMES = ("2026-01-01T00:00:00", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59+00:00",
         "9999-12-31T23:59:59-14:00", "now", "2026-01-01")  # fmt: skip


def tree_of(epoch):
    import jax
    import jax.numpy as jnp
    import numpy as np

    return {
        "w": jnp.asarray(np.arange(48, dtype=np.float32).reshape(6, 8) + epoch),
        "b": jnp.full(5, epoch, jnp.bfloat16),
        "host": np.arange(4) + epoch,
        "layers": [(np.int8(epoch), jnp.ones((2, 2))), {3: 0.5 + epoch}, {"x/y": True}],
        "key": jax.random.key(epoch),
        "empty": np.zeros((0, 3), np.float32),
        "n": epoch,
        "z": complex(epoch, 1),
        "text": f"text {epoch}",
        "raw": b"\x00\x01\xff",
        "none": None,
    }


def tree_for(kind, epoch):
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    tree = tree_of(epoch)
    if kind == "sharded":
        mesh = jax.make_mesh((2, 4), ("x", "y"))
        tree["w"] = jax.device_put(tree["w"], NamedSharding(mesh, P("x", "y")))
    return tree


def make(directory):
    """Write three checkpoints of each kind."""
    import flaxckpt
    from flaxckpt._checkpoints import write as _write

    large = _write._LARGE_LEAF
    for kind in KINDS:
        _write._LARGE_LEAF = 2**40 if kind == "database" else 0
        root = directory / kind / "good"
        with flaxckpt.ModelCheckpoint(
            root / "{epoch}", "loss", mode="min", compress=kind == "compressed"
        ) as ckpt:
            state = ckpt.init()
            for epoch in range(3):
                state = ckpt.update(
                    state,
                    tree_for(kind, epoch),
                    {"loss": 1 - epoch / 4, "nan": float("nan"), "note": "x"},
                    epoch,
                )
                ckpt.wait()
    _write._LARGE_LEAF = large


# ---- mutants -----------------------------------------------------------------------------


def places(value, path=()):
    """Yield where the values of some JSON are."""
    yield path
    if isinstance(value, dict):
        for key, child in value.items():
            yield from places(child, (*path, key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from places(child, (*path, index))


def parent_of(value, path):
    for step in path[:-1]:
        value = value[step]
    return value


def odd(randomly):
    value = randomly.choice(ODD)
    if randomly.random() < 0.1:
        value = randomly.choice(
            (*TIMES, randomly.getrandbits(randomly.choice((8, 40))))
        )
    return copy.deepcopy(value)


def changed(value, randomly):
    """Return some JSON with one thing in it changed, and what that was."""
    value = copy.deepcopy(value)
    found = list(places(value))
    top = [path for path in found if len(path) <= 1]
    path = randomly.choice(top if randomly.random() < 0.3 else found)
    if not path:
        return odd(randomly), "all"
    above = parent_of(value, path)
    kind = randomly.choice(
        ("odd", "odd", "odd", "near", "remove", "add", "swap", "deep")
    )
    at = path[-1]
    match kind:
        case "odd":
            above[at] = odd(randomly)
        case "near":
            old = above[at]
            if type(old) is bool:
                above[at] = not old
            elif isinstance(old, int | float):
                above[at] = randomly.choice(
                    (old + 1, old - 1, -old, old * 2, float(old))
                )
            elif isinstance(old, str) and old:
                above[at] = randomly.choice(
                    (old[:-1], old + "0", old[::-1], old + "/..")
                )
            elif isinstance(old, list):
                above[at] = randomly.choice((old[:-1], old + old[-1:], old[::-1]))
            else:
                above[at] = [old]
        case "remove":
            del above[at]
        case "add":
            if isinstance(above, dict):
                above[randomly.choice(("x", "digest", "float", "dict", ""))] = odd(
                    randomly
                )
            else:
                above.insert(at, odd(randomly))
        case "swap":
            other = randomly.choice(found[1:])
            theirs = copy.deepcopy(parent_of(value, other)[other[-1]])
            above[at] = theirs
        case "deep":
            for _ in range(randomly.choice((3, 100, 400))):
                above[at] = randomly.choice(([above[at]], {"list": [above[at]]}))
    return value, f"{kind} at {'/'.join(map(str, path))}"[:100]


def dumped(value, **settings):
    """Return JSON as bytes, even where it is nested too deeply for Python."""
    try:
        return json.dumps(value, **settings).encode()
    except RecursionError:
        return b"[" * 2000


def raw(data, randomly):
    """Change bytes, as no JSON needs to be."""
    kind = randomly.choice(
        ("truncate", "flip", "empty", "bom", "utf-16", "latin", "deep", "twice", "zeros",
         "digits", "nan")
    )  # fmt: skip
    match kind:
        case "truncate":
            data = data[: randomly.randrange(len(data))] if data else data
        case "flip":
            data = bytearray(data or b"x")
            data[randomly.randrange(len(data))] ^= 1 << randomly.randrange(8)
            data = bytes(data)
        case "empty":
            data = b""
        case "bom":
            data = b"\xef\xbb\xbf" + data
        case "utf-16":
            data = data.decode("latin-1").encode("utf-16")
        case "latin":
            data = data.replace(b'"', b'"\xe9', 1)
        case "deep":
            data = randomly.choice((b"[" * 10**5, b'{"a":' * 10**5, b"[" * 900))
        case "twice":
            data = data.replace(b"{", b'{"format": 1, "format": "x", ', 1)
        case "zeros":
            data = bytes(len(data))
        case "digits":
            data = data.replace(b": ", b": " + b"9" * 5000 + b", ", 1)
        case "nan":
            data = data.replace(b": 0", b": NaN", 1)
    return data, kind


def sign(path, table=None, record=None):
    """Write a table and a record with the checksums that they should have."""
    if table is not None:
        (path / TABLE).write_bytes(table)
        record = json.loads((path / RECORD).read_bytes())
        record["leaves_sha256"] = hashlib.sha256(table).hexdigest()
    if isinstance(record, dict):
        record = {key: value for key, value in record.items() if key != "sha256"}
        dumps = dumped(record, indent=1)
        record = {**record, "sha256": hashlib.sha256(dumps).hexdigest()}
    (path / RECORD).write_bytes(dumped(record, indent=1))


def small_files(path):
    """Name the small files of a checkpoint, those of Orbax too."""
    found = [p for p in path.rglob("*") if p.is_file()]
    names = [str(p.relative_to(path)) for p in found]
    return sorted(
        name
        for name in names
        if name.endswith((".json", ".ocdbt", ".checkpoint", ".txt", "_METADATA"))
        or "_sharding" in name
        or "array_metadatas" in name
    )


def special(path, randomly):
    """Put something that is no plain file in the place of one, or a sparse one."""
    kind = randomly.choice(("fifo", "directory", "link", "loop", "sparse", "gone"))
    path.unlink()
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "link":
            path.symlink_to("/dev/zero")
        case "loop":
            path.symlink_to(path.name)
        case "sparse":
            path.touch()
            os.truncate(path, 2**40)
    return kind


def mutate(path, randomly):
    """Change one small file of a checkpoint; return what was done."""
    how = randomly.choices(
        ("record", "table", "zarr", "other", "special"), (30, 35, 20, 10, 5)
    )[0]
    is_signed = randomly.random() < 0.8
    if how == "record":
        data = (path / RECORD).read_bytes()
        if randomly.random() < 0.15:
            data, what = raw(data, randomly)
            (path / RECORD).write_bytes(data)
            return f"record: {what}"
        record, what = changed(json.loads(data), randomly)
        if is_signed:
            sign(path, record=record)
        else:
            (path / RECORD).write_bytes(dumped(record))
        return f"record, signed={is_signed}: {what}"
    if how == "table":
        data = (path / TABLE).read_bytes()
        if randomly.random() < 0.15:
            data, what = raw(data, randomly)
        else:
            value, what = changed(json.loads(data), randomly)
            data = dumped(value)
        if is_signed:
            sign(path, table=data)
        else:
            (path / TABLE).write_bytes(data)
        return f"table, signed={is_signed}: {what}"
    names = small_files(path)
    if how == "zarr":
        names = [
            n for n in names if n.endswith(("zarr.json", "_strings.json"))
        ] or names
    name = randomly.choice(names)
    if how == "special":
        return f"{name}: {special(path / name, randomly)}"
    data = (path / name).read_bytes()
    try:
        value = json.loads(data)
    except ValueError:
        value = None
    if value is not None and randomly.random() < 0.8:
        value, what = changed(value, randomly)
        data = dumped(value)
    else:
        data, what = raw(data, randomly)
    (path / name).write_bytes(data)
    return f"{name}: {what}"


# ---- outcomes ----------------------------------------------------------------------------


def bits(tree):
    """Return the values of a tree as bytes, whatever it is made of."""
    import jax
    import numpy as np

    def of(leaf):
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(
            leaf.dtype, jax.dtypes.prng_key
        ):
            leaf = jax.random.key_data(leaf)
        if isinstance(leaf, str | bytes):
            return leaf if isinstance(leaf, bytes) else leaf.encode("utf-8", "replace")
        return np.asarray(leaf).tobytes()

    return [of(leaf) for leaf in jax.tree.leaves(tree)]


class Trial:
    """The good checkpoints of one kind, and a place for a mutant beside them."""

    def __init__(self, directory, kind):
        import flaxckpt

        self.kind, self.good = kind, directory / kind / "good"
        self.root = directory / kind / f"try-{os.getpid()}"
        shutil.copytree(self.good, self.root)
        self.expected = bits(tree_for(kind, 2))
        self.weights = set(self.expected)
        self.like = tree_for(kind, 2)
        self.flaxckpt = flaxckpt

    def run(self, seed):
        """Make a mutant of the newest; return what it was, and what does not hold."""
        randomly = random.Random(seed)
        shutil.rmtree(self.root / "3")
        shutil.copytree(self.good / "3", self.root / "3")
        what = mutate(self.root / "3", randomly)
        problems, began = [], time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = self._tried(problems, randomly.random() < 0.5)
        if time.monotonic() - began > SLOW_SECS:
            problems.append(f"took {time.monotonic() - began:.0f} s")
        return what, outcome, problems

    def _tried(self, problems, with_like):
        flaxckpt, path = self.flaxckpt, self.root / "3"
        like = self.like if with_like else None

        def attempt(name, do, is_right):
            try:
                found = do()
            except flaxckpt.CheckpointError as error:
                if "\n" in str(error) and not isinstance(
                    error, flaxckpt.CheckpointMismatchError
                ):
                    problems.append(f"{name}: several lines: {str(error)[:300]!r}")
                return type(error).__name__
            except BaseException:
                problems.append(f"{name}: {traceback.format_exc()}")
                return "raw"
            if not is_right(found):
                problems.append(f"{name}: other values: {str(found)[:300]}")
            return "equal"

        outcome = attempt(
            "load",
            lambda: flaxckpt.load(path, like),
            lambda f: bits(f) == self.expected,
        )
        attempt(
            "load_weights",
            lambda: flaxckpt.load_weights(path),
            lambda f: set(bits(f)) <= self.weights,
        )
        attempt("verify", lambda: flaxckpt.verify(path), lambda f: f is None)
        attempt(
            "list_checkpoints",
            lambda: flaxckpt.list_checkpoints(self.root),
            lambda f: len(f) >= 2,
        )
        ckpt = flaxckpt.ModelCheckpoint(self.root / "{epoch}", "loss", mode="min")
        for which in ("latest", "best"):
            name = f"restore({which})"
            done = attempt(
                name,
                lambda which=which: ckpt.restore(like, which=which),
                lambda f: (
                    f is not None
                    and bits(f.tree)
                    in (
                        self.expected,
                        *(bits(tree_for(self.kind, e)) for e in range(2)),
                    )
                ),
            )
            # A table that is whole, and that of another tree, is no damage.
            if done != "equal" and not done == outcome == "CheckpointMismatchError":
                problems.append(f"{name} gives {done}, and there are good ones")
        return outcome


def main(directory, first, count):
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    import resource

    import absl.logging

    absl.logging.set_verbosity("fatal")
    trials = [Trial(directory, kind) for kind in KINDS]
    for trial in trials:  # all that is imported is, and the threads are there
        trial.run(0)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 2**30, used + 3 * 2**30))
    outcomes, wrong = Counter(), 0
    for seed in range(first, first + count):
        what, outcome, problems = trials[seed % len(KINDS)].run(seed)
        outcomes[outcome] += 1
        wrong += bool(problems)
        if problems:
            print(f"{seed} ({KINDS[seed % len(KINDS)]}; {what})")
            for problem in problems:
                print("    " + problem.replace("\n", "\n    "))
        if seed % 50 == 0:
            gc.collect()  # tasks that Orbax leaves behind
        print("PROGRESS", seed, file=sys.stderr, flush=True)
    print(json.dumps({"wrong": wrong, **outcomes}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
