"""What `like` may be: structs of a mesh that is set, shardings, modules, functions."""

import dataclasses
import enum
import functools
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from saved_trees import assert_same, saved

import flaxckpt
from flaxckpt import CheckpointMismatchError, ModelCheckpoint, UnsupportedLeafError


def mesh_of(*names, kind=jax.sharding.AxisType.Auto):
    shape = {1: (8,), 2: (4, 2)}[len(names)]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


# ---- placed where a mesh or a sharding says --------------------------------------------


@pytest.fixture
def path(tmp_path):
    tree = {
        "w": jnp.arange(16.0).reshape(8, 2),
        "sub": [np.arange(8, dtype=np.int32), jnp.ones((8,), jnp.bfloat16)],
        "key": jax.random.key(3),
        "n": 3,
        "text": "x",
        "scalar": np.float32(2),
        "wide": np.arange(2),  # has 64 bits, and stays on the host
    }
    return saved(tmp_path, tree)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_structs_take_the_mesh_that_is_set(path, kind):
    mesh = mesh_of("x", "y", kind=getattr(jax.sharding.AxisType, kind))
    place = NamedSharding(mesh, P("x"))
    with jax.set_mesh(mesh):
        make = lambda x: jax.lax.with_sharding_constraint(x, P("x")) + 1  # noqa: E731
        like = jax.eval_shape(make, jax.device_put(jnp.zeros((8, 2)), place))
        if kind == "Explicit":
            assert isinstance(like.sharding.mesh, jax.sharding.AbstractMesh)
        else:
            like = jax.ShapeDtypeStruct(
                (8, 2), jnp.float32, sharding=NamedSharding(mesh.abstract_mesh, P("x"))
            )
        found = flaxckpt.load_weights(path.parent / "w", like)
    assert found.sharding.is_equivalent_to(place, 2)
    assert found.sharding.mesh == mesh


@pytest.fixture(autouse=True)
def one_array(path):
    with ModelCheckpoint(path.parent / "w") as ckpt:
        ckpt.save(jnp.arange(16.0).reshape(8, 2), 0)


def abstract(mesh, *spec):
    sharding = NamedSharding(mesh.abstract_mesh, P(*spec))
    return jax.ShapeDtypeStruct((8, 2), jnp.float32, sharding=sharding)


@pytest.mark.parametrize("how", ["set_mesh", "with"])
def test_the_mesh_may_have_its_axes_in_another_order(path, how):
    """The axes count by name; what else the mesh is does not matter."""
    warnings.simplefilter("ignore", DeprecationWarning)  # of `with mesh`
    mesh = jax.make_mesh(
        (2, 4), ("y", "x"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    with jax.set_mesh(mesh) if how == "set_mesh" else mesh:
        found = flaxckpt.load(path.parent / "w", abstract(mesh_of("x", "y"), "x"))
    assert found.sharding == NamedSharding(mesh, P("x"))
    assert np.array_equal(found, np.arange(16.0).reshape(8, 2))


@pytest.mark.parametrize("other", [None, ("x",), ("x", "z")])
def test_no_mesh_of_those_axes(path, other):
    like = abstract(mesh_of("x", "y"), "x")
    context = jax.set_mesh(mesh_of(*other)) if other else jax.default_device(None)
    with context, pytest.raises(UnsupportedLeafError, match="x=4, y=2"):
        flaxckpt.load(path.parent / "w", like)


def test_an_abstract_nnx_model_under_set_mesh(tmp_path):
    mesh = mesh_of("x", "y")

    def make():
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "x"))
        return nnx.Linear(4, 8, kernel_init=init, rngs=nnx.Rngs(0))

    with jax.set_mesh(mesh):
        model = make()
        state = nnx.state(model)
        with ModelCheckpoint(tmp_path / "a") as ckpt:
            ckpt.save(state, 0)
            like = nnx.state(nnx.eval_shape(make))
            found = ckpt.restore(like).tree
    assert_same(found, state)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)


def test_a_tree_of_shardings(path):
    mesh = mesh_of("x", "y")
    rows, whole = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())
    like = {"w": rows, "sub": [rows, whole], "key": whole, "n": whole, "text": whole, "wide": whole,
            "scalar": SingleDeviceSharding(jax.devices()[3])}  # fmt: skip
    found = flaxckpt.load(path, like)
    plain = flaxckpt.load(path)
    assert found["w"].sharding == rows
    assert found["sub"][0].sharding == rows
    assert found["sub"][1].dtype == jnp.bfloat16
    assert found["key"].sharding.is_equivalent_to(whole, 0)
    assert (found["n"], found["text"]) == (3, "x")
    assert type(found["wide"]) is np.ndarray
    assert found["scalar"].devices() == {jax.devices()[3]}
    for name in ("w", "key"):
        assert_same(found[name], plain[name])


