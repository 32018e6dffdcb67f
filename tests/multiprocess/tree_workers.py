"""A table of trees, each of which the processes of a pod save in two ways.

A process makes the arrays of a tree on devices; the test makes the same tree of numpy
arrays, to compare it with what plain Orbax reads.
"""

import collections
import dataclasses
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from orbax.checkpoint import v1

import flaxckpt

P = PartitionSpec
TREES, EVERYWHERE = {}, []
TIMEOUT_SECS = 20
# Where one process raises, Orbax has the others wait for it. So it is not asked.
STUCK = frozenset((
    "dtype_uint1", "dtype_int1", "numpy_float6", "numpy_dates", "numpy_text",
    "numpy_structured", "numpy_objects", "big_int", "raw_bytes", "no_bytes",
    "of_the_first_processes", "of_the_last_processes", "of_each_half",
    "of_one_process", "pinned_part",
))  # fmt: skip


def tree(make):
    """Put a tree into the table, under its name."""
    TREES[make.__name__] = make
    return make


def everywhere(make):
    """Put a tree into the table, and into the list of those to save in more ways."""
    EVERYWHERE.append(make.__name__)
    return tree(make)


def random(*shape, dtype=np.float32, seed=0):
    """Make values of any dtype, most of whose bits are random."""
    numbers = np.random.default_rng(seed).integers(0, 128, shape)
    return (numbers % 2 if "int1" in str(dtype) else numbers).astype(dtype)


