"""`resume`: one call that begins a run or goes on with it."""

import queue
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import flaxckpt
from flaxckpt import CheckpointError, ModelCheckpoint
from flaxckpt._saving.publish import Publisher

TX = optax.adam(0.1)


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion("standard"):  # which optax needs
        yield


def new_tree():
    params = {"w": jnp.zeros(3)}
    return TrainState.create(apply_fn=None, params=params, tx=TX)


@jax.jit
def train_step(train):
    return train.apply_gradients(grads={"w": train.params["w"] - 1.0})


def same(one, other):
    return jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, other))


def test_a_new_run_begins_with_what_was_given(tmp_path):
    tree = new_tree()
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        found, state, start = ckpt.resume(tree)
    assert found is tree
    assert jax.tree.leaves(state) == jax.tree.leaves(ckpt.init())
    assert start == 0
    assert (start.epoch, start.batch, start.step) == (0, 0, 0)
    assert start.is_new
    assert not [*tmp_path.iterdir()]


def by_epoch(path, stop, epochs=6):
    with ModelCheckpoint(path / "{epoch}") as ckpt:
        train, state, start = ckpt.resume(new_tree())
        for epoch in range(start, epochs):
            if epoch == stop:
                return None
            train = train_step(train)
            state = ckpt.update(state, train, {}, epoch)
    return train, state


def by_batch(path, stop, epochs=3, batches=4):
    with ModelCheckpoint(path / "{epoch}-{batch}", save_freq=3) as ckpt:
        train, state, start = ckpt.resume(new_tree())
        for epoch in range(start, epochs):
            for batch in range(start.batch_in(epoch), batches):
                if epoch * batches + batch == stop:
                    return None
                train = train_step(train)
                state = ckpt.update(state, train, {}, epoch, batch)
    return train, state


def by_step(path, stop, steps=20):
    with ModelCheckpoint(path / "{step}", save_freq=3) as ckpt:
        train, state, start = ckpt.resume(new_tree())
        for step in range(start, steps):
            if step == stop:
                return None
            train = train_step(train)
            state = ckpt.update(state, train, {}, step=step)
    return train, state


@pytest.mark.parametrize("run", [by_epoch, by_batch, by_step])
@pytest.mark.parametrize("stops", [[1], [2, 5], [4, 4, 4]])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path, run, stops):
    whole = run(tmp_path / "whole", None)
    for stop in stops:
        assert run(tmp_path / "parts", stop) is None
    assert same(run(tmp_path / "parts", None), whole)


def test_start_says_where_it_is():
    after = flaxckpt.Start.after
    assert repr(after(4, None, 5)) == "Start(epoch=5, batch=0)"
    assert repr(after(4, 1, 9)) == "Start(epoch=4, batch=2)"
    assert repr(after(None, None, 30)) == "Start(step=31)"
    assert [after(4, 1, 9).batch_in(epoch) for epoch in (4, 5)] == [2, 0]
    assert after(None, None, 30) == 31
    assert not after(0, 0, 1).is_new


class Model(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.second = self.first  # tied
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.second(self.first(x))))


@nnx.jit
def nnx_step(model, optimizer, x):
    grads = nnx.grad(lambda model: (model(x) ** 2).mean())(model)
    optimizer.update(model, grads)


@pytest.mark.parametrize("kind", ["objects", "states"])
def test_nnx_objects_are_resumed_in_place(tmp_path, kind):
    x = jax.random.normal(jax.random.key(0), (8, 4))

    def run(path, seed, epochs):
        model = Model(nnx.Rngs(seed))
        optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
        tree = {"model": model, "optimizer": optimizer, "x": x}
        if kind == "states":
            tree["model"] = nnx.state(model)
        with ModelCheckpoint(path / "{epoch}") as ckpt:
            found, state, start = ckpt.resume(tree)
            if kind == "objects":
                assert found["model"] is model
            else:
                nnx.update(model, found["model"])
            assert found["optimizer"] is optimizer
            for epoch in range(start, epochs):
                nnx_step(model, optimizer, found["x"])
                if kind == "states":
                    found["model"] = nnx.state(model)
                state = ckpt.update(state, found, {}, epoch)
        assert model.first is model.second
        return nnx.state((model, optimizer))

    whole = run(tmp_path / "whole", 0, 4)
    run(tmp_path / "parts", 0, 2)
    assert same(run(tmp_path / "parts", 7, 4), whole)  # into objects of another seed


def test_one_nnx_module_alone_is_resumed_in_place(tmp_path):
    saved, model = Model(nnx.Rngs(0)), Model(nnx.Rngs(1))
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        ckpt.save(saved, epoch=0)
        found, _, start = ckpt.resume(model)
    assert found is model
    assert start == 1
    assert same(nnx.state(model), nnx.state(saved))


