"""What of a training state are its weights, wherever in it they are."""

import os
import warnings
from typing import Any, NamedTuple

import equinox as eqx
import flax.struct
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from orbax.checkpoint import v1 as ocp

import flaxckpt
from flaxckpt import default_weights
from flaxckpt.errors import CheckpointError

os.environ["KERAS_BACKEND"] = "jax"


def params_of(seed=0.0):
    return {"dense": {"kernel": jnp.full((2, 2), seed), "bias": jnp.full(2, seed)}}


class Collections(TrainState):
    batch_stats: Any = None
    rngs: Any = None


def train_state(seed=0.0, **fields):
    return Collections.create(
        apply_fn=None, params=params_of(seed), tx=optax.adam(1e-3), **fields
    )


class Loop(NamedTuple):
    params: Any
    opt_state: Any
    key: Any


class EquinoxLoop(eqx.Module):
    model: eqx.Module
    opt_state: Any
    key: jax.Array
    step: jax.Array


@flax.struct.dataclass
class Agent:
    actor: TrainState
    critic: TrainState
    steps: jax.Array


class Net(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(2, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.seen = nnx.Intermediate(jnp.zeros(1))
        self.cache = nnx.Cache(jnp.zeros(1))


def nnx_weights(model):
    return nnx.filter_state(nnx.state(model), nnx.Any(nnx.Param, nnx.BatchStat))


def optimizers(params):
    """States of optax, plain and wrapped."""
    adam = optax.adam(1e-3)
    return [
        tx.init(params)
        for tx in (
            adam,
            optax.sgd(0.1, momentum=0.9),
            optax.chain(optax.clip(1.0), optax.adamw(1e-3), optax.scale(0.5)),
            optax.MultiSteps(adam, 2),
            optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
            optax.masked(adam, jax.tree.map(lambda _: True, params)),
            optax.apply_if_finite(adam, 3),
            optax.multi_transform({"a": adam}, jax.tree.map(lambda _: "a", params)),
        )
    ]


class Gaussian(eqx.Module):
    params: Any
    scale: Any


class Headed(eqx.Module):
    lin: Any
    head: Any


class Attention(eqx.Module):
    query: Any
    key: Any
    extra: Any


class Run(eqx.Module):
    params: Any
    opt_state: Any
    scale: Any


class Scaled(NamedTuple):
    params: Any
    scale: Any


EQX = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
PARAMS = params_of()
ADAM = optax.adam(1e-3).init(PARAMS)
STATS = {"mean": jnp.ones(2)}
KEY, RAW = jax.random.key(0), jnp.zeros(2, jnp.uint32)
ONE, TWO = train_state(1.0, batch_stats=STATS, rngs={"dropout": KEY}), train_state(2.0)
NET = Net(nnx.Rngs(0))
OPTIMIZER = nnx.Optimizer(NET, optax.adam(1e-3), wrt=nnx.Param)
METRICS = nnx.MultiMetric(loss=nnx.metrics.Average())
VARIABLES = {"params": ONE.params, "batch_stats": STATS}
W = jnp.ones((2, 3))
LINEAR = eqx.nn.Linear(2, 2, key=KEY)
GAUSSIAN = Gaussian({"mean": W}, jnp.ones(2))
HEADED = Headed(LINEAR, GAUSSIAN)
ATTENTION = Attention(LINEAR, LINEAR, {"rng": KEY, "w": W})
DECISION = flaxckpt.CheckpointState.create()
KERAS = ([jnp.ones(2), jnp.ones(3)], [jnp.zeros(1)],
         [jnp.int32(3), jnp.float32(0.1), jnp.ones(2)], [jnp.zeros(1)])  # fmt: skip

# Name: a tree and its weights.
CASES = {
    "TrainState": (ONE, VARIABLES),
    "TrainState and a key": ((ONE, KEY), VARIABLES),
    "TrainState and a raw key and a step": ([ONE, RAW, 3], VARIABLES),
    "TrainState and a decision": ((ONE, DECISION), VARIABLES),
    "one TrainState in a dict": ({"state": ONE, "key": KEY, "epoch": 3}, VARIABLES),
    "and deeper": ({"run": {"state": (ONE, KEY)}, "rng": RAW}, VARIABLES),
    "train and best": (
        {"train": ONE, "best": TWO},
        {"train": VARIABLES, "best": {"params": TWO.params}},
    ),
    "several in a tuple": ((ONE, TWO), (VARIABLES, {"params": TWO.params})),
    "best params beside it": (
        {"train": TWO, "best": PARAMS, "ckpt": DECISION},
        {"train": {"params": TWO.params}, "best": PARAMS},
    ),
    "an agent": (
        Agent(ONE, TWO, jnp.int32(3)),
        {"actor": VARIABLES, "critic": {"params": TWO.params}},
    ),
    "params and opt_state": ((PARAMS, ADAM), PARAMS),
    "and more": ((PARAMS, STATS, ADAM, KEY, jnp.int32(2)), (PARAMS, STATS)),
    "a named tuple": (Loop(PARAMS, ADAM, RAW), {"params": PARAMS}),
    "a dict with params": (
        {"params": PARAMS, "batch_stats": STATS, "opt_state": [jnp.ones(2)], "step": 1},
        {"params": PARAMS, "batch_stats": STATS},
    ),
    "a dict with params and a key": ({"params": PARAMS, "key": RAW}, {"params": PARAMS}),
    "model and optimizer": (
        {"model": PARAMS, "optimizer": {"count": jnp.int32(3), "mu": jnp.ones(2)}},
        {"model": PARAMS},
    ),
    "model and optax": ({"net": PARAMS, "o": ADAM, "n": 3}, {"net": PARAMS}),
    "equinox": (EQX, EQX),
    "equinox and opt_state": ((EQX, ADAM), EQX),
    "an equinox loop": (EquinoxLoop(EQX, ADAM, KEY, jnp.int32(1)), {"model": EQX}),
    "equinox in a dict": ({"model": EQX, "opt_state": ADAM, "key": KEY}, {"model": EQX}),
    "nnx": (NET, nnx_weights(NET)),
    "nnx and optimizer": ((NET, OPTIMIZER), nnx_weights(NET)),
    "nnx and all": (
        {"model": NET, "optimizer": OPTIMIZER, "metrics": METRICS, "rngs": nnx.Rngs(0)},
        {"model": nnx_weights(NET)},
    ),
    "nnx states": (
        {"m": nnx.state(NET), "o": nnx.state(OPTIMIZER), "x": nnx.state(METRICS)},
        {"m": nnx_weights(NET)},
    ),
    "keras by names": (
        dict(zip(("trainable_variables", "non_trainable_variables",
                  "optimizer_variables", "metrics_variables"), KERAS, strict=True)),
        {"trainable_variables": KERAS[0], "non_trainable_variables": KERAS[1]},
    ),
    "keras by place": (KERAS, KERAS[:2]),
    "keras without metrics": (KERAS[:3], KERAS[:2]),
    "a field called params": (HEADED, HEADED),
    "and an optimizer's state": ((HEADED, ADAM), HEADED),
    "a module with params": ({"net": GAUSSIAN, "o": ADAM}, {"net": GAUSSIAN}),
    "a named tuple without optimizer": (Scaled(PARAMS, W), Scaled(PARAMS, W)),
    "an equinox state": (Run(PARAMS, ADAM, STATS), {"params": PARAMS, "scale": STATS}),
    "a key within a model": (ATTENTION, ATTENTION),
    "and beside an optimizer": ((ATTENTION, ADAM), ATTENTION),
    "attention": (
        {"query": W, "key": W, "temperature": 0.7, "opt_state": ADAM},
        {"query": W, "key": W, "temperature": 0.7},
    ),
    "attention below": (
        {"net": {"query": {"w": W}, "key": {"w": W}, "n": 3, "rng": KEY}, "o": ADAM},
        {"net": {"query": {"w": W}, "key": {"w": W}, "n": 3}},
    ),
    "integers that are weights": (
        {"w": W, "packed": jnp.ones(4, jnp.uint32), "zero": jnp.int8(3), "o": ADAM},
        {"w": W, "packed": jnp.ones(4, jnp.uint32), "zero": jnp.int8(3)},
    ),
    "a number": ({"w": W, "scale": 1.5, "opt_state": ADAM}, {"w": W, "scale": 1.5}),
    "a subnet called optimizers": (
        {"dense": PARAMS, "optimizers": {"w": W}, "opt_state": ADAM},
        {"dense": PARAMS, "optimizers": {"w": W}},
    ),
    "and no optimizer": (
        {"dense": PARAMS, "optimizers": {"w": W}}, {"dense": PARAMS, "optimizers": {"w": W}},
    ),
    "a state called optimizer": (
        {"optimizer": {"model": PARAMS, "opt_state": ADAM}, "n": 3},
        {"optimizer": {"model": PARAMS}},
    ),
    "collections by odd names": (
        {"params": PARAMS, "buffer": STATS, "data": {"n": RAW}, "opt_state": ADAM},
        {"params": PARAMS, "buffer": STATS},
    ),
    "plain": (PARAMS, PARAMS),
    "variables": (VARIABLES, VARIABLES),
    "a list of layers": ([PARAMS, PARAMS], [PARAMS, PARAMS]),
    **{
        f"optax {i}": ({"weights": PARAMS, "state": state}, {"weights": PARAMS})
        for i, state in enumerate(optimizers(PARAMS))
    },
}  # fmt: skip


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if not callable(other):
            is_key = jnp.issubdtype(getattr(other, "dtype", int), jax.dtypes.prng_key)
            pair = map(jax.random.key_data, (one, other)) if is_key else (one, other)
            np.testing.assert_array_equal(*pair)


@pytest.mark.parametrize(("tree", "weights"), CASES.values(), ids=CASES.keys())
def test_the_weights_of(tmp_path, tree, weights):
    for _ in range(2):  # and when its structure is known
        assert_same(default_weights(tree), weights)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*leaves nothing out")
        with flaxckpt.ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
            whole = ckpt.save(tree, epoch=0)
        with flaxckpt.ModelCheckpoint(tmp_path / "w", save_weights_only=True) as ckpt:
            alone = ckpt.save(tree, epoch=0)
    assert_same(flaxckpt.load_weights(whole, like=weights), weights)
    assert_same(flaxckpt.load(alone, like=weights), weights)
    assert_same(flaxckpt.load_weights(whole), flaxckpt.load_weights(alone))


WITH_KEYS = {
    "beside a model": lambda keys: {"model": EQX, "rng": keys},
    "beside numbers": lambda keys: {"a": 1.5, "n": 3, "x": keys},
    "beside params": lambda keys: (PARAMS, keys),
    "in a state": lambda keys: {"params": PARAMS, "opt_state": ADAM, "k": keys},
    "in a model": lambda keys: Attention(LINEAR, LINEAR, keys),
    "deep in a model": lambda keys: Attention(LINEAR, W, {"x": keys, "w": W}),
}


@pytest.mark.parametrize("made", WITH_KEYS.values(), ids=WITH_KEYS.keys())
@pytest.mark.parametrize("keys", [[KEY], (KEY, KEY), [(KEY,), KEY], {"a": (KEY,)}])
def test_several_keys_are_left_out_where_one_is(made, keys):
    with_one, with_several = made(KEY), made(keys)
    weights = default_weights(with_one)
    if weights is with_one:
        assert default_weights(with_several) is with_several
    else:
        assert_same(default_weights(with_several), weights)


BESIDE = {"adam": ADAM, "both": (ADAM, ADAM), "key": KEY, "keys": [KEY, (KEY,)], "decision": DECISION,
          "optimizer": OPTIMIZER, "metrics": METRICS, "rngs": nnx.Rngs(0)}  # fmt: skip
MODELS = {
    "equinox": (EQX, EQX),
    "plain": (PARAMS, PARAMS),
    "variables": (VARIABLES, VARIABLES),
    "nnx": (NET, nnx_weights(NET)),
    "state": (nnx.state(NET), nnx_weights(NET)),
    "one": (ONE, VARIABLES),
    "two": (TWO, TWO.params),
}


def states(parts):
    named = st.dictionaries(st.sampled_from("abcdef"), parts, min_size=1, max_size=3)
    return named | st.lists(parts, min_size=1, max_size=3).map(tuple)


@hypothesis.given(
    beside=st.sampled_from(sorted(BESIDE)),
    state=st.recursive(st.sampled_from([*MODELS, *BESIDE]), states, max_leaves=6),
)
def test_all_models_and_nothing_else(beside, state):
    """Beside one thing that is none, each model's weights are there, and no others."""
    wanted = set()

    def made(node):
        if isinstance(node, dict):
            return {name: made(each) for name, each in node.items()}
        if isinstance(node, tuple):
            return tuple(map(made, node))
        if node in BESIDE:
            return BESIDE[node]
        model, weights = MODELS[node]
        wanted.update(map(id, jax.tree.leaves(weights)))
        return model

    picked = default_weights((BESIDE[beside], made(state)))
    assert {id(leaf) for leaf in jax.tree.leaves(picked)} == wanted


NAMES = ("key keys rng rngs buffer data history metrics step epoch seed count opt optimizer "
         "optimizers tx scheduler logs scale params_ema").split()  # fmt: skip
FLOATS = [W, 0.7, {"w": W}, [W], np.ones(2), jnp.bfloat16(1), LINEAR, np.float32(1)]


@hypothesis.given(
    parts=st.dictionaries(
        st.sampled_from(NAMES), st.integers(0, len(FLOATS) - 1), min_size=1, max_size=4
    ),
    beside=st.sampled_from(["opt_state", "a"]),
    in_model=st.booleans(),
)
def test_no_floats_are_left_out_for_their_name(parts, beside, in_model):
    floats = {name: FLOATS[each] for name, each in parts.items()}
    tree = {"net": floats, beside: ADAM} if in_model else floats | {beside: ADAM}
    picked = default_weights(tree)
    assert_same(picked, {"net": floats} if in_model else floats)


@pytest.mark.parametrize("name", ["key", "rng", "step", "buffer", "data", "seed"])
@pytest.mark.parametrize("value", [KEY, RAW, 3, {"a": KEY}, {"a": RAW, "n": 3}])
def test_what_is_no_float_is_left_out_for_its_name(name, value):
    assert_same(default_weights({"w": W, "o": ADAM, name: value}), {"w": W})


STATES = {
    "pair": (PARAMS, ADAM),
    "list": [PARAMS, ADAM],
    "with a key": (PARAMS, ADAM, KEY),
    "dict": {"model": PARAMS, "opt_state": ADAM},
    "TrainState": ONE,
    "nnx": (NET, OPTIMIZER),
    "equinox": (EQX, ADAM),
}
COUNTS = st.sampled_from(
    [jnp.int32(3), 3, np.int64(3), jax.random.key(1), jax.random.PRNGKey(1)]
)
BESIDE_A_STATE = {
    "tuple": lambda state, beside: (state, *beside),
    "list": lambda state, beside: [state, *beside],
    "first": lambda state, beside: (*beside, state),
    "dict": lambda state, beside: {
        "train": state,
        **dict(zip(("rng", "epoch"), beside, strict=False)),
    },
}


@hypothesis.given(
    st.sampled_from(sorted(STATES)),
    st.lists(
        st.tuples(
            st.sampled_from(sorted(BESIDE_A_STATE)),
            st.lists(COUNTS, min_size=1, max_size=2),
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_what_is_beside_a_training_state_changes_nothing_of_its_weights(name, around):
    """However often it is wrapped, with steps, keys and counts beside it."""
    tree, weights = STATES[name], default_weights(STATES[name])
    for kind, beside in around:
        tree = BESIDE_A_STATE[kind](tree, beside)
        if kind == "dict" and name != "TrainState":
            weights = {"train": weights}
        assert_same(default_weights(tree), weights)


@pytest.mark.parametrize("wrap", [tuple, list])
def test_a_count_beside_several_states_is_no_weights(wrap):
    got = default_weights(wrap([(PARAMS, ADAM), (PARAMS, ADAM), jnp.int32(1)]))
    assert_same(got, (PARAMS, PARAMS))


def test_keras_models(tmp_path):
    import keras

    model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(3),
                              keras.layers.BatchNormalization()])  # fmt: skip
    model.compile("adam", "mse", metrics=["mae"])
    model.fit(np.ones((4, 2)), np.ones((4, 3)), verbose=0)
    value = lambda each: each.value  # noqa: E731
    parts = (model.trainable_variables, model.non_trainable_variables,
             model.optimizer.variables, model.metrics_variables)  # fmt: skip
    loop = tuple([value(each) for each in part] for part in parts)
    assert_same(default_weights(loop), loop[:2])
    tree = jax.tree.map(jnp.asarray, model.get_state_tree())
    wanted = {name: tree[name] for name in ("trainable_variables", "non_trainable_variables")}  # fmt: skip
    assert_same(default_weights(tree), wanted)


# ---- what is said ------------------------------------------------------------------------


UNKNOWN = {"net": PARAMS, "momentum": {"m": jnp.ones(2)}}


@pytest.mark.parametrize("tree", [UNKNOWN, PARAMS, [PARAMS]], ids=["dict", "plain", "list"])  # fmt: skip
def test_a_save_of_weights_that_leaves_nothing_out_says_so_once(tmp_path, tree):
    with flaxckpt.ModelCheckpoint(tmp_path / "{epoch}", save_weights_only=True) as ckpt:
        with pytest.warns(UserWarning, match=r"leaves nothing out.*weights=lambda") as told:  # fmt: skip
            ckpt.save(tree, epoch=0)
        assert told[0].filename == __file__
        ckpt.save(tree, epoch=1)  # warnings are errors
        ckpt.update(ckpt.init(), tree, {}, 2)


def test_a_program_that_leaves_nothing_out_says_so_when_it_is_traced(tmp_path):
    with flaxckpt.ModelCheckpoint(tmp_path / "{epoch}", save_weights_only=True) as ckpt:
        step = jax.jit(lambda state, tree: ckpt.update(state, tree, {}, 0))
        with pytest.warns(UserWarning, match="leaves nothing out"):
            step(ckpt.init(), UNKNOWN)


@pytest.mark.parametrize(
    "settings",
    [{}, {"save_weights_only": True, "weights": lambda tree: tree}],
    ids=["whole", "own weights"],
)
def test_what_is_meant_says_nothing(tmp_path, settings):
    with flaxckpt.ModelCheckpoint(tmp_path / "{epoch}", **settings) as ckpt:
        ckpt.save(UNKNOWN, epoch=0)


@pytest.mark.parametrize("tree", [EQX, VARIABLES, NET, nnx.state(NET, nnx.Param), {"a": EQX, "b": EQX}])  # fmt: skip
def test_what_is_known_to_be_weights_says_nothing(tmp_path, tree):
    with flaxckpt.ModelCheckpoint(tmp_path / "{epoch}", save_weights_only=True) as ckpt:
        ckpt.save(tree, epoch=0)


def test_a_tree_without_weights(tmp_path):
    with flaxckpt.ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        path = ckpt.save({"optimizer": OPTIMIZER, "key": KEY}, epoch=0)
    with pytest.raises(CheckpointError, match="holds no weights"):
        flaxckpt.load_weights(path)


# ---- plain Orbax's, by names ---------------------------------------------------------------


@pytest.mark.parametrize(("tree", "weights"), [
    ({"params": PARAMS, "opt_state": ADAM, "batch_stats": STATS, "step": 3}, {"params": PARAMS, "batch_stats": STATS}),
    ({"train": {"params": PARAMS, "opt_state": ADAM}, "key": RAW}, {"params": PARAMS}),
    ({"model": PARAMS, "optimizer": ADAM, "step": 3}, {"model": PARAMS}),
    ({"query": W, "key": W, "rng": RAW, "opt_state": ADAM}, {"query": W, "key": W}),
    ({"dense": PARAMS, "optimizers": {"w": W}}, {"dense": PARAMS, "optimizers": {"w": W}}),
    ({"params": PARAMS, "buffer": STATS, "opt_state": ADAM}, {"params": PARAMS, "buffer": STATS}),
    ({"a": {"params": PARAMS, "opt_state": ADAM}, "b": {"params": PARAMS, "step": 2}},
     {"a": {"params": PARAMS}, "b": {"params": PARAMS}}),
    (VARIABLES, VARIABLES), (PARAMS, PARAMS),
])  # fmt: skip
def test_the_weights_that_plain_orbax_wrote(tmp_path, tree, weights):
    ocp.save(tmp_path / "orbax", tree)
    assert_same(flaxckpt.load_weights(tmp_path / "orbax"), weights)
