"""Training in each family of JAX libraries: what `test_families` kills and resumes.

    python tests/families.py DIRECTORY STOP [--kill] FAMILY...

trains each of these families to a step, from what is in the directory, and prints for
each where it began, and a digest of its tree. With `--kill` the process then ends
itself by SIGKILL.
"""

import functools
import hashlib
import inspect
import json
import os
import signal
import sys
import warnings

os.environ["KERAS_BACKEND"] = "jax"

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training.train_state import TrainState

import flaxckpt

X = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
Y = X.sum(axis=1, keepdims=True)
FAMILIES = {}


def family(make):
    """Register a function that returns a fresh tree, and its step."""
    FAMILIES[make.__name__] = make
    return make


def batch(at):
    return jnp.asarray(np.roll(X, at, 0)), jnp.asarray(np.roll(Y, at, 0))


# ---- Linen


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        return nn.Dense(1)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))


class Training(TrainState):
    batch_stats: dict
    key: jax.Array
    ema: optax.EmaState


AVERAGE = optax.ema(0.9)


@family
def linen():
    net = Net()
    variables = net.init(jax.random.key(0), X, train=False)
    tree = Training.create(
        apply_fn=net.apply, tx=optax.adamw(1e-2), key=jax.random.key(1),
        ema=AVERAGE.init(variables["params"]), **variables,
    )  # fmt: skip

    @jax.jit
    def train(tree, x, y):
        key, drawn = jax.random.split(tree.key)

        def loss_of(params):
            variables = {"params": params, "batch_stats": tree.batch_stats}
            out, moved = net.apply(
                variables, x, train=True, rngs={"dropout": drawn},
                mutable=["batch_stats"],
            )  # fmt: skip
            return jnp.mean((out - y) ** 2), moved["batch_stats"]

        grads, batch_stats = jax.grad(loss_of, has_aux=True)(tree.params)
        tree = tree.apply_gradients(grads=grads, batch_stats=batch_stats, key=key)
        return tree.replace(ema=AVERAGE.update(tree.params, tree.ema)[1])

    return tree, lambda tree, at: train(tree, *batch(at))


# ---- NNX


class Model(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.tied = nnx.Linear(8, 8, rngs=rngs)
        self.again = self.tied
        self.low_rank = nnx.LoRA(8, 2, 8, rngs=rngs)
        self.out = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(nnx.relu(self.norm(self.first(x))))
        return self.out(self.again(self.tied(x)) + self.low_rank(x))


def made_by_nnx():
    model = Model(nnx.Rngs(0))
    return {
        "model": model,
        "optimizer": nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param),
        "metrics": nnx.MultiMetric(loss=nnx.metrics.Average("loss")),
    }


def train_by_nnx(x, y, model, optimizer, metrics):
    def loss_of(model):
        return jnp.mean((model(x) - y) ** 2)

    loss, grads = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, grads)
    metrics.update(loss=loss)


@family
def nnx_modules():
    train = nnx.jit(train_by_nnx)

    def step(tree, at):
        train(*batch(at), **tree)
        return tree

    return made_by_nnx(), step


@family
def nnx_update_inside():
    """`update` within `nnx.jit`, which takes modules and returns them by reference."""

    def start(ckpt):
        @nnx.jit
        def train(at, state, x, y, tree):
            train_by_nnx(x, y, **tree)
            return ckpt.update(state, tree, {}, step=at)

        return lambda tree, state, at: train(jnp.int32(at), state, *batch(at), tree)

    return made_by_nnx(), start


@family
def nnx_states():
    """As a loop on `nnx.split` has it: a State, and no objects."""
    graph, state = nnx.split(made_by_nnx())

    @jax.jit
    def train(state, x, y):
        tree = nnx.merge(graph, state)
        train_by_nnx(x, y, **tree)
        return nnx.state(tree)

    return state, lambda state, at: train(state, *batch(at))


# ---- Equinox


@family
def equinox():
    class Net(eqx.Module):
        shared: eqx.nn.Shared
        norm: eqx.nn.BatchNorm
        out: eqx.nn.Linear

        def __init__(self, key):
            first, second, third = jax.random.split(key, 3)
            embed = eqx.nn.Linear(4, 8, key=first)
            back = eqx.nn.Linear(4, 8, key=second)
            self.shared = eqx.nn.Shared(
                (embed, back), lambda pair: pair[1].weight, lambda pair: pair[0].weight
            )
            self.norm = eqx.nn.BatchNorm(8, axis_name="rows", mode="ema")
            self.out = eqx.nn.Linear(8, 1, key=third)

        def __call__(self, x, state):
            embed, back = self.shared()
            x, state = self.norm(jax.nn.relu(embed(x) + back(x)), state)
            return self.out(x), state

    model, state = eqx.nn.make_with_state(Net)(jax.random.key(0))
    tx = optax.adam(1e-2)
    moments = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def train(model, state, moments, x, y):
        def loss_of(model, state):
            run = jax.vmap(model, (0, None), (0, None), axis_name="rows")
            out, state = run(x, state)
            return jnp.mean((out - y) ** 2), state

        grads, state = eqx.filter_grad(loss_of, has_aux=True)(model, state)
        updates, moments = tx.update(grads, moments)
        return eqx.apply_updates(model, updates), state, moments

    return (model, state, moments), lambda tree, at: train(*tree, *batch(at))