def test_a_sharding_for_a_whole_subtree(path):
    mesh = mesh_of("x", "y")
    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("x"))
    found = flaxckpt.load(path, whole)
    assert found["sub"][1].sharding == whole
    plain = flaxckpt.load(path)
    assert jax.tree.structure(found) == jax.tree.structure(plain)
    like = {**plain, "sub": rows, "w": plain["w"]}
    found = flaxckpt.load(path, like)
    assert [leaf.sharding for leaf in found["sub"]] == [rows, rows]
    with jax.set_mesh(mesh):
        found = flaxckpt.load(path, {**plain, "sub": P("x")})
    assert [leaf.sharding for leaf in found["sub"]] == [rows, rows]
    with pytest.raises(UnsupportedLeafError, match="no mesh is set"):
        flaxckpt.load(path, {**plain, "sub": P("x")})


def test_a_sharding_that_does_not_fit(path):
    rows = NamedSharding(mesh_of("x", "y"), P("x"))
    with pytest.raises(CheckpointMismatchError, match="which do not divide it"):
        flaxckpt.load(path, {"w": NamedSharding(rows.mesh, P(None, "x")), "sub": rows,
                             "key": rows, "n": 0, "text": "", "scalar": 0.0, "wide": rows})  # fmt: skip
    with pytest.raises(CheckpointMismatchError, match="nothing"):
        flaxckpt.load(path, {**flaxckpt.load(path), "new": rows})


def test_shardings_are_noted_for_a_jitted_update(path, tmp_path):
    rows = NamedSharding(mesh_of("x", "y"), P("x"))
    with ModelCheckpoint(tmp_path / "run/{epoch}") as ckpt:
        found = ckpt.restore(which=path.parent / "w", like=rows)
        state = jax.jit(lambda t, s: ckpt.update(s, t, None, 0))(
            found.tree, found.state
        )
        jax.block_until_ready(state)
        ckpt.wait()
    assert_same(flaxckpt.load(tmp_path / "run/1"), flaxckpt.load(path.parent / "w"))


# ---- 64 bits ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "int64", "uint64", "complex128"])
def test_the_advice_for_64_bits_works(tmp_path, dtype):
    with jax.enable_x64(True):
        path = saved(
            tmp_path, {"w": jnp.arange(3).astype(dtype), "v": jnp.ones(2, "f4")}
        )
    with pytest.raises(CheckpointMismatchError) as caught:
        flaxckpt.load(path)
    advice = caught.value.advice
    assert "jax.enable_x64(True)" in advice
    with jax.enable_x64(True):
        assert flaxckpt.load(path)["w"].dtype == dtype
    assert "numpy arrays" in advice
    like = {"w": np.zeros(3, dtype), "v": np.zeros(2, "f4")}
    assert flaxckpt.load(path, like)["w"].dtype == dtype
    assert "or cast=True" in advice
    narrow = str(jax.dtypes.canonicalize_dtype(dtype))
    assert flaxckpt.load(path, cast=True)["w"].dtype == narrow
    structs = {"w": jax.ShapeDtypeStruct((3,), np.dtype(dtype)), "v": jnp.zeros(2)}
    with pytest.raises(CheckpointMismatchError, match="32 bits and cast=True"):
        flaxckpt.load(path, structs, cast=True)
    like = {"w": jnp.zeros(3, narrow), "v": jnp.zeros(2)}
    assert flaxckpt.load(path, like, cast=True)["w"].dtype == narrow


def test_many_devices_take_64_bits_as_they_are(tmp_path):
    """The threads that read have the setting of the thread that loads."""
    rows = NamedSharding(mesh_of("x"), P("x"))
    with jax.enable_x64(True):
        tree = {"w": jax.device_put(jnp.linspace(0, 1, 16), rows)}
        assert_same(flaxckpt.load(saved(tmp_path, tree), tree), tree)


# ---- functions and settings ------------------------------------------------------------


class Mode(enum.Enum):
    TRAIN = 1
    TEST = 2


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Marker:
    """An object that has nothing but its identity."""


class Module(eqx.Module):
    weight: jax.Array
    rate: float
    steps: int
    done: bool
    scalar: np.float32
    name: str
    level: Level
    mode: Any
    dtype: Any
    struct: Any
    marker: Any
    function: Any
    jitted: Any
    kind: Any
    nothing: Any = None
    nested: Any = dataclasses.field(default_factory=dict)