class Mixed(nnx.Module):
    """Fields of all kinds, each with a number."""

    def __init__(self, number):
        self.items = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(number))])
        self.named = nnx.Dict(a=nnx.Param(jnp.full(2, float(number))))
        self.plain = nnx.data({"n": number, "pair": (jnp.full(1, number), [number])})
        self.array = nnx.data(jnp.full(2, number))
        self.moments = nnx.data(optax.adam(1.0).init({"x": jnp.full(2, 1.0 * number)}))
        self.tied = self.items[0]


class Child(nnx.Module):
    def __init__(self, parent, number):
        self.parent, self.w = parent, nnx.Param(jnp.full(1, float(number)))


class Parent(nnx.Module):
    def __init__(self, number):
        self.w = nnx.Param(jnp.full(2, float(number)))
        self.child = Child(self, number)


@pytest.mark.parametrize("kind", [Mixed, Parent])
def test_all_that_a_module_has_is_resumed_in_place(tmp_path, kind):
    saved, model = kind(1), kind(2)
    parts = [getattr(model, "items", None), getattr(model, "child", None)]
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        ckpt.save({"model": saved}, epoch=0)
        found, _, _ = ckpt.resume({"model": model})
    assert found["model"] is model
    assert parts == [getattr(model, "items", None), getattr(model, "child", None)]
    assert same(nnx.state(model), nnx.state(saved))
    if kind is Mixed:
        assert model.plain["n"] == 1
        assert model.plain["pair"][1] == [1]
        assert model.tied is model.items[0]
    else:
        assert model.child.parent is model


def test_what_was_none_is_resumed_beside_nnx_objects(tmp_path):
    saved, model = Model(nnx.Rngs(0)), Model(nnx.Rngs(1))
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        ckpt.save({"model": saved, "carry": {"h": jnp.ones(2)}}, epoch=0)
        found, _, _ = ckpt.resume({"model": model, "carry": None})
        assert found["model"] is model
        assert found["carry"]["h"].tolist() == [1, 1]
        assert ckpt.resume(None)[0]["carry"]["h"].tolist() == [1, 1]


def test_structs_and_shardings_are_taken(tmp_path):
    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4])
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        ckpt.save({"w": np.arange(8.0, dtype=np.float32)}, epoch=2)
        sharding = NamedSharding(mesh, P("x"))
        like = {"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)}
        tree, _, start = ckpt.resume(like)
    assert start == 3
    assert tree["w"].sharding == sharding
    assert tree["w"].tolist() == list(range(8))


@pytest.mark.parametrize("name", ["restore", "resume"])
def test_under_a_trace_it_says_to_be_called_outside(tmp_path, name):
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        ckpt.save({"w": jnp.zeros(3)}, epoch=0)

        @jax.jit
        def run(w):
            getattr(ckpt, name)({"w": w})
            return w

        with pytest.raises(CheckpointError, match="outside, with like="):
            run(jnp.zeros(3))


# ---- in a notebook -----------------------------------------------------------------------


def test_what_an_interrupted_loop_of_this_process_still_writes_is_waited_for(
    tmp_path, monkeypatch
):
    """Nobody has closed the object, and nobody has it any more."""
    begun = threading.Event()

    def slowly(*arguments, _write=Publisher.write):
        begun.wait()
        return _write(*arguments)

    monkeypatch.setattr(Publisher, "write", slowly)

    def cell(stop):
        ckpt = ModelCheckpoint(tmp_path / "{epoch}")
        tree, state, start = ckpt.resume({"w": np.zeros(3)})
        for epoch in range(start, 4):
            if epoch == stop:
                raise KeyboardInterrupt
            state = ckpt.update(state, tree, {}, epoch)
        return start

    with pytest.raises(KeyboardInterrupt):
        cell(1)
    assert not flaxckpt.list_checkpoints(tmp_path)
    threading.Timer(0.2, begun.set).start()
    assert cell(None) == 1


def test_restore_does_not_wait_for_a_hook_that_waits_for_it(tmp_path):
    """`on_saved` hands each checkpoint over, and who takes it restores something."""
    handed = queue.Queue(maxsize=1)
    seen = []

    def evaluate():
        for info in iter(handed.get, None):
            found = ModelCheckpoint(tmp_path / "{epoch}").restore(which=info.path)
            seen.append(found.epoch)

    evaluator = threading.Thread(target=evaluate, daemon=True)
    evaluator.start()
    with ModelCheckpoint(
        tmp_path / "{epoch}", on_saved=handed.put, max_in_flight=4
    ) as ckpt:
        for epoch in range(4):
            ckpt.save({"w": np.ones(2)}, epoch)
        ckpt.wait()
    handed.put(None)
    evaluator.join()
    assert seen == [0, 1, 2, 3]
