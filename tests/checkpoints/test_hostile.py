"""Checkpoints that somebody made to do harm: each is an error, at once, and said so."""

import hashlib
import json
import os
import shutil
import signal
import socket
import warnings

import jax
import mutants
import numpy as np
import pytest

import flaxckpt
from flaxckpt import CheckpointCorruptError, CheckpointError, ModelCheckpoint
from flaxckpt._direct import read as _read
from flaxckpt._direct import zarr as _zarr

# Orbax leaves tasks of its own behind where it raises.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("none_left_behind"),
]
PLACES = ("flaxckpt.json", "flaxckpt_leaves.json", "_CHECKPOINT_METADATA",
          "state/_strings.json", "state/_METADATA", "state/_sharding",
          "state/w/zarr.json", "state/w/c*", "state/w/c/0/0", "state/n/c",
          "state/manifest.ocdbt", "state/d/*", "state/ocdbt.process_0/manifest.ocdbt",
          "state/array_metadatas/process_0")  # fmt: skip


@pytest.fixture(autouse=True)
def patience():
    """End what would wait for ever, as a FIFO has one do."""

    def end(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    directory = tmp_path_factory.mktemp("good")
    mutants.make(directory)
    return directory


@pytest.fixture
def run(good, tmp_path):
    """Copies the checkpoints of one kind, and returns where they are."""

    def copied(kind):
        return shutil.copytree(good / kind / "good", tmp_path / "run", symlinks=True)

    return copied


def all_raise(root, kind, error=CheckpointCorruptError, like=None):
    """All that reads the newest raises that, and what looks for a good one finds it."""
    path = root / "3"
    for read in (
        lambda: flaxckpt.load(path),
        lambda: flaxckpt.load(path, mutants.tree_for(kind, 2)),
        lambda: flaxckpt.load_weights(path),
        lambda: flaxckpt.verify(path),
    ):
        with pytest.raises(error) as caught:
            read()
        assert "\n" not in str(caught.value)
    falls_back(root)


def falls_back(root):
    ckpt = ModelCheckpoint(root / "{epoch}", "loss", mode="min")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(flaxckpt.list_checkpoints(root)) >= 2
        for which in ("latest", "best"):
            assert ckpt.restore(which=which).epoch == 1


def is_one_line(error):
    return "\n" not in str(error) and len(str(error)) < 2000


def put(kind, path):
    content = path.read_bytes() if path.is_file() else b""
    path.unlink()
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "link to a fifo":
            os.mkfifo(path.with_name("pipe"))
            path.symlink_to("pipe")
        case "directory":
            path.mkdir()
        case "socket":
            made, here = socket.socket(socket.AF_UNIX), os.getcwd()
            os.chdir(path.parent)  # the names of sockets are short
            made.bind(path.name)
            os.chdir(here)
            made.close()
        case "device":
            path.symlink_to("/dev/zero")
        case "loop":
            path.symlink_to(path.name)
        case "sparse":
            path.write_bytes(content)
            os.truncate(path, 2**40)


@pytest.mark.parametrize("what", ["fifo", "link to a fifo", "directory", "socket",
                                  "device", "loop", "sparse"])  # fmt: skip
@pytest.mark.parametrize("kind", ["files", "database", "compressed"])
def test_what_is_no_plain_file_is_damage_at_once(run, kind, what):
    root = run(kind)
    path = root / "3"
    found = [file for place in PLACES for file in path.glob(place) if file.is_file()]
    assert len(found) > 7
    for file in found:
        kept = file.with_name("kept")
        shutil.copy(file, kept)
        put(what, file)
        harmless, problems = 0, []
        for read in (flaxckpt.load, flaxckpt.verify, flaxckpt.load_weights):
            try:
                got = read(path)
            except CheckpointCorruptError as error:
                problems.append(error)
            else:  # it was not needed
                harmless += 1
                assert got is None or set(mutants.bits(got)) <= set(
                    mutants.bits(mutants.tree_for(kind, 2))
                )
        assert all(map(is_one_line, problems))
        if not harmless:
            falls_back(root)
        shutil.rmtree(
            file
        ) if file.is_dir() and not file.is_symlink() else file.unlink()
        kept.rename(file)
        (file.parent / "pipe").unlink(missing_ok=True)
    flaxckpt.verify(path)


def test_no_record_of_a_terabyte_is_read(tmp_path):
    """Also a whole one, with something behind it."""
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        path = ckpt.save({"w": np.ones(3)}, 0)
    for name in ("flaxckpt.json", "flaxckpt_leaves.json"):
        size = (path / name).stat().st_size
        os.truncate(path / name, 2**42)
        with pytest.raises(CheckpointCorruptError, match="bytes"):
            flaxckpt.load(path)
        os.truncate(path / name, size)
    flaxckpt.verify(path)


def change(path, file, change):
    value = json.loads((path / file).read_bytes())
    value = change(value) or value
    if file == "flaxckpt_leaves.json":
        mutants.sign(path, table=json.dumps(value).encode())
    elif file == "flaxckpt.json":
        mutants.sign(path, record=value)
    else:
        (path / file).write_bytes(json.dumps(value).encode())


def leaf_of(table, name):
    return next(leaf for leaf in table["leaves"] if leaf["path"] == [name])


# ---- memory that nothing was read into -----------------------------------------------------


@pytest.mark.direct
@pytest.mark.parametrize("chunk", [[-6, 8], [6, -8], [-6, -8], [-1, -1], [0, 8], [7, 8],
                                   [6, 16], [6], [6, 8, 1], [6.5, 8], [True, 8],
                                   ["6", 8], [4, 8], [2**70, 8]])  # fmt: skip
def test_chunks_that_cannot_be_are_damage(run, chunk):
    """A negative one gave memory that nothing was read into, and passed for verified."""
    root = run("files")

    def to(zarr):
        zarr["chunk_grid"]["configuration"]["chunk_shape"] = chunk
        zarr["codecs"][0]["configuration"]["chunk_shape"] = chunk

    change(root / "3", "state/w/zarr.json", to)

    def without_sums(table):  # what was compared was what was read: nothing
        table["sums"] = [[] for _ in table["sums"]]

    all_raise(root, "files")
    change(root / "3", "flaxckpt_leaves.json", without_sums)
    all_raise(root, "files")


def test_only_memory_that_was_filled_is_returned():
    class Nothing:
        def check_room(self, name, nbytes):
            pass

        def read_into(self, key, values, *, check):
            return []

    class Stored(_zarr.ZarrArray):
        def keys(self):
            yield "w/c.0", (0,)  # one of two

    stored = Stored("w", b"", np.dtype("float32"), (4,), (2,))
    with pytest.raises(_zarr.OtherwiseError):
        _read._read_parts(Nothing(), stored, [((0, 4),)], check=True)
    _read._read_parts(Nothing(), stored, [((0, 2),)], check=True)


@pytest.mark.parametrize("shape", [[2**40], [2**31, 2**31], [2**62], [2**20, 2**20]])
@pytest.mark.parametrize("kind", ["files", "compressed"])
def test_no_memory_is_taken_for_what_no_file_holds(run, kind, shape):
    root = run(kind)

    def to(table):
        leaf_of(table, "w")["shape"] = shape

    change(root / "3", "flaxckpt_leaves.json", to)
    if kind == "files":

        def large(zarr):
            zarr["shape"] = shape
            zarr["chunk_grid"]["configuration"]["chunk_shape"] = shape
            zarr["codecs"][0]["configuration"]["chunk_shape"] = shape

        change(root / "3", "state/w/zarr.json", large)
    all_raise(root, kind)


# ---- the table ---------------------------------------------------------------------------


def none(table):
    del table["digests"]


def one_less(table):
    table["digests"].pop()


def one_more(table):
    table["digests"].append(table["digests"][0])


def empty(table):
    table["digests"][0] = ""


def null(table):
    table["digests"][0] = None


@pytest.mark.parametrize("without", [none, one_less, one_more, empty, null])
@pytest.mark.parametrize("kind", ["files", "database", "compressed"])
def test_a_leaf_without_a_digest_does_not_verify(run, kind, without):
    root = run(kind)
    change(root / "3", "flaxckpt_leaves.json", without)
    all_raise(root, kind)


NAMES = ("../2/state/w", "/etc", "../../secret", "x/../../../secret", "./../secret", "..",
         "../w", "//", "w/../../../2/state/w")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["files", "database", "compressed"])
