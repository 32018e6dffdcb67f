"""A database that is written without TensorStore, as TensorStore reads and writes it."""

import itertools
import os
import random
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from hypothesis import given, settings
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flaxckpt._direct import ocdbt
from flaxckpt._direct import write as _write
from flaxckpt._direct.chunks import chunks_of
from flaxckpt._direct.form import Form
from flaxckpt._direct.zarr import ZarrArray, trailer_of
from flaxckpt._disk import page_cache
from flaxckpt._disk.files import Draft
from flaxckpt._orbax.share import finish_shares
from flaxckpt._trees.digest import combined, sum_here

pytestmark = pytest.mark.direct

names = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["w", "w.b", "layers.0", "layers.10", "ü" * 40, "L" * 300]),
)
keys = st.builds(
    "/".join, st.tuples(names, st.sampled_from(["zarr.json", "c/0/0", "c/1/0", "é"]))
)
sizes = st.dictionaries(
    keys,
    st.one_of(
        st.sampled_from([0, 1, 1023, 1024, 1025, 70_000, 300_001]), st.integers(0, 2000)
    ),
    min_size=1,
    max_size=20,
)


def values_of(sizes):
    dice = random.Random(0)
    return {key: dice.randbytes(size) for key, size in sizes.items()}


def write(directory, values, name="db"):
    with Draft(directory, sync=False) as draft:
        sizes = {key: len(value) for key, value in values.items()}
        with ocdbt.writing(draft, name, sizes) as put:
            for key, value in values.items():
                third = len(value) // 3
                put(key, [memoryview(value)[:third], value[third:]])
        draft.finish()
    return directory / name


def opened(directory, config=None):
    spec = {"driver": "ocdbt", "base": f"file://{directory}/", "config": config or {}}
    return tensorstore.KvStore.open(spec).result()


def content(directory):
    database = opened(directory)
    found = database.list().result()
    return {key.decode(): database.read(key).result().value for key in found}


def by_tensorstore(directory, values, config):
    database = opened(directory, config)
    transaction = tensorstore.Transaction(atomic=True)
    into = database.with_transaction(transaction)
    for key, value in values.items():
        into.write(key, value)
    transaction.commit_sync()
    return directory


def dumped(directory, node=None):
    base = tensorstore.KvStore.open(f"file://{directory}/").result()
    return tensorstore.ocdbt.dump(base, node).result()


def root_of(directory):
    """Return the last version in the manifest, and the path and bytes of its node."""
    version = dumped(directory)["versions"][-1]
    kind, _, path, start, size = version["root"]["location"].split(":")
    assert kind == "btreenode"
    found = (directory / path).read_bytes()
    return version, path, found[int(start) :][: int(size)]


@given(sizes, st.data())
def test_tensorstore_reads_all_values_and_any_part_of_them(sizes, data):
    values = values_of(sizes)
    with tempfile.TemporaryDirectory() as directory:
        path = write(Path(directory), values)
        assert content(path) == values
        database = opened(path)
        listed = [key.decode() for key in database.list().result()]
        assert listed == sorted(values, key=str.encode)
        key = data.draw(st.sampled_from(listed))
        start = data.draw(st.integers(0, len(values[key])))
        end = data.draw(st.integers(start, len(values[key])))
        part = slice(start, end)
        found = database.read(key, byte_range=part).result().value
        assert found == values[key][part]
        assert len([*path.rglob("*")]) == 3  # the manifest, d, and one file


@given(sizes)
def test_node_and_manifest_are_those_of_tensorstore(sizes):
    values = values_of(sizes)
    values = {key: values[key] for key in sorted(values, key=str.encode)}
    with tempfile.TemporaryDirectory() as directory:
        ours = write(Path(directory), values)
        theirs = by_tensorstore(Path(directory, "ts"), values, _write._DATABASE)
        version, name, node = root_of(ours)
        other_version, other_name, other_node = root_of(theirs)
        where, entries = 0, {}
        for key, value in values.items():
            is_inline = len(value) <= 1024
            entries[key.encode()] = len(value), value if is_inline else where
            where += 0 if is_inline else len(value)
        assert ocdbt.node_of(entries, name) == node
        assert ocdbt.node_of(entries, other_name) == other_node
        for each, path in ((version, name), (other_version, other_name)):
            del each["commit_time"], each["generation_number"]
            each["root"]["location"] = each["root"]["location"].replace(path, "")
        assert version == other_version
        manifests = dumped(ours), dumped(theirs)
        for manifest in manifests:
            del manifest["versions"], manifest["config"]["uuid"]
        assert manifests[0] == manifests[1]


