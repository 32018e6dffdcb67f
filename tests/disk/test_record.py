"""The record and the table of leaves: what is written is read, and nothing else."""

import copy
import dataclasses
import datetime
import json
import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given

from flaxckpt._decision.reserved import LEAVES_FILE, RECORD_FILE
from flaxckpt._disk import record as _record
from flaxckpt._disk.fields import MalformedError, signed
from flaxckpt._disk.info import CheckpointInfo
from flaxckpt._disk.record import FORMAT, encode_record, read_leaves, read_record
from flaxckpt._disk.record_fields import LAST_TIME, check_record, parse_record
from flaxckpt._disk.table import parse_table
from flaxckpt._trees.describe import describe
from flaxckpt._trees.layout import Layout
from flaxckpt.errors import CheckpointCorruptError, CheckpointError

NOW = datetime.datetime(2026, 1, 2, 3, 4, 5, 6, datetime.UTC)
STATE = {"seen": 3, "batches": -1, "last_epoch": 0, "last_batch": -1, "monitor": "loss",
         "mode": "min", "save_best_only": True, "best": 0.5, "stale": 2, "met": None}  # fmt: skip
FIELDS = {"epoch": 3, "batch": 0, "step": 4, "logs": {"loss": 0.5}, "time": NOW, "state": STATE,
          "weights_only": False, "series": "{epoch}", "saved_as": "4"}  # fmt: skip
TABLE = b'{"format": 1, "leaves": [], "digests": [], "weights": "all", "tree": null}'


def info(path, **fields):
    return CheckpointInfo(path=path, **{**FIELDS, **fields})


def encoded(table=TABLE, **fields):
    return encode_record(info("x", **fields), {}, table)


def put(path, record, table=TABLE):
    (path / RECORD_FILE).write_bytes(record)
    (path / LEAVES_FILE).write_bytes(table)
    return path


def problem(read, path):
    with pytest.raises(CheckpointCorruptError) as caught:
        read(path)
    return caught.value.problem


whole, texts, floats = st.integers(0, 2**63 - 1), st.text(), st.floats()
scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | floats | texts
many = st.dictionaries(texts, scalars)
infos = st.fixed_dictionaries(
    {"epoch": whole, "batch": st.none() | whole, "step": whole, "logs": many,
     "time": st.timedeltas(datetime.timedelta(-700_000), LAST_TIME - NOW).map(NOW.__add__),
     "weights_only": st.booleans(), "series": texts, "saved_as": st.none() | texts,
     "state": st.none() | st.tuples(many, st.none() | floats).map(
         lambda drawn: {**drawn[0], **STATE, "best": drawn[1], "met": drawn[1]})}
)  # fmt: skip


def shown(info):
    return repr(dataclasses.astuple(info))  # there, NaN is NaN, and 0.0 is not -0.0


@given(infos, st.dictionaries(texts, texts))
@example({**FIELDS, "logs": {"a": math.nan, "b": -math.inf, "c": -0.0}}, {})
@example({**FIELDS, "logs": {"\x00\u2028\U0001f600": '{"float": "nan"}'}}, {})
def test_any_record_is_read_as_it_was_written(tmp_path, fields, versions):
    record = encode_record(info(tmp_path, **fields), versions, TABLE)
    found = read_record(put(tmp_path, record))
    assert shown(found) == shown(info(tmp_path, **fields))
    assert parse_record(record)[0]["versions"] == versions
    assert _record.is_same(found, info("moved", **fields))
    other = {**fields, "epoch": fields["epoch"] ^ 1}
    assert not _record.is_same(found, info(tmp_path, **other))


leaves = st.sampled_from([1, 2**63, -(2**64), 0.5, True, 1j, "x", "\ud800", b"xy", len, np.ones(2), None,
                          np.int8(1), np.zeros((0, 3), "f2"), np.ones((1, 2), "?")])  # fmt: skip


def containers(inner):
    dicts = st.dictionaries(texts, inner) | st.dictionaries(st.integers(), inner)
    return dicts | st.lists(inner) | st.lists(inner).map(tuple)


def table_of(tree):
    layout = describe(tree, lambda dtype: True)[0]
    held = sum(leaf.in_orbax for leaf in layout.leaves)
    digests, sums = ["xxh3:" + "0" * 16] * held, [["f" * 16]] * held
    table = {"format": FORMAT, **layout.to_json(), "weights": layout.skeleton}
    return layout, json.loads(json.dumps({**table, "digests": digests, "sums": sums}))