def test_no_name_leads_out_of_the_checkpoint(run, kind, name, tmp_path):
    """Neither to be read, nor to be listed in an error."""
    root = run(kind)
    if kind == "files":
        shutil.copytree(root / "2/state/w", tmp_path / "secret")

    def to(table):
        leaf_of(table, "w")["path"] = [name]
        for pair in table["tree"]["dict"]:
            if pair[0] == "w":
                pair[0] = name

    change(root / "3", "flaxckpt_leaves.json", to)
    for read in (flaxckpt.load, flaxckpt.verify, flaxckpt.load_weights):
        with pytest.raises(CheckpointCorruptError) as caught:
            read(root / "3")
        assert len(str(caught.value)) < 2000
    with pytest.raises(CheckpointError):
        flaxckpt.load(root / "3", verify=False)
    falls_back(root)


def nested(depth, kind="list"):
    value = 0
    for _ in range(depth):
        value = {kind: [value] if kind != "dict" else [["x", value]]}
    return value


@pytest.mark.parametrize("depth", [150, 300, 450, 900, 10**5])
@pytest.mark.parametrize("kind", ["list", "tuple", "dict"])
def test_what_is_nested_too_deeply_is_damage(run, depth, kind):
    root = run("database")
    path = root / "3"
    record = json.loads((path / "flaxckpt.json").read_bytes())
    one = '{"dict": [["x", ' if kind == "dict" else f'{{"{kind}": ['
    end = "]]}" if kind == "dict" else "]}"
    table = b'{"format": 1, "leaves": [], "digests": [], "weights": "all", "tree": '
    table += (one * depth + "null" + end * depth + "}").encode()
    (path / "flaxckpt_leaves.json").write_bytes(table)
    record["leaves_sha256"] = hashlib.sha256(table).hexdigest()
    mutants.sign(path, record=record)
    problems = []
    for read in (flaxckpt.load, flaxckpt.verify, flaxckpt.load_weights):
        try:
            found = read(path)
        except CheckpointError as error:
            problems.append(error)
        else:
            assert read is flaxckpt.verify or not jax.tree.leaves(found)
    assert all(map(is_one_line, problems))
    assert depth < 10**5 or len(problems) == 3