class OnDevices:
    """Makes arrays on the devices of all processes."""

    def __init__(self):
        found = collections.defaultdict(list)
        for device in jax.devices():
            found[device.process_index].append(device)
        self.devices = [found[index] for index in sorted(found)]
        self.index = jax.process_index()

    def mesh(self, *shape, devices=None):
        devices = np.array(jax.devices() if devices is None else devices)
        return Mesh(devices.reshape(shape or -1), ("data", "model")[: len(shape) or 1])

    def half(self, axes=2):
        """Return a mesh of two rows, or of all devices for one axis."""
        number = jax.device_count()
        return self.mesh(2, number // 2) if axes == 2 else self.mesh(number)

    def put(self, value, *spec, mesh=None, memory=None):
        """Put values on a mesh."""
        value = np.asarray(value)
        mesh = mesh or self.half()
        sharding = NamedSharding(mesh, P(*spec), memory_kind=memory)
        return self.spread(value, sharding)

    def spread(self, value, sharding):
        with jax.enable_x64(True):
            parts = [
                jax.device_put(
                    value[at], SingleDeviceSharding(d, memory_kind=sharding.memory_kind)
                )
                for d, at in sharding.addressable_devices_indices_map(
                    value.shape
                ).items()
            ]
            return jax.make_array_from_single_device_arrays(
                value.shape, sharding, parts, dtype=value.dtype
            )

    def keys(self, number, impl, *spec):
        sharding = NamedSharding(self.half(), P(*spec))
        make = lambda: _keys(number, impl)  # noqa: E731
        return jax.jit(make, out_shardings=sharding)()

    def local(self, value):
        return jax.device_put(value, jax.local_devices()[0])

    def on_last(self, value):
        return jax.device_put(value, jax.local_devices()[-1])


class OnHost:
    """Makes the same trees of numpy arrays."""

    index = 0

    def __init__(self, counts):
        self.devices = [[None] * count for count in counts]

    def mesh(self, *shape, devices=None):
        return None

    half = mesh

    def put(self, value, *spec, mesh=None, memory=None):
        return np.asarray(value)

    def spread(self, value, sharding):
        return value

    def keys(self, number, impl, *spec):
        return _keys(number, impl)

    def local(self, value):
        return np.asarray(value)

    on_last = local


def _keys(number, impl):
    key = jax.random.key(7, impl=impl)
    return key if number is None else jax.random.split(key, number)


# ---- dtypes --------------------------------------------------------------------------

DTYPES = (
    "bool", "int2", "int4", "int8", "int16", "int32", "uint8", "uint16", "uint32",
    "float4_e2m1fn", "float8_e3m4", "float8_e4m3b11fnuz", "float8_e4m3fn",
    "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
    "float16", "bfloat16", "float32", "complex64",
)  # fmt: skip
DTYPES_OF_64_BITS = "int64", "uint64", "float64", "complex128"


def _of_dtype(w, name):
    value = random(8, 16, dtype=jnp.dtype(name))
    return {
        "w": w.put(value, "data", "model"),
        "whole": w.put(value[1]),
        "host": value[2],
        "scalar": w.put(value[0, 0]),
    }


@tree
def dtypes(w):
    return {name: _of_dtype(w, name) for name in DTYPES}


@everywhere
def dtypes_of_64_bits(w):
    return {name: _of_dtype(w, name) for name in DTYPES_OF_64_BITS}


def _add_dtypes(*names):
    for name in names:
        TREES[f"dtype_{name}"] = lambda w, name=name: {"of_dtype": _of_dtype(w, name)}


_add_dtypes("uint1", "int1", "uint2", "uint4", "float8_e4m3")


@tree
def numpy_dtypes(w):
    names = *DTYPES, *DTYPES_OF_64_BITS
    return {name: random(4, 6, dtype=jnp.dtype(name)) for name in names}


@tree
def numpy_float6(w):
    six = random(8, dtype=ml_dtypes.float6_e2m3fn)
    return {"w": w.put(random(8), "data"), "six": six}


@tree
def numpy_dates(w):
    when = np.array(["2026-01-01"], "datetime64[s]")
    return {"w": w.put(random(8), "data"), "when": when}


# ---- keys ----------------------------------------------------------------------------


@everywhere
def keys_whole(w):
    return {impl: w.keys(None, impl) for impl in ("threefry2x32", "rbg", "unsafe_rbg")}


@everywhere
def keys_many(w):
    return {"replicated": w.keys(6, "threefry2x32"), "rbg": w.keys(6, "rbg")}


@everywhere
def keys_sharded(w):
    return {
        "rows": w.keys((8, 4), "threefry2x32", "data"),
        "both": w.keys((8, 4), "rbg", "data", "model"),
    }


@everywhere
def keys_local(w):
    return {"one": jax.random.key(3), "many": jax.random.split(jax.random.key(3), 4)}


@everywhere
def keys_none(w):
    """Arrays of no keys."""
    return {
        "none": w.keys((8, 0), "threefry2x32", "data"),
        "w": w.put(random(8), "data"),
        "local": jax.random.split(jax.random.key(3), 0),
    }


@everywhere
def keys_pinned(w):
    if w.half() is None:
        return {"rows": w.keys((8, 4), "rbg")}
    data = np.asarray(jax.random.key_data(_keys((8, 4), "rbg")))
    rows = w.put(data, "data", memory="pinned_host")
    return {"rows": jax.random.wrap_key_data(rows, impl="rbg")}


@everywhere
def keys_raw(w):
    return {"raw": jax.random.PRNGKey(3), "w": w.put(random(8), "data")}


# ---- shapes and placements -----------------------------------------------------------


@everywhere
def scalars(w):
    return {"a": w.put(np.float32(2.5)), "b": w.put(np.int8(-3)), "c": w.put(np.True_)}


@everywhere
def empty_arrays(w):
    return {
        "none": w.put(np.zeros(0, np.float32)),
        "rows": w.put(np.zeros((0, 4), jnp.bfloat16), None, "model"),
        "sharded": w.put(np.zeros((8, 0), np.int32), "data"),
        "host": np.zeros((3, 0)),
        "local": w.local(np.zeros((0, 2), np.float32)),
        "w": w.put(random(8), "data"),
    }


@everywhere
def only_empty_arrays(w):
    return {"none": w.put(np.zeros((8, 0), np.float32), "data")}


@everywhere
def one_axis(w):
    mesh = w.half(1)
    return {
        "a": w.put(random(8, 3), "data", mesh=mesh),
        "b": w.put(random(3, 8), None, "data", mesh=mesh),
    }


@everywhere
def two_axes(w):
    return {
        "both": w.put(random(8, 12), "data", "model"),
        "joined": w.put(random(8, 3), ("data", "model")),
        "turned": w.put(random(8, 12), "model", "data"),
    }


@everywhere
def partly_replicated(w):
    return {
        "by_data": w.put(random(8, 3), "data"),
        "by_model": w.put(random(8, 3), "model"),
        "whole": w.put(random(5, 3)),
        "large": w.put(random(256, 300), "model"),
        "larger": w.put(random(512, 600, seed=1)),
    }


@everywhere
def odd_replicas(w):
    """Replicated arrays of which no axis can be divided between the replicas."""
    return {
        "a": w.put(random(3, 5, 7)),
        "b": w.put(random(1)),
        "c": w.put(random(2, 3), "data"),
    }


@everywhere
def turned_mesh(w):
    devices = None if w.half() is None else jax.devices()[::-1]
    mesh = w.mesh(2, sum(map(len, w.devices)) // 2, devices=devices)
    return {
        "a": w.put(random(8, 4), "data", "model", mesh=mesh),
        "b": w.put(random(8), mesh=mesh),
        "c": w.put(random(8), "model", mesh=mesh),
    }


@everywhere
def interleaved_mesh(w):
    devices = None if w.half() is None else [*jax.devices()[1::2], *jax.devices()[::2]]
    mesh = w.mesh(2, sum(map(len, w.devices)) // 2, devices=devices)
    return {
        "a": w.put(random(8, 4), "data", mesh=mesh),
        "b": w.put(random(8), mesh=mesh),
    }


@everywhere
def two_meshes(w):
    """Arrays on two meshes of the same devices in another order."""
    devices = None if w.half() is None else jax.devices()[::-1]
    mesh = w.mesh(sum(map(len, w.devices)), devices=devices)
    return {
        "a": w.put(random(8, 4), "data", "model"),
        "b": w.put(random(8, 2), "data", mesh=mesh),
    }


def _of_some(w, processes, per=None):
    if w.half() is None:
        return None
    devices = [d for index in processes for d in w.devices[index][:per]]
    return w.mesh(len(devices), devices=devices)


@everywhere
def of_the_first_processes(w):
    """Arrays of which the last process has no part."""
    mesh = _of_some(w, range(len(w.devices) - 1))
    return {
        "part": w.put(random(12, 2), "data", mesh=mesh),
        "all": w.put(random(8), "data"),
    }


@everywhere
def of_the_last_processes(w):
    """Arrays of which process 0 has no part."""
    mesh = _of_some(w, range(1, len(w.devices)))
    return {
        "part": w.put(random(12, 2), "data", mesh=mesh),
        "whole": w.put(random(3), mesh=mesh),
        "all": w.put(random(8), "data"),
    }


@everywhere
def of_each_half(w):
    """Two halves, of which each process has one."""
    half = len(w.devices) // 2
    meshes = [_of_some(w, range(half)), _of_some(w, range(half, len(w.devices)))]
    return [w.put(random(12, 2), "data", mesh=mesh) for mesh in meshes]


@everywhere
def of_one_process(w):
    """An array whose devices are all of one process, and not of the others."""
    mesh = _of_some(w, [len(w.devices) - 1])
    return {
        "part": w.put(random(12, 2), "data", mesh=mesh),
        "all": w.put(random(8), "data"),
    }


@everywhere
def one_device_of_each(w):
    mesh = _of_some(w, range(len(w.devices)), 1)
    return {
        "part": w.put(random(12, 2), "data", mesh=mesh),
        "whole": w.put(random(3), mesh=mesh),
    }


@everywhere
def local_arrays(w):
    """Arrays of each process's own devices, with equal values."""
    return {
        "first": w.local(random(4, 3)),
        "last": w.on_last(random(5)),
        "half": w.local(random(7, dtype=jnp.bfloat16)),
        "scalar": w.local(np.int32(4)),
        "all": w.put(random(8), "data"),
    }


@everywhere
def local_meshes(w):
    """Arrays on a mesh of each process's own devices, with equal values."""
    replica = w.put(random(8, 4, seed=2))
    if w.half() is None:
        return {"a": random(12, 2), "b": random(3), "replica": replica}
    mesh = w.mesh(len(w.devices[w.index]), devices=jax.local_devices())
    return {
        "a": w.put(random(12, 2), "data", mesh=mesh),
        "b": w.put(random(3), mesh=mesh),
        "replica": replica,
    }


@everywhere
def host_values_alone(w):
    """All of them are in the share of process 0."""
    return {"a": random(5), "b": 3, "c": "some"}


@everywhere
def gspmd_sharding(w):
    value = random(8, 3)
    if w.half() is None:
        return {"a": value}
    from jax._src.sharding_impls import GSPMDSharding

    named = NamedSharding(w.half(1), P("data"))
    sharding = GSPMDSharding(tuple(jax.devices()), named._to_xla_hlo_sharding(2))
    return {"a": w.spread(value, sharding)}


@everywhere
def made_by_jit(w):
    """What a program returns, with whatever sharding XLA has chosen."""
    a, b = w.put(random(8, 4), "data", "model"), w.put(random(4), "model")
    if w.half() is None:
        return {"sum": a + b, "total": (a + b).sum(), "turned": a.T, "row": a[2]}
    with jax.set_mesh(w.half()):
        return jax.jit(
            lambda a, b: {
                "sum": a + b,
                "total": (a + b).sum(),
                "turned": a.T,
                "row": a[2],
            }
        )(a, b)


@everywhere
def pinned(w):
    return {
        "a": w.put(random(8, 4), "data", "model", memory="pinned_host"),
        "b": w.put(random(8), memory="pinned_host"),
    }


@everywhere
def unpinned(w):
    return {
        "a": w.put(random(8, 4), "data", "model", memory="unpinned_host"),
        "b": w.put(random(8), memory="unpinned_host"),
    }


@everywhere
def memories(w):
    kinds = "device", "pinned_host", "unpinned_host"
    return {kind: w.put(random(8, 4), "data", memory=kind) for kind in kinds}


@everywhere
def pinned_local(w):
    if w.half() is None:
        return {"a": random(8, 4)}
    sharding = SingleDeviceSharding(jax.local_devices()[0], memory_kind="pinned_host")
    return {"a": jax.device_put(random(8, 4), sharding)}


@everywhere
def pinned_part(w):
    mesh = _of_some(w, range(len(w.devices) - 1))
    return {
        "a": w.put(random(12, 4), "data", mesh=mesh, memory="pinned_host"),
        "b": w.put(random(12, 4), mesh=mesh, memory="pinned_host"),
    }


# ---- names ---------------------------------------------------------------------------


def _named(w, *names):
    return {name: w.put(random(8, seed=i), "data") for i, name in enumerate(names)}


@tree
def long_names(w):
    return _named(w, *("L" * n for n in (199, 200, 201, 250, 255, 256, 300, 1000)))


@tree
def name_of_200(w):
    return _named(w, "n" * 200)


@tree
def name_of_250(w):
    return _named(w, "n" * 250)


@tree
def name_of_1000(w):
    return _named(w, "n" * 1000)


@tree
def unicode_names(w):
    return _named(w, "é", "e\u0301", "層", "🙂" * 70, "ß", "a\u200db")


@tree
def names_with_slashes(w):
    return _named(w, "mlp/~/linear", "a/b/c", "a/b/d", "x")


@tree
def names_with_dots(w):
    return {
        **_named(w, "a.b", "..", ".", "a..b", "c."),
        "a": {"b": w.put(random(8), "data")},
    }


@tree
def names_with_spaces(w):
    return _named(w, " ", "a b", " a", "a ", "\n", "\t")


@tree
def names_that_are_empty(w):
    return {"": w.put(random(8), "data"), "a": {"": w.put(random(8, seed=1), "data")}}


@tree
def names_of_files(w):
    return _named(
        w,
        "_METADATA",
        "_sharding",
        "manifest.ocdbt",
        "ocdbt.process_0",
        "ocdbt.process_1",
        "process_0",
        "zarr.json",
        "c",
        "d",
        "array_metadatas",
    )


@tree
def names_that_are_numbers(w):
    return {1: w.put(random(8), "data"), 2: {"3": w.put(random(8, seed=1), "data")}}


@tree
def names_that_collide(w):
    return {
        "a": {"b.c": w.put(random(8), "data")},
        "a.b": {"c": w.put(random(8, seed=1), "data")},
    }


# ---- structures ----------------------------------------------------------------------

Pair = collections.namedtuple("Pair", "one other")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Data:
    """A dataclass that JAX knows."""

    w: object
    b: object


@tree
def deep(w):
    found = w.put(random(8), "data")
    for level in range(30):
        found = {f"level{level}": found} if level % 2 else [found]
    return found


@tree
def sequences(w):
    a, b = w.put(random(8), "data"), w.put(random(8, seed=1))
    return {
        "tuple": (a, b),
        "list": [a + 0 if w.half() is None else a, [b]],
        "pair": Pair(a, b),
        "one": (a,),
    }


@tree
def dataclass(w):
    return {"data": Data(w.put(random(8), "data"), 3)}


@tree
def nones(w):
    return {"a": None, "b": [None, w.put(random(8), "data"), None], "c": (None,)}


@tree
def empty_containers(w):
    return {"a": {}, "b": [], "c": (), "d": {"e": {}}, "w": w.put(random(8), "data")}


@tree
def empty_tree(w):
    return {}


@tree
def only_none(w):
    return {"a": None}


@tree
def bare_array(w):
    return w.put(random(8), "data")


@everywhere
def bare_replica(w):
    return w.put(random(8, 4))


@tree
def bare_list(w):
    return [w.put(random(8), "data"), w.put(random(3))]


@tree
def bare_number(w):
    return 3


@tree
def shared_leaves(w):
    a, host = w.put(random(8), "data"), random(5)
    return {"a": a, "b": a, "c": {"d": host, "e": host}}


@tree
def many_leaves(w):
    return {
        "spread": {f"l{i}": w.put(random(8, seed=i), "data") for i in range(150)},
        "whole": {f"l{i}": w.put(random(3, seed=i)) for i in range(100)},
        "host": {f"l{i}": random(3, seed=i) for i in range(50)},
    }


@tree
def many_local_leaves(w):
    return {f"l{i}": w.local(random(3, seed=i)) for i in range(300)}


@everywhere
def large(w):
    return {
        "a": w.put(random(1024, 512), "data", "model"),
        "b": w.put(random(1024, 512, seed=1)),
    }


# ---- values on the host --------------------------------------------------------------


@tree
def numpy_arrays(w):
    whole = random(12, 10, dtype=np.int32)
    return {
        "fortran": np.asfortranarray(whole),
        "every_second": whole[::2, ::3],
        "backwards": whole[::-1],
        "turned": whole.T,
        "broadcast": np.broadcast_to(whole[0], (3, 10)),
        "big_endian": whole.astype(">i4"),
        "zero": np.array(3.5),
        "read_only": np.frombuffer(b"abcd", np.uint8),
    }


@tree
def numpy_scalars(w):
    return {
        name: jnp.dtype(name).type(1)
        for name in (
            "bool",
            "int8",
            "int64",
            "uint64",
            "float16",
            "float32",
            "float64",
            "complex64",
            "complex128",
        )
    }


@tree
def scalars_of_ml_dtypes(w):
    return {name: jnp.dtype(name).type(1) for name in ("bfloat16", "float8_e5m2")}


@everywhere
def numbers(w):
    return {
        "int": 3,
        "negative": -(2**63),
        "large": 2**63 - 1,
        "float": 0.1,
        "nan": float("nan"),
        "inf": float("inf"),
        "w": w.put(random(8), "data"),
    }


@tree
def flags(w):
    return {"on": True, "off": False, "w": w.put(random(8), "data")}


@tree
def complex_number(w):
    return {"c": 1 + 2j, "w": w.put(random(8), "data")}


@tree
def big_int(w):
    return {"big": 2**64, "w": w.put(random(8), "data")}


@tree
def unsigned_int(w):
    return {"big": 2**63, "w": w.put(random(8), "data")}


@tree
def texts(w):
    return {
        "a": "some",
        "b": "",
        "c": "é" * 300,
        "d": "line\nline",
        "w": w.put(random(8), "data"),
    }


@tree
def only_text(w):
    return {"a": "some"}


@tree
def raw_bytes(w):
    return {"a": b"some\xff", "w": w.put(random(8), "data")}


@tree
def no_bytes(w):
    return {"a": b"", "w": w.put(random(8), "data")}


@tree
def numpy_text(w):
    return {"a": np.array(["a", "bc"]), "w": w.put(random(8), "data")}


@tree
def numpy_structured(w):
    return {"a": np.zeros(3, [("x", "i4"), ("y", "f4")]), "w": w.put(random(8), "data")}


@tree
def numpy_objects(w):
    return {"a": np.array([1, "b"], object), "w": w.put(random(8), "data")}


@tree
def an_object(w):
    return {"a": object(), "w": w.put(random(8), "data")}


@tree
def a_set(w):
    return {"a": {1, 2}, "w": w.put(random(8), "data")}


# ---- libraries -----------------------------------------------------------------------


def _params(w):
    return {
        "dense": {
            "kernel": w.put(random(8, 4), "data", "model"),
            "bias": w.put(random(4), "model"),
        }
    }


def _zeros_like(w, params):
    """Make an Adam state: zeros where the parameters are, and a count in all."""
    import optax

    adam = optax.ScaleByAdamState(
        count=w.put(np.int32(5)),
        mu=jax.tree.map(lambda x: x, _params(w)),
        nu=jax.tree.map(lambda x: x, params),
    )
    return (optax.EmptyState(), (adam, optax.EmptyState()))


@everywhere
def optax_state(w):
    params = _params(w)
    return {"params": params, "opt_state": _zeros_like(w, params)}


@tree
def train_state(w):
    import optax
    from flax.training.train_state import TrainState

    params = _params(w)
    return TrainState(
        w.put(np.int32(7)), len, params, optax.adam(1e-3), _zeros_like(w, params)
    )


def _module(w):
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(w.put(random(8, 4), "data", "model"))
            self.tied = self.kernel
            self.layers = nnx.List(
                [nnx.Param(w.put(random(4, seed=i))) for i in range(3)]
            )
            self.count = nnx.BatchStat(w.put(np.int32(3)))

    return Model()


@everywhere
def nnx_module(w):
    return {"model": _module(w), "step": 3}


@tree
def nnx_state(w):
    from flax import nnx

    return nnx.state(_module(w))


@tree
def nnx_rngs(w):
    from flax import nnx

    return {"rngs": nnx.state(nnx.Rngs(0)), "w": w.put(random(8), "data")}


@tree
def equinox_module(w):
    import equinox as eqx

    class Linear(eqx.Module):
        weight: jax.Array
        bias: jax.Array
        activation: object
        size: int = eqx.field(static=True)

    return Linear(
        w.put(random(8, 4), "data", "model"), w.put(random(4)), jax.nn.relu, 8
    )


# ---- the worker ----------------------------------------------------------------------


def save_trees(directory, snapshot, *names):
    """Save each tree in both ways, restore it, and say what became of that.

    For each tree, a process says its name, and the errors of plain Orbax's save, of
    flaxckpt's two saves, and of flaxckpt's load, each empty if there was none; and how
    many of flaxckpt's saves it wrote directly.
    """
    from workers import say  # a script beside this one

    places = OnDevices()
    for name in names:
        found = TREES[name](places)
        told = ["not asked", "", ""]
        if name not in STUCK:
            told[0] = _error_of(_save_by_orbax, f"{directory}/orbax/{name}", found)
        path = f"{directory}/flaxckpt/{name}"
        counts = []
        told[1] = _error_of(_save, path, found, snapshot, counts)
        if not told[1]:
            told[2] = _error_of(_load, f"{path}/2", found)
        say(name, *told, *counts)


def _error_of(function, *arguments):
    """Return the error that a function raises in time."""
    told = ["it hangs"]

    def call():
        try:
            told[0] = function(*arguments) or ""
        except Exception as error:
            told[0] = _told(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(2 * TIMEOUT_SECS)
    return told[0]


def _save_by_orbax(path, tree):
    v1.save(path, tree)


def _save(directory, tree, snapshot, counts):
    settings = {"snapshot": snapshot, "timeout_secs": TIMEOUT_SECS}
    with flaxckpt.ModelCheckpoint(f"{directory}/{{epoch}}", **settings) as ckpt:
        for epoch in range(2):  # what Orbax has written is then written directly
            ckpt.save(tree, epoch)
            ckpt.wait()
        counts.append(ckpt.counts.direct)


def _load(path, tree):
    dtypes = [getattr(leaf, "dtype", None) for leaf in jax.tree.leaves(tree)]
    with jax.enable_x64(any(str(dtype) in DTYPES_OF_64_BITS for dtype in dtypes)):
        return difference(tree, flaxckpt.load(path, like=tree))


def _told(error):
    kind = type(error)
    own = "flaxckpt" if isinstance(error, flaxckpt.CheckpointError) else kind.__module__
    return f"{own}.{kind.__name__}: {error}"


def difference(one, other):
    """Say how two trees differ in what this process has of them; empty if they don't."""
    if jax.tree.structure(one) != jax.tree.structure(other):
        return f"structure {jax.tree.structure(other)}"
    pairs = zip(jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True)
    for (path, wanted), found in pairs:
        for key, value in facts(wanted).items():
            if value != facts(found)[key]:
                name = jax.tree_util.keystr(path)
                return f"{key} of {name}: {facts(found)[key]!r}, not {value!r}"[:500]
    return ""


def facts(leaf):
    """Return what a process has of a leaf."""
    if not isinstance(leaf, jax.Array):
        if callable(leaf):
            return {"value": leaf}
        if isinstance(leaf, int):  # numpy has no large ones
            return {"type": type(leaf), "value": leaf}
        value = np.asarray(leaf)
        dtype = value.dtype.newbyteorder("=")
        return {
            "type": type(leaf),
            "dtype": dtype,
            "shape": value.shape,
            "bytes": value.astype(dtype).tobytes(),
        }
    found = {
        "sharding": leaf.sharding,
        "memory": leaf.sharding.memory_kind,
        "dtype": leaf.dtype,
        "shape": leaf.shape,
    }
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    found["bytes"] = [
        np.asarray(part.data).tobytes() for part in leaf.addressable_shards
    ]
    return found


if __name__ == "__main__":
    import workers

    workers.main(globals())