def module(number, mode, struct=None):
    return Module(
        weight=jnp.full(3, number), rate=number / 3, steps=int(number), done=number > 1,
        scalar=np.float32(number), name=f"m{number}", level=Level(int(number)), mode=mode,
        dtype=jnp.dtype("bfloat16"), struct=struct,
        marker=Marker(), function=jax.nn.relu, jitted=jax.jit(jnp.sin), kind=jnp.float32,
        nested={"mode": mode, "w": jnp.full(2, number), "m": Marker()},
    )  # fmt: skip


def test_what_is_no_value_in_an_equinox_module_is_of_like(tmp_path):
    """As in Equinox's own serialisation, of which the arrays and numbers are compared."""
    model, fresh = module(2.0, Mode.TRAIN), module(1.0, Mode.TEST)
    path = saved(tmp_path, model)
    found = flaxckpt.load(path, fresh)
    eqx.tree_serialise_leaves(tmp_path / "a.eqx", model)
    wanted = eqx.tree_deserialise_leaves(tmp_path / "a.eqx", fresh)
    for name, value in vars(wanted).items():
        got = getattr(found, name)
        if name in ("weight", "nested"):
            assert eqx.tree_equal(got, value), name
        elif name == "name":
            assert got == "m2.0"  # text, which Equinox leaves out, is stored
        else:
            assert (got, type(got)) == (value, type(value)), name
    assert found.marker is fresh.marker
    assert found.nested["mode"] is Mode.TEST
    structs = eqx.filter_eval_shape(lambda: module(1.0, Mode.TEST))
    assert eqx.tree_equal(flaxckpt.load(path, structs).weight, model.weight)
    plain = flaxckpt.load(path)
    assert plain["mode"] is None
    assert plain["weight"].tolist() == [2, 2, 2]
    assert plain["level"] == 2


def test_a_struct_in_an_equinox_module_is_of_like(tmp_path):
    struct = jax.ShapeDtypeStruct((2,), jnp.float32)
    path = saved(tmp_path, module(2.0, Mode.TRAIN, struct))
    found = flaxckpt.load(path, module(1.0, Mode.TRAIN, struct))
    assert found.struct is struct
    assert found.weight.tolist() == [2, 2, 2]


def test_an_equinox_leaf_that_holds_an_array_is_not_left_out(tmp_path):
    class Holder:
        def __jax_array__(self):
            return jnp.ones(2)

    model = eqx.tree_at(lambda m: m.marker, module(1.0, Mode.TEST), Holder())
    with pytest.raises(UnsupportedLeafError, match="marker"):
        saved(tmp_path, model)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["act", "w"], meta_fields=[]
)
@dataclasses.dataclass
class Layer:
    act: Any
    w: Any


def method_of():
    return Marker().__init__


FUNCTIONS = {
    "lambda": lambda x: x,
    "builtin": len,
    "partial": functools.partial(jnp.sum, axis=0),
    "jitted": jax.jit(jnp.sin),
    "custom": jax.nn.relu,
    "ufunc": np.add,
    "class": jnp.float32,
    "method": "text".upper,
    "bound": method_of(),
}


def test_functions_in_plain_containers_are_of_like(tmp_path):
    def tree(number):
        return {
            "functions": dict(FUNCTIONS),
            "layer": Layer(FUNCTIONS["lambda"], jnp.full(2, number)),
            "tx": optax.adam(0.1),
            "list": [FUNCTIONS["builtin"], number],
        }

    path = saved(tmp_path, tree(2))
    found = flaxckpt.load(path, tree(1))
    assert found["functions"] == FUNCTIONS
    assert found["layer"].act is FUNCTIONS["lambda"]
    assert found["layer"].w.tolist() == [2, 2]
    assert found["list"] == [len, 2]
    assert callable(found["tx"].update)
    with pytest.warns(
        UserWarning, match=r"had 13: .*functions/jitted and 8 more.*like"
    ) as caught:
        plain = flaxckpt.load(path)
    assert caught[0].filename == __file__
    assert plain["functions"] == dict.fromkeys(FUNCTIONS)
    assert plain["layer"]["w"].tolist() == [2, 2]
    flaxckpt.verify(path)


def test_a_function_and_a_value_are_no_match(tmp_path):
    path = saved(tmp_path, {"a": jnp.ones(2), "f": len})
    with pytest.raises(UnsupportedLeafError, match="a: a function, and the checkpoint"):
        flaxckpt.load(path, {"a": len, "f": len})
    with pytest.raises(CheckpointMismatchError, match="f: checkpoint has function"):
        flaxckpt.load(path, {"a": jnp.ones(2), "f": jnp.ones(2)})


def test_objects_with_state_are_no_functions(tmp_path):
    class Callable:
        def __call__(self):
            return 1

    with pytest.raises(UnsupportedLeafError, match="object of type"):
        saved(tmp_path, {"a": Callable()})