def test_a_small_file_of_nothing_but_brackets_is_damage(run):
    root = run("database")
    path = root / "3"
    record = json.loads((path / "flaxckpt.json").read_bytes())
    for data in (b"[" * 10**6, b'{"a":' * 10**5):
        (path / "flaxckpt_leaves.json").write_bytes(data)
        record["leaves_sha256"] = hashlib.sha256(data).hexdigest()
        mutants.sign(path, record=record)
        all_raise(root, "database")
        (path / "flaxckpt.json").write_bytes(data)
        all_raise(root, "database")
        mutants.sign(path, record=record)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("w", "dtype", "int32"),
        ("w", "dtype", "object"),
        ("w", "dtype", "O"),
        ("w", "shape", [8, 6]),
        ("w", "shape", [48]),
        ("w", "kind", "str"),
        ("w", "kind", "static"),
        ("n", "kind", "float"),
        ("n", "kind", "bool"),
        ("n", "kind", "str"),
        ("key", "impl", "rbg"),
        ("key", "impl", "nobody's"),
        ("key", "dtype", "key<rbg>"),
        ("raw", "kind", "key"),
    ],
)
@pytest.mark.parametrize("kind", ["files", "database"])
def test_kinds_of_leaves_are_compared_with_what_is_stored(
    run, kind, name, field, value
):
    """A table that is wrong about a leaf is damage, and no mismatch with `like`."""
    root = run(kind)
    change(
        root / "3",
        "flaxckpt_leaves.json",
        lambda table: leaf_of(table, name).update({field: value}),
    )
    all_raise(root, kind)


# ---- the record --------------------------------------------------------------------------


RECORDS = {
    "epoch": (-1, 1.0, True, "1", [1], 2**63, 10**400),
    "batch": (-1, 1.0, False, "1", {}),
    "step": (None, -1, 0.5, "x"),
    "logs": (None, [], 7, {"loss": []}, {"loss": {"float": 1}}, {"loss": {"a": "nan"}},
             {"loss": {"float": "nan", "x": 1}}, {"loss": {"float": "1_0"}}),
    "time": (None, 7, "", "now", "2026-01-01T00:00:00", "9999-12-31T23:59:59+00:00",
             "9999-12-31T23:59:59-14:00", "0001-01-01T00:00:00+14:00"),
    "weights_only": (None, 0, 1, "no", []),
    "series": (None, 7, ["{epoch}"]),
    "state": ([], {}, 7, {"best": 1.0}, {"monitor": []}),
    "leaves_sha256": (None, 7, [], "x"),
    "format": (None, 0, -1, 1.0, "1", True, 2, 10**30),
}  # fmt: skip