def parsed(table):
    return parse_table(json.dumps(table).encode(), FORMAT)


@given(st.recursive(leaves, containers))
def test_any_table_of_leaves_is_read_as_it_was_written(tree):
    layout, table = table_of(tree)
    assert parsed(table) == table
    assert Layout.from_json(parsed(table)).to_json() == layout.to_json()


ODD = (None, True, 0, -1, -(2**32), 1.5, 2**31, 2**63, "x", [], [1], {}, {"a": 1})
RECORD = {"epoch": (0, 2**31), "batch": (None, 0, 2**31), "step": (0, 2**31), "time": (),
          "logs": ({}, {"a": 1}), "weights_only": (True,), "series": ("x",), "state": (None,),
          "saved_as": ("x",), "leaves_sha256": ("x",)}  # what of these each may be  # fmt: skip
IN_STATE = {"seen": (0, -1), "batches": (0, -1), "last_epoch": (0, -1), "last_batch": (0, -1),
            "monitor": ("x",), "mode": ("x",), "save_best_only": (True,), "best": (None, 1.5)}  # fmt: skip


def is_malformed(fields, problem):
    with pytest.raises(MalformedError, match=problem):
        check_record(fields)


@pytest.mark.parametrize("name", [*RECORD, *IN_STATE])
def test_a_field_is_of_its_type_and_in_its_range(name):
    whole, _ = parse_record(encoded())
    for value in ODD:
        fields = copy.deepcopy(whole)
        (fields if name in RECORD else fields["state"])[name] = value
        if repr(value) in map(repr, {**RECORD, **IN_STATE}[name]):
            assert check_record(fields)
        else:
            is_malformed(fields, rf"({name}|seen).* is ")
    del (whole if name in RECORD else whole["state"])[name]
    if name != "saved_as":
        is_malformed(whole, f"{name} is missing")


def test_a_record_of_a_global_step_has_no_epoch_and_no_batch():
    fields, _ = parse_record(encoded())
    assert check_record({**fields, "epoch": None, "batch": None})
    is_malformed({**fields, "epoch": None, "batch": 1}, "epoch is missing")


@pytest.mark.parametrize("where", ["logs", "state"])
def test_a_metric_is_a_scalar_or_a_number_that_json_has_not(where):
    for text in ("[1]", "{}", "1e999", '{"float": 1}', '{"float": "nan", "x": 1}',
                 '{"float": "Infinity"}', '{"a": "nan"}'):  # fmt: skip
        fields, _ = parse_record(encoded())
        fields[where]["odd"] = json.loads(text)
        is_malformed(fields, rf"^{where}\['odd'\] is ")


TIMES = {"2026-01-01": False, "2026-01-01T00:00:00": False, "now": False, "": False,
         "8999-12-31T23:59:59.999999+00:00": True, "9000-01-01T00:00:00+00:00": False,
         "8999-12-31T23:59:59-00:01": False, "0001-01-01T00:00:00+14:00": False,
         "2026-01-01T01:00:00+01:00": True, "2026-01-01T00:00:00Z": True}  # fmt: skip


def test_a_time_has_a_zone_and_leaves_room_for_a_later_one():
    for text, is_good in TIMES.items():
        fields = {**parse_record(encoded())[0], "time": text}
        if is_good:
            assert check_record(fields)["time"] == datetime.datetime.fromisoformat(text)
        else:
            is_malformed(fields, "time is ")


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b'{"format": NaN}', b"[" * 10**5,
                                  b'{"format": 1}', b'{"format": 1, "sha256": 7}'])  # fmt: skip
def test_what_is_no_record_is_damage(tmp_path, data):
    assert "does not parse" in problem(read_record, put(tmp_path, data))
    assert _record.series_in(data.decode(errors="surrogateescape")) is None
    assert not _record.is_of(tmp_path, "{epoch}")


