"""Every kind of leaf is stored bit for bit as its kind, or refused at the call."""

import datetime
import decimal
import enum
import fractions
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from saved_trees import assert_same

import flaxckpt
from flaxckpt import ModelCheckpoint, UnsupportedLeafError

ML_DTYPES = [
    name
    for name in sorted(vars(ml_dtypes))
    if isinstance(getattr(ml_dtypes, name), type)
    and not name.startswith(("finfo", "iinfo"))
]


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Flag(enum.IntFlag):
    A = 1
    B = 2


class Name(enum.StrEnum):
    A = "a"


class Rate(float):
    """A number with a unit, say."""


class Table(np.ndarray):
    """An array that may know more than its elements."""


def big_endian(dtype):
    return np.arange(6, dtype=dtype).reshape(2, 3)


def read_only():
    array = np.arange(4.0)
    array.flags.writeable = False
    return array


def mapped(tmp_path):
    array = np.memmap(tmp_path / "mapped", np.float32, "w+", shape=(3, 2))
    array[:] = np.arange(6).reshape(3, 2)
    return array


# What comes back, where that is not what was saved in all respects.
HOST = {
    "read-only": (read_only, None),
    "fortran": (lambda: np.asfortranarray(np.arange(6.0).reshape(2, 3)), None),
    "strided": (lambda: np.arange(24.0).reshape(4, 6)[::2, ::-3], None),
    "broadcast": (lambda: np.broadcast_to(np.float32(3), (2, 2)), None),
    "zero_d": (lambda: np.array(2, np.int16), None),
    "zero_d bool": (lambda: np.array(True), None),
    "bool_": (lambda: np.bool_(False), None),
    "float64 scalar": (lambda: np.float64(0.1), None),
    "complex scalar": (lambda: np.complex64(1 - 2j), None),
    "signalling": (
        lambda: np.array([0x7F800001, 0xFFC00123], np.uint32).view("f4"),
        None,
    ),
    "big": (lambda: big_endian(">f4"), lambda: big_endian("f4")),
    "big ints": (lambda: big_endian(">i8"), lambda: big_endian("i8")),
    "big scalar": (lambda: np.dtype(">i4").type(5), lambda: np.int32(5)),
    "least": (lambda: -(2**63), None),
    "beyond int64": (lambda: 2**63, None),
    "greatest of uint64": (lambda: 2**64 - 1, None),
    "beyond uint64": (lambda: 2**64, None),
    "of 128 bits": (lambda: 2**128 - 1, None),
    "below int64": (lambda: -(2**63) - 1, None),
    "of many digits": (lambda: -(10**5000), None),
    "generator": (lambda: np.random.default_rng(3).bit_generator.state, None),
    "nan": (lambda: float("nan"), None),
}
REFUSED = {
    "text array": lambda: np.array(["a", "bc"]),
    "bytes array": lambda: np.array([b"a"]),
    "object array": lambda: np.array([1, "a", None], dtype=object),
    "object scalar": lambda: np.array(None, dtype=object),
    "time": lambda: np.datetime64("2026-01-01"),
    "times": lambda: np.array(["2026"], "M8[s]"),
    "span": lambda: np.timedelta64(3, "s"),
    "record": lambda: np.zeros(2, [("a", "f4"), ("b", "i4")]),
    "record scalar": lambda: np.zeros(2, [("a", "f4")])[0],
    "recarray": lambda: np.rec.array([(1, 2.0)]),
    "void": lambda: np.zeros(2, "V3"),
    "no bits": lambda: np.zeros(3, jax.dtypes.float0),
    "masked": lambda: np.ma.array([1, 2], mask=[0, 1]),
    "masked scalar": lambda: np.ma.masked,
    "subclass": lambda: np.ones((1, 2)).view(Table),
    "long double": lambda: np.longdouble(1),
    "long complex": lambda: np.clongdouble(1),
    "numpy text": lambda: np.str_("a"),
    "numpy bytes": lambda: np.bytes_(b"a"),
    "path": lambda: pathlib.Path("a"),
    "date": lambda: datetime.datetime(2026, 1, 1),
    "decimal": lambda: decimal.Decimal("0.1"),
    "fraction": lambda: fractions.Fraction(1, 3),
    "range": lambda: range(3),
    "set": lambda: {1, 2},
    "frozenset": lambda: frozenset((1,)),
    "bytearray": lambda: bytearray(b"a"),
    "memoryview": lambda: memoryview(b"a"),
    "slice": lambda: slice(1),
    "ellipsis": lambda: ...,
    "enum": lambda: enum.Enum("E", "A").A,
    "dtype": lambda: np.dtype("f4"),
    "iterator": lambda: iter([1]),
    "ref": lambda: jax.new_ref(jnp.ones(2)),
    "device": lambda: jax.devices()[0],
    "empty and too large": lambda: np.zeros((0, 2**60), np.int8),
    "digits": lambda: {10**5000: 1.0},
    "digits below": lambda: [{"a": {10**5000: jnp.ones(2)}}],
    "digits in a pair": lambda: {(10**5000, 1): 1.0},
    "struct": lambda: jax.ShapeDtypeStruct((2,), jnp.float32),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """All of them in one checkpoint, and without and with `like`."""
    path = tmp_path_factory.mktemp("kinds")
    tree = {name: make() for name, (make, _) in HOST.items()}
    tree["mapped"] = mapped(path)
    with ModelCheckpoint(path / "a") as ckpt:
        ckpt.save(tree, 0)
    return tree, flaxckpt.load(path / "a"), flaxckpt.load(path / "a", tree)


@pytest.mark.parametrize("name", [*HOST, "mapped"])
def test_stored_bit_for_bit(found, name):
    tree, plain, like = found
    made = HOST.get(name, (None, None))[1]
    want = made() if made else tree[name]
    if name == "mapped":
        want = np.asarray(want)
    assert_same(plain[name], want)
    assert_same(like[name], want)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_the_call(tmp_path, name):
    tree = {"good": jnp.ones(2), "bad": REFUSED[name]()}
    ckpt = ModelCheckpoint(tmp_path / "a/{epoch}")
    for call in (
        lambda: ckpt.save(tree, 0),
        lambda: ckpt.update(ckpt.init(), tree, {}, 0),
    ):
        with pytest.raises(UnsupportedLeafError, match=r"\n  bad(/.*)?: ") as caught:
            call()
        assert "good" not in str(caught.value)
    assert not (tmp_path / "a").exists()
    ckpt.close()


@pytest.mark.parametrize("where", ["host", "scalar", "device"])
@pytest.mark.parametrize("name", ML_DTYPES)
def test_small_floats_and_ints(tmp_path, name, where):
    """Each of them, whichever this version of TensorStore stores."""
    dtype = np.dtype(getattr(ml_dtypes, name))
    bits = np.arange(256, dtype=np.uint8)
    if dtype.itemsize == 2:
        bits = np.arange(2**16, dtype=np.uint16)
    size = 256
    try:
        size = 2 ** ml_dtypes.iinfo(dtype).bits
    except ValueError:
        size = 2 ** ml_dtypes.finfo(dtype).bits
    array = bits[: min(size, len(bits))].view(dtype)
    if "int" in name:  # signs fill the byte
        array = array.astype(np.float32).astype(dtype)
    tree = {"a": array, "b": np.ones(2)}
    if where == "scalar":
        tree["a"] = array[-1]
    if where == "device":
        try:
            tree["a"] = jax.device_put(array)
            tree["a"].block_until_ready()
        except Exception:
            pytest.skip(f"JAX has no {name} here")
    ckpt = ModelCheckpoint(tmp_path / "{epoch}")
    try:
        ckpt.save(tree, 0)
    except UnsupportedLeafError as error:
        ((leaf, _),) = error.leaves
        assert leaf == "a"
        assert not list(tmp_path.iterdir())
        return
    ckpt.save(tree, 1)
    ckpt.close()
    for epoch in (1, 2):
        path = tmp_path / str(epoch)
        assert_same(flaxckpt.load(path), tree)
        assert_same(flaxckpt.load(path, tree), tree)
        flaxckpt.verify(path)


def test_numbers_and_texts_of_own_types(tmp_path):
    """Plain without `like`, which has the type."""
    tree = {"a": Level.HIGH, "b": Flag.A | Flag.B, "c": Name.A, "d": Rate(0.1), "e": 3}
    with ModelCheckpoint(tmp_path / "a") as ckpt:
        path = ckpt.save(tree, 0)
    plain = flaxckpt.load(path)
    assert [type(leaf) for leaf in plain.values()] == [int, int, str, float, int]
    assert plain == tree
    like = {"a": Level.LOW, "b": Flag.A, "c": Name.A, "d": Rate(0), "e": 0}
    found = flaxckpt.load(path, like)
    assert found == tree
    assert list(map(type, found.values())) == list(map(type, tree.values()))
    with pytest.raises(
        flaxckpt.CheckpointMismatchError, match="3 is not a valid Level"
    ):
        flaxckpt.load(path, {**like, "e": Level.LOW})


def test_a_function_that_no_like_has_is_said_to_be_none(tmp_path):
    mesh = jax.make_mesh((1,), ("x",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    tree = {"f": jax.nn.relu, "w": jnp.ones(2), "g": {"h": jnp.tanh}}
    with ModelCheckpoint(tmp_path / "a") as ckpt:
        path = ckpt.save(tree, 0)
    likes = {
        "none": (None, "f, g/h"),
        "all": (place, "f, g/h"),
        "one": ({"f": place, "w": place, "g": {"h": jnp.tanh}}, "f"),
        "part": ({"f": jax.nn.relu, "w": place, "g": place}, "g/h"),
    }
    for like, names in likes.values():
        with pytest.warns(UserWarning, match=f"holds no functions.*: {names}\\. The"):
            found = flaxckpt.load(path, like)
        assert np.array_equal(found["w"], tree["w"])
    like = {"f": jax.nn.relu, "w": place, "g": {"h": jnp.tanh}}
    assert flaxckpt.load(path, like)["f"] is jax.nn.relu  # warnings are errors


def test_a_generator_of_numpy_goes_on_where_it_was(tmp_path):
    generator = np.random.default_rng(7)
    generator.normal(size=3)
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        for epoch in range(2):  # by Orbax, and straight from memory
            ckpt.save({"rng": generator.bit_generator.state}, epoch)
    wanted = generator.normal(size=5)
    for name in ("1", "2"):
        other = np.random.default_rng(0)
        state = other.bit_generator.state
        other.bit_generator.state = flaxckpt.load(tmp_path / name, {"rng": state})[
            "rng"
        ]
        assert (other.normal(size=5) == wanted).all()


@pytest.mark.parametrize("settings", [{"compress": True}, {"engine": "orbax"}])
def test_a_large_integer_that_orbax_reads_is_one_of_python(tmp_path, settings):
    tree = {"a": 2**63, "b": 2**64, "c": -(2**70)}
    with ModelCheckpoint(tmp_path / "a", **settings) as ckpt:
        path = ckpt.save(tree, 0)
    assert_same(flaxckpt.load(path), tree)
    assert_same(flaxckpt.load(path, tree), tree)


@pytest.mark.parametrize("number", [2**63, 2**64, 2**100])
def test_a_large_integer_fits_only_what_holds_it(tmp_path, number):
    with ModelCheckpoint(tmp_path / "a") as ckpt:
        path = ckpt.save({"n": number}, 0)
    assert flaxckpt.load(path, {"n": 3})["n"] == number
    for like in (np.int64(0), jnp.int32(0), np.zeros(3, np.uint8)):
        with pytest.raises(flaxckpt.CheckpointMismatchError):
            flaxckpt.load(path, {"n": like})
    if number < 2**64:
        assert flaxckpt.load(path, {"n": np.uint64(0)})["n"] == number