@given(sizes, st.integers(50, 5000))
def test_where_tensorstore_has_several_nodes_none_is_written(sizes, limit):
    """TensorStore's one node may be larger; ours may not."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as path:
        patch.setattr(ocdbt, "NODE_BYTES", limit)
        config = {**_write._DATABASE, "max_decoded_node_bytes": limit}
        values, path = values_of(sizes), Path(path)
        by_tensorstore(path / "ts", values, config)
        is_one = not dumped(path / "ts")["versions"][-1]["root_height"]
        try:
            written = write(path, values)
        except ocdbt.NotOneNodeError:
            assert not (path / "db").exists()
            most = [len(k.encode()) + 16 + min(n, 1024) for k, n in sizes.items()]
            assert sum(most) > limit
        else:
            assert is_one
            assert content(written) == values


@pytest.mark.parametrize("sizes", [{}, {"k" * 2**16: 2000}])
def test_what_no_node_can_hold_is_refused(tmp_path, sizes):
    with pytest.raises(ocdbt.NotOneNodeError):
        write(tmp_path, values_of(sizes))


def test_many_keys_are_one_node(tmp_path):
    values = values_of({f"layers.{i}/c/0/0": i % 1024 for i in range(20_000)})
    with pytest.raises(ocdbt.NotOneNodeError):
        write(tmp_path, values)
    values = {key: value[:200] for key, value in values.items()}
    database = opened(write(tmp_path, values))
    assert database.list().result() == sorted(map(str.encode, values))
    for key in list(values)[::999]:
        assert database.read(key).result().value == values[key]


@given(sizes, st.integers(2, 4))
@settings(max_examples=25)
def test_orbax_merges_the_databases_of_processes(sizes, processes):
    values = values_of(sizes)
    with tempfile.TemporaryDirectory() as directory:
        state = Path(directory, "state")
        state.mkdir()
        for process in range(processes):
            part = dict(itertools.islice(values.items(), process, None, processes))
            if part:
                write(state, part, f"ocdbt.process_{process}")
        finish_shares(Path(directory), 0)
        assert content(state) == values


def test_tensorstore_finds_any_flipped_bit_of_node_and_manifest(tmp_path):
    values = values_of({"a/zarr.json": 20, "a/c/0": 2000})
    path = write(tmp_path, values)
    (data,) = (path / "d").iterdir()
    for file, first in ((path / "manifest.ocdbt", 0), (data, 2000)):
        whole = file.read_bytes()
        for at in range(first, len(whole)):
            spoilt = bytearray(whole)
            spoilt[at] ^= 1 << at % 8
            file.write_bytes(spoilt)
            with pytest.raises(ValueError, match=r"ocdbt|node|manifest"):
                content(path)
        file.write_bytes(whole)
    assert content(path) == values


@pytest.mark.parametrize("wrong", ["missing", "short", "long", "short inline"])
def test_a_wrong_value_leaves_no_database(tmp_path, wrong):
    sizes, parts = {"large": 3000, "small": 3}, {"large": 3000, "small": 3}
    if wrong == "missing":
        del parts["small"]
    else:
        parts["small" if "inline" in wrong else "large"] += 1 if wrong == "long" else -1
    with Draft(tmp_path, sync=False) as draft, pytest.raises(ValueError, match="value"):
        with ocdbt.writing(draft, "db", sizes) as put:
            for key, size in parts.items():
                put(key, [bytes(size)])
    assert not (tmp_path / "db/manifest.ocdbt").exists()


def stored(name, value, chunk, own_chunks=None, description=b"{}"):
    if own_chunks is None:
        grid = itertools.product(
            *(range(0, size, part) for size, part in zip(value.shape, chunk))  # noqa: B905
        )
        own_chunks = tuple(grid)
    dtype, shape = value.dtype, value.shape
    return ZarrArray(name, description, dtype, shape, chunk, own_chunks=own_chunks)


def shares():
    """Yield leaves, and how one of several processes may store them."""
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    dice = np.random.default_rng(0)

    def placed(shape, spec, dtype=np.float32):
        value = dice.normal(size=shape).astype(dtype)
        return jax.device_put(value, NamedSharding(mesh, P(*spec)))

    whole = placed((64, 32), ("x", "y"))
    yield whole, stored("pieces", whole, (16, 16))
    yield whole, stored("no description", whole, (16, 16), description=b"")
    copied = placed((64, 32), ("x",))
    yield copied, stored("parts of replicas", copied, (8, 32))
    yield copied, stored("columns of replicas", copied, (16, 16))
    yield copied, stored("some", copied, (16, 32), own_chunks=((0, 0), (32, 0)))
    odd = placed((12, 6), ("x",), jnp.bfloat16)
    yield odd, stored("odd", odd, (3, 6))
    yield copied, stored("none", copied, (16, 32), own_chunks=())
    for value in (np.arange(500_000.0), np.float32(3.5), np.ones((3, 5), bool)):
        yield value, stored("host", value, value.shape)


@pytest.mark.parametrize("way", ["by us", "by TensorStore"])
@pytest.mark.parametrize("process", [0, 1])
def test_a_share_is_written_alike_in_both_ways(tmp_path, monkeypatch, way, process):
    used = []
    if way == "by TensorStore":
        monkeypatch.setattr(ocdbt, "NODE_BYTES", 50)
    original = _write.database_at
    monkeypatch.setattr(
        _write, "database_at", lambda path: used.append(path) or original(path)
    )
    monkeypatch.setattr(_write, "_BATCH_BYTES", 2**40)
    values, arrays = zip(*shares(), strict=True)
    arrays = [
        ZarrArray(f"{i}", *list(vars(each).values())[1:])
        for i, each in enumerate(arrays)
    ]
    form = Form(True, {"state/_strings.json": b"{}"}, [*arrays, "text"], False)
    with Draft(tmp_path, sync=False) as draft:
        sums = _write.write_values_of_share(
            form, draft, tmp_path, [*values, "abc"], process
        )
        draft.finish()
    assert bool(used) == (way == "by TensorStore")
    written = [
        combined((start, chunk) for _, start, chunk in chunks_of(array, value))
        for array, value in zip(arrays, values, strict=True)
    ]
    assert sums == [*written, sum_here("abc") * (process == 0)]
    found = content(tmp_path / f"state/ocdbt.process_{process}")
    for array, value in zip(arrays, values, strict=True):
        if array.description:
            assert found.pop(array.description_key) == b"{}"
        for key, start in array.keys():
            index = tuple(
                slice(at, at + size)
                for at, size in zip(start, array.chunk, strict=True)
            )
            part = np.asarray(value)[index]
            assert found.pop(key) == part.tobytes() + trailer_of(part.nbytes)
    assert not found


def test_more_than_one_node_can_hold_is_left_to_tensorstore(tmp_path, monkeypatch):
    def is_by_us():
        value = np.ones(2**18, np.uint8)
        form = Form(True, {}, [stored("w", value, value.shape)], False)
        path = Path(tempfile.mkdtemp(dir=tmp_path))
        with Draft(path, sync=False) as draft:
            _write.write_values_of_share(form, draft, path, [value], 0)
        database = path / "state/ocdbt.process_0"
        assert content(database)["w/c/0"][:-20] == value.tobytes()
        return len(dumped(database)["versions"]) == 1  # TensorStore has an empty one

    assert is_by_us()
    monkeypatch.setattr(ocdbt, "NODE_BYTES", 50)
    assert not is_by_us()


@pytest.mark.parametrize("goes_past", [False, True])
def test_values_are_written_from_their_memory_or_by_one_buffer(
    tmp_path, monkeypatch, goes_past
):
    """Through the page cache, from their own memory; past it, from the buffer."""
    value = np.arange(500_000.0)
    seen, original = [], os.write
    monkeypatch.setattr(page_cache, "is_on_disk", lambda descriptor: goes_past)

    def note(descriptor, part):
        seen.append((np.frombuffer(part, np.uint8).ctypes.data, len(part)))
        return original(descriptor, part)

    form = Form(True, {}, [stored("w", value, value.shape)], False)
    monkeypatch.setattr(os, "write", note)
    with Draft(tmp_path, sync=False) as draft:
        _write.write_values_of_share(form, draft, tmp_path, [value], 0)
    own = range(value.ctypes.data, value.ctypes.data + value.nbytes)
    inside = [size for start, size in seen if start in own]
    if goes_past:
        large = [start for start, size in seen if size > 2**16]
        assert len(set(large)) == 1
        assert not inside
    else:
        assert sum(inside) == value.nbytes
        assert max(inside) <= 2**20