def test_a_newer_format_asks_for_an_upgrade(tmp_path):
    fields, _ = parse_record(encoded())
    assert fields["format"] == FORMAT
    theirs = {"format": FORMAT + 1, "sha256": "of another kind"}
    for record in (signed({"format": FORMAT + 1}), json.dumps(theirs).encode()):
        assert "upgrade" in problem(read_record, put(tmp_path, record))
    for number in (None, True, 0, -1, 1.0, "3", 2**31):
        put(tmp_path, signed({**fields, "format": number}))
        assert "not parse (format is" in problem(read_record, tmp_path)


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", ["epoch", "logs", "series", "state", "versions"])
def test_a_record_with_one_field_changed_is_not_what_was_written(
    tmp_path, name, indent
):
    record = json.loads(encoded())
    other = json.dumps({**record, name: "another"}, indent=indent).encode()
    assert "not what was written" in problem(read_record, put(tmp_path, other))
    assert _record.series_in(other.decode()) is None
    spelled = json.dumps(record, indent=indent).encode()  # in another way, or not
    put(tmp_path, spelled)
    assert (spelled == encoded()) == (indent == 1)
    assert _record.is_of(tmp_path, "{epoch}")
    assert not _record.is_of(tmp_path, "{batch}")


def test_a_record_is_as_large_as_one_may_be_and_no_larger(tmp_path, monkeypatch):
    size = len(encoded())
    monkeypatch.setattr(_record, "_RECORD_BYTES", size)
    assert read_record(put(tmp_path, encoded())).epoch == 3
    monkeypatch.setattr(_record, "_RECORD_BYTES", size - 1)
    with pytest.raises(CheckpointError, match=f"have {size} bytes, and may have"):
        encoded()
    assert f"has {size} bytes" in problem(read_record, tmp_path)


def test_a_table_is_that_of_its_record(tmp_path):
    table = put(tmp_path, encoded()) / LEAVES_FILE
    assert read_leaves(tmp_path) == json.loads(TABLE)
    table.write_bytes(TABLE + b" ")
    assert "leaves.json is not what was written" in problem(read_leaves, tmp_path)
    put(tmp_path, encoded(b"null"), b"null")
    assert "table of leaves does not parse" in problem(read_leaves, tmp_path)
    table.unlink()
    assert "leaves.json cannot be read" in problem(read_leaves, tmp_path)


LEAF, BYTES, TEXT = (("leaves", index) for index in range(3))
BAD = [
    (("format",), (None, True, 0, FORMAT + 1), "format is"),
    (("leaves",), (None, {}), "leaves is"),
    (LEAF, (None, []), "a leaf is"),
    ((*LEAF, "path"), ("a", [1], ["b"], []), "path is|is at"),
    ((*LEAF, "kind"), (None, "x", ["int"]), "kind"),
    ((*LEAF, "shape"), (None, [-1], [1.0], [True], [2**62], [1] * 65), "shape is"),
    ((*LEAF, "dtype"), (None, 7, "", "O", "f4,i4", "float32<a<b>>"), "dtype is"),
    ((*LEAF, "kind"), ("numpy_scalar", "key"), "scalar is of shape|impl is"),
    ((*LEAF, "kind"), ("int", "complex", "function"), "has a dtype or a shape"),
    ((*LEAF, "stored"), (None, [], [1], ["a", "b"], [""], [".."], ["a/../b"], ["/a"], ["a\\b"],
                         ["a\0"], ["\ud800"], ["a" * 256]), "stored"),
    ((*BYTES, "shape"), ([1, 1], []), "bytes are of shape"),
    ((*TEXT, "shape"), ([1, 1], []), "text is of shape"),
    (("tree",), (5, -1, None, {"list": [0]}), "of 3 is at|is at|has no place"),
    (("tree",), (True, "x", {}, {"list": [], "tuple": []}, {"set": []}), "structure"),
    (("tree",), ({"list": {}}, {"dict": [["a"]]}), "list is|pair is"),
    (("tree",), ({"dict": [["a", None], ["a", None]]}, {"dict": [[1.5, 0]]}), "a key at"),
    (("tree",), ({"same": [0]}, {"list": [{"same": [1]}, {"module": []}]}), "same as nothing"),
    (("weights",), (7, "none", {"list": [9]}), "of 3 is at|no structure"),
    (("digests",), (None, [None], [""], ["4:" + "0" * 16], ["0" * 16],
                  ["sum:" + "A" * 16]), "digest"),
    (("sums",), (None, [7], [["0" * 15]]), "sums|checksum"),
]  # fmt: skip


@pytest.mark.parametrize(("place", "values", "problem"), BAD)
def test_a_table_of_other_leaves_is_malformed(place, values, problem):
    for value in values:
        _, table = table_of({"a": np.ones(2), "b": b"xy", "c": "\ud800"})
        inner = table = parsed(table)
        for step in place[:-1]:
            inner = inner[step]
        inner[place[-1]] = value
        with pytest.raises(MalformedError, match=problem):
            parsed(table)