# ---- Haiku


@family
def haiku():
    def forward(x):
        x = hk.BatchNorm(True, True, 0.9)(hk.Linear(8)(x), is_training=True)
        return hk.Linear(1)(hk.dropout(hk.next_rng_key(), 0.5, jax.nn.relu(x)))

    net = hk.transform_with_state(forward)
    params, state = net.init(jax.random.PRNGKey(0), X)
    tx = optax.sgd(1e-2, momentum=0.9)
    tree = {"params": params, "state": state, "opt_state": tx.init(params),
            "key": jax.random.PRNGKey(1)}  # fmt: skip

    @jax.jit
    def train(tree, x, y):
        key, drawn = jax.random.split(tree["key"])

        def loss_of(params):
            out, state = net.apply(params, tree["state"], drawn, x)
            return jnp.mean((out - y) ** 2), state

        grads, state = jax.grad(loss_of, has_aux=True)(tree["params"])
        updates, opt_state = tx.update(grads, tree["opt_state"])
        params = optax.apply_updates(tree["params"], updates)
        return {"params": params, "state": state, "opt_state": opt_state, "key": key}

    return tree, lambda tree, at: train(tree, *batch(at))


# ---- Keras, by its stateless methods


@family
def keras():
    import keras

    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        keras.layers.Input((4,)), keras.layers.Dense(8, "relu"),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.5, seed=3),
        keras.layers.Dense(1),
    ])  # fmt: skip
    optimizer = keras.optimizers.Adam(1e-2)
    optimizer.build(model.trainable_variables)
    parts = model.trainable_variables, model.non_trainable_variables
    parts = *parts, optimizer.variables

    @jax.jit
    def train(tree, x, y):
        trainable, others, moments = tree

        def loss_of(trainable):
            out, moved = model.stateless_call(trainable, others, x, training=True)
            return jnp.mean((out - y) ** 2), moved

        grads, others = jax.grad(loss_of, has_aux=True)(trainable)
        trainable, moments = optimizer.stateless_apply(moments, grads, trainable)
        return trainable, others, moments

    tree = tuple([jnp.asarray(each.value) for each in part] for part in parts)
    return tree, lambda tree, at: train(tree, *batch(at))


# ---- every optimizer of optax


def optimizers():
    """All of optax's public functions that make a transformation of a rate or nothing."""
    made = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, function in inspect.getmembers(optax, inspect.isfunction):
            for arguments in ((0.01,), ()):
                try:
                    transformation = function(*arguments)
                except Exception:
                    continue
                if isinstance(transformation, optax.GradientTransformation):
                    made[name] = optax.with_extra_args_support(transformation)
                    break
    return made


@family
def optax_s_optimizers():
    params = {"w": jnp.ones((4, 8)), "b": jnp.full(8, 0.5)}

    def value_of(params):
        return jnp.mean((jnp.tanh(X @ params["w"] + params["b"]) - Y) ** 2)

    def moved(transformation, params, moments):
        value, grads = jax.value_and_grad(value_of)(params)
        updates, moments = transformation.update(
            grads, moments, params, value=value, grad=grads, value_fn=value_of
        )
        return optax.apply_updates(params, updates), moments

    tree, steps = {}, {}
    for name, transformation in optimizers().items():
        try:
            moments = transformation.init(params)
            step = jax.jit(functools.partial(moved, transformation))
            _, after = step(params, moments)
        except Exception:  # it needs what no plain loop has
            continue
        # `apply_every` begins with a count in integers, and goes on in floats.
        moments = jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), moments, after)
        tree[name], steps[name] = (params, moments), step
    assert len(tree) >= 60, sorted(tree)

    def step(tree, at):
        return {name: steps[name](*pair) for name, pair in tree.items()}

    return tree, step


# ----


def digest(tree):
    """Hash all values of a tree."""
    if isinstance(tree, dict) and "optimizer" in tree:
        tree = nnx.to_pure_dict(nnx.state(tree))
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(
            leaf.dtype, jax.dtypes.prng_key
        ):
            leaf = jax.random.key_data(leaf)
        if isinstance(leaf, jax.Array | np.ndarray | float | int):
            total.update(jax.tree_util.keystr(path).encode())
            total.update(np.asarray(leaf).tobytes())
    return total.hexdigest()


def main(directory, stop, *names):
    found = {}
    for name in names:
        if name == "--kill":
            continue
        tree, step = FAMILIES[name]()
        with flaxckpt.ModelCheckpoint(
            f"{directory}/{name}/{{step}}", save_freq=2, max_to_keep=1
        ) as ckpt:
            tree, state, start = ckpt.resume(tree)
            train = step(ckpt) if name.endswith("_update_inside") else None
            for at in range(start, int(stop)):
                if train:
                    state = train(tree, state, at)
                else:
                    tree = step(tree, at)
                    state = ckpt.update(state, tree, {}, step=at)
        found[name] = [int(start), digest(tree)]
    print(json.dumps(found), flush=True)
    if "--kill" in names:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