@pytest.mark.parametrize("field", RECORDS)
def test_a_record_of_other_values_is_damage(run, field):
    root = run("files")
    kept = (root / "3/flaxckpt.json").read_bytes()
    for value in RECORDS[field]:
        change(root / "3", "flaxckpt.json", lambda record: {**record, field: value})  # noqa: B023
        for read in (flaxckpt.load, flaxckpt.verify):
            if read is flaxckpt.verify and field not in ("format", "leaves_sha256"):
                continue
            with pytest.raises(CheckpointCorruptError) as caught:
                read(root / "3")
            assert "\n" not in str(caught.value)
            assert len(str(caught.value)) < 1000
        falls_back(root)
        (root / "3/flaxckpt.json").write_bytes(kept)
    change(root / "3", "flaxckpt.json", lambda record: {k: v for k, v in record.items() if k != field})  # fmt: skip
    with pytest.raises(CheckpointCorruptError):
        flaxckpt.load(root / "3")
    falls_back(root)


@pytest.mark.parametrize(
    "name", ["seen", "batches", "last_epoch", "last_batch", "best"]
)
def test_a_state_that_no_state_is_is_damage(run, name):
    root = run("files")
    for value in ("x", 2**31, 0.5, [], True, 10**400):
        if name == "best" and value == 0.5:
            continue
        change(root / "3", "flaxckpt.json", lambda record: record["state"].update({name: value}))  # noqa: B023  # fmt: skip
        falls_back(root)


def test_a_metric_that_no_float_can_be_is_no_metric(run):
    root = run("files")
    change(root / "3", "flaxckpt.json", lambda r: r["logs"].update(loss=-(10**400)))
    ckpt = ModelCheckpoint(root / "{epoch}", "loss", mode="min", save_best_only=True)
    assert ckpt.restore(which="best").epoch == 1
    assert ckpt.restore().epoch == 2
    assert ckpt.best.epoch == 1


# ---- what plain Orbax wrote ----------------------------------------------------------------


@pytest.mark.parametrize("what", ["fifo", "device", "sparse", "directory"])
def test_plain_orbax_s_checkpoints_are_looked_at_too(tmp_path, what):
    from orbax.checkpoint import v1 as ocp

    ocp.save(tmp_path / "plain", {"w": np.ones(3)})
    assert flaxckpt.load(tmp_path / "plain")["w"].tolist() == [1, 1, 1]
    names = [p.relative_to(tmp_path / "plain") for p in (tmp_path / "plain").rglob("*") if p.is_file()]  # fmt: skip
    for name in names:
        shutil.copytree(tmp_path / "plain", tmp_path / "bad")
        put(what, tmp_path / "bad" / name)
        try:
            found = flaxckpt.load(tmp_path / "bad")
        except CheckpointError:
            pass
        else:
            assert found["w"].tolist() == [1, 1, 1]
        shutil.rmtree(tmp_path / "bad")


def test_a_record_of_the_last_time_stops_no_save(tmp_path):
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        ckpt.save({"w": np.ones(3)}, 0)
        ckpt.wait()
        change(
            tmp_path / "1",
            "flaxckpt.json",
            lambda record: {**record, "time": "8999-12-31T23:59:59.999999+00:00"},
        )
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        for epoch in (1, 2):
            ckpt.save({"w": np.ones(3)}, epoch)
            ckpt.wait()
        assert [info.epoch for info in ckpt.checkpoints] == [0, 1, 2]


def test_latest_says_what_it_leaves_out(tmp_path):
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        for epoch in range(2):
            ckpt.save({"w": np.ones(3)}, epoch)
            ckpt.wait()
        (tmp_path / "2/flaxckpt.json").write_bytes(b"{}")
        with pytest.warns(UserWarning, match=r"Left out of the listing: .*/2"):
            assert ckpt.latest.epoch == 0
