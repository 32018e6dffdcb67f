"""`update` within jit: saves what a Python loop over the same steps would have saved."""

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flaxckpt
from flaxckpt import CheckpointPathError
from flaxckpt._checkpoints import series_writer as _series_writer
from flaxckpt._checkpoints import write as _write
from flaxckpt._decision.state import plain_state

NAN = float("nan")
# Ties, a NaN, and a best in the middle.
LOSSES = jnp.array([3, NAN, 2, 2, 5, 1, 1, 4, 0.5, 7, 0.25, 6], jnp.float32)
EPOCHS, BATCHES = 3, 4


def make_tree(mesh=None):
    """Leaves of all kinds; whole numbers, so that any program computes the same."""
    tree = {
        "params": {
            "w": jnp.arange(64 * 32, dtype=jnp.float32).reshape(64, 32),
            "v": jnp.ones((16, 8), jnp.bfloat16),
            "u": jnp.ones((8, 16), jnp.int8),
        },
        "opt_state": (jnp.zeros(3), jnp.int32(0)),
        "key": jax.random.key(1),
        "done": jnp.array([True, False]),
        "empty": jnp.zeros((0, 2)),
    }
    if mesh is None:
        return tree
    specs = {"w": P("data", "model"), "v": P(None, "model"), "u": P(("model", "data"))}

    def place(path, leaf):
        spec = specs.get(path[-1].key, P()) if hasattr(path[-1], "key") else P()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, tree)


def train_step(tree, index):
    return {
        "params": {
            "w": tree["params"]["w"] + index.astype(jnp.float32),
            "v": tree["params"]["v"] + 1,
            "u": tree["params"]["u"] + 1,
        },
        "opt_state": (tree["opt_state"][0] + 1, tree["opt_state"][1] + 1),
        "key": jax.random.split(tree["key"])[0],
        "done": ~tree["done"],
        "empty": tree["empty"],
    }


def body_of(ckpt, by_batch):
    """One step: with an update for the batch, or for the epoch."""

    def body(carry, index):
        tree, state = carry
        tree = train_step(tree, index)
        logs = {"loss": LOSSES[index], "lr": 0.5}
        epoch, batch = (
            (index // BATCHES, index % BATCHES) if by_batch else (index, None)
        )
        return (tree, ckpt.update(state, tree, logs, epoch, batch)), None

    return body


def in_scan(ckpt, tree, state, by_batch):
    steps = jnp.arange(len(LOSSES))
    run = jax.jit(lambda c: jax.lax.scan(body_of(ckpt, by_batch), c, steps)[0])
    return run((tree, state))


def in_python(ckpt, tree, state, by_batch):
    body, step = body_of(ckpt, by_batch), jax.jit(train_step)
    for index in range(len(LOSSES)):
        tree = step(tree, jnp.int32(index))
        logs = {"loss": np.float32(LOSSES[index]), "lr": 0.5}
        epoch, batch = divmod(index, BATCHES) if by_batch else (index, None)
        state = ckpt.update(state, tree, logs, epoch, batch)
        ckpt.wait()  # so that none is superseded
    del body
    return tree, state


def assert_same_tree(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        assert one.dtype == other.dtype
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def contents(ckpt, like):
    """Everything there is: by name, what each checkpoint holds."""
    infos = [*ckpt.checkpoints]
    if ckpt.latest is not None and ckpt.latest not in infos:
        infos.append(ckpt.latest)
    names = [info.path.name for info in infos]
    facts = [
        (i.epoch, i.batch, i.step, i.weights_only, repr(i.logs), repr(i.state))
        for i in infos
    ]
    trees = [
        (flaxckpt.load_weights if info.weights_only else flaxckpt.load)(
            info.path,
            like["params"] and {"params": like["params"]}
            if info.weights_only
            else like,
        )
        for info in infos
    ]
    return names, facts, trees


CONFIGS = [
    dict(zip(("save_best_only", "save_freq", "save_last", "save_weights_only"), each))  # noqa: B905
    for each in itertools.product(
        (False, True), ("epoch", 1, 3), (False, True), (False, True)
    )
]


@pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda c: "-".join(map(str, c.values()))
)
@pytest.mark.parametrize("sharded", [False, True], ids=["alone", "sharded"])
def test_a_scan_saves_what_a_loop_saves(tmp_path, config, sharded):
    mesh = None
    if sharded:
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    tree = make_tree(mesh)
    by_batch = config["save_freq"] != "epoch"
    found = []
    for name, run in {"scan": in_scan, "loop": in_python}.items():
        ckpt = flaxckpt.ModelCheckpoint(
            tmp_path / name / ("{epoch}-{batch}" if by_batch else "{epoch}-{loss:.1f}"),
            "loss",
            mode="min",
            max_to_keep=4,
            **config,
        )
        with ckpt:
            result, state = run(ckpt, tree, ckpt.init(tree), by_batch)
            ckpt.wait()
            found.append((*contents(ckpt, tree), result, plain_state(state)))
    (names, facts, trees, result, state), expected = found
    assert names == expected[0]
    assert facts == expected[1]
    for one, other in zip(trees, expected[2], strict=True):
        assert_same_tree(one, other)
    assert_same_tree(result, expected[3])
    assert state == expected[4]
    assert names


@pytest.mark.parametrize("threshold", [None, 2.5, 0.0])
@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("min_delta", [0.0, 1.5])
def test_the_best_at_one_path_is_the_last_that_improved(
    tmp_path, threshold, mode, min_delta
):
    """Saves that wait for their turn may be superseded; what stays is the same."""
    tree, found = {"w": jnp.arange(6.0)}, []
    for name in ("scan", "loop"):
        with flaxckpt.ModelCheckpoint(
            tmp_path / name,
            "loss",
            mode=mode,
            save_best_only=True,
            initial_value_threshold=threshold,
            min_delta=min_delta,
        ) as ckpt:

            def body(carry, index, ckpt=ckpt):
                tree, state = carry
                tree = {"w": tree["w"] + 1}
                return (
                    tree,
                    ckpt.update(state, tree, {"loss": LOSSES[index]}, index),
                ), 0

            carry = tree, ckpt.init()
            if name == "scan":
                steps = jnp.arange(len(LOSSES))
                jax.jit(lambda c, b=body, s=steps: jax.lax.scan(b, c, s))(carry)
            else:
                for index in range(len(LOSSES)):
                    carry, _ = body(carry, index)
            got = ckpt.restore(tree)
            counts = ckpt.counts
        found.append(
            got and (got.epoch, got.tree["w"].tolist(), repr(got.logs), repr(got.state))
        )
        if got and name == "scan":
            assert counts.saved + counts.superseded >= 1
    assert found[0] == found[1]


def test_all_kinds_of_programs(tmp_path):
    """Nested jit, a loop in a loop, `while_loop` and `cond`."""
    with flaxckpt.ModelCheckpoint(tmp_path / "{epoch}-{batch}", save_freq=1) as ckpt:

        @jax.jit
        def save(state, tree, epoch, batch):
            return ckpt.update(state, tree, None, epoch, batch)

        def inner(epoch):
            def body(carry, batch):
                tree, state = carry
                tree = tree + 1
                state = jax.lax.cond(
                    batch % 2 == 0,
                    lambda: save(state, tree, epoch, batch),
                    lambda: state,
                )
                return (tree, state), None

            return body

        def outer(carry):
            epoch, tree, state = carry
            (tree, state), _ = jax.lax.scan(inner(epoch), (tree, state), jnp.arange(4))
            return epoch + 1, tree, state

        fresh = jax.tree.map(jnp.asarray, ckpt.init())
        run = jax.jit(
            lambda tree, state: jax.lax.while_loop(
                lambda carry: carry[0] < 2, outer, (jnp.int32(0), tree, state)
            )
        )
        run(jnp.zeros(3), fresh)
        ckpt.wait()
        names = [info.path.name for info in ckpt.checkpoints]
        assert names == ["1-1", "1-3", "2-1", "2-3"]
        values = [flaxckpt.load(info.path)[0] for info in ckpt.checkpoints]
        assert values == [1, 3, 5, 7]
        run(jnp.full(3, 8.0), fresh)  # compiled by now
        ckpt.wait()
        assert [flaxckpt.load(i.path)[0] for i in ckpt.checkpoints] == [9, 11, 13, 15]


def test_wait_waits_for_the_program(tmp_path):
    """A call of a jitted function returns before its program has run."""
    with flaxckpt.ModelCheckpoint(tmp_path / "{epoch}") as ckpt:

        def body(carry, epoch):
            x, state = carry
            x = jnp.tanh(x @ x)
            return (x, ckpt.update(state, {"x": x}, None, epoch)), None

        steps = jnp.arange(5)
        run = jax.jit(lambda c: jax.lax.scan(body, c, steps)[0])
        run((jnp.eye(600), ckpt.init()))
        ckpt.wait()
        assert [info.epoch for info in ckpt.checkpoints] == [0, 1, 2, 3, 4]


def test_force_and_constants(tmp_path):
    with flaxckpt.ModelCheckpoint(
        tmp_path / "{epoch}", "loss", save_best_only=True
    ) as ckpt:

        @jax.jit
        def run(x, force):
            tree = {"x": x, "name": "run", "n": 3, "numpy": np.arange(2), "none": None}
            state = ckpt.update(ckpt.init(), tree, {"loss": NAN}, 0, force=force)
            return ckpt.update(state, tree, {"loss": x, "note": "text"}, 1)

        run(jnp.float32(1), False)
        ckpt.wait()
        assert [info.epoch for info in ckpt.checkpoints] == [1]
        assert ckpt.latest.logs == {"loss": 1.0, "note": "text"}
        run(jnp.float32(1), True)
        ckpt.wait()
        assert sorted(info.epoch for info in ckpt.checkpoints) == [0, 1]
        found = flaxckpt.load(ckpt.latest.path)
        assert (found["name"], found["n"], found["numpy"].tolist()) == (
            "run",
            3,
            [0, 1],
        )


def test_the_state_may_be_used_outside(tmp_path):
    """Decide in a program, then in Python, then in a program again."""
    with flaxckpt.ModelCheckpoint(
        tmp_path / "{epoch}", "loss", save_best_only=True
    ) as ckpt:
        run = jax.jit(lambda s, x, e: ckpt.update(s, {"x": x}, {"loss": x}, e))
        state = run(ckpt.init(), jnp.float32(5), 0)
        state = ckpt.update(state, {"x": 4.0}, {"loss": 4.0}, 1)
        state = run(state, jnp.float32(4), 2)  # no improvement
        state = run(state, jnp.float32(3), 3)
        ckpt.wait()
        assert [info.epoch for info in ckpt.checkpoints] == [0, 1, 3]


@pytest.mark.parametrize("meshed", [False, True])
@pytest.mark.parametrize("save_last", [False, True])
def test_what_is_said_is_what_a_loop_says(tmp_path, capfd, meshed, save_last):
    said, settings = [], {"verbose": 1, "save_best_only": True, "save_last": save_last}
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    tree = make_tree(mesh if meshed else None)
    for run in (in_scan, in_python):
        with flaxckpt.ModelCheckpoint(
            tmp_path / "same" / "{epoch}", "loss", **settings
        ) as ckpt:
            run(ckpt, tree, ckpt.init(tree), False)
            ckpt.wait()
        shutil.rmtree(tmp_path / "same")
        lines = capfd.readouterr().out.splitlines()
        # What waits is superseded in the slot, where a loop does not wait.
        by_chance = re.compile("superseded|waited")
        lines = [line for line in lines if not by_chance.search(line)]
        finished = sorted(
            line for line in lines if "finished" in line and "/last" not in line
        )
        said.append(([line for line in lines if "finished" not in line], finished))
    assert said[0] == said[1]
    assert any("did not improve" in line for line in said[0][0])


def test_one_process_has_all_for_itself(tmp_path):
    """`per_process=` asks no tracer where it is."""
    own = lambda path, leaf: path == ("own",)  # noqa: E731
    with flaxckpt.ModelCheckpoint(tmp_path / "{epoch}", per_process=own) as ckpt:
        run = jax.jit(lambda t, s: ckpt.update(s, t, None, 0))
        run({"own": jnp.ones(2), "w": jnp.zeros(3)}, ckpt.init())
    assert flaxckpt.load(ckpt.latest)["own"].tolist() == [1, 1]


def test_explicit_shardings_are_seen(tmp_path):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with (
        jax.set_mesh(mesh),
        flaxckpt.ModelCheckpoint(tmp_path / "{epoch}") as ckpt,
    ):
        tree = make_tree(mesh)
        run = jax.jit(lambda t, s: ckpt.update(s, t, None, 0))
        state = ckpt.init()
        text = run.lower(tree, state).compile().as_text()
        assert "all-gather" not in text
        run(tree, state)
        ckpt.wait()
        assert_same_tree(flaxckpt.load(ckpt.latest.path, tree), tree)


def test_shards_are_not_gathered(tmp_path):
    """Where shardings are known; elsewhere it is right, and slower."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    tree = make_tree(mesh)
    for knows in (True, False):
        with flaxckpt.ModelCheckpoint(tmp_path / f"{knows}") as ckpt:
            state = ckpt.init(tree) if knows else ckpt.init()
            run = jax.jit(lambda t, s, c=ckpt: c.update(s, t, None, 0))
            text = run.lower(tree, state).compile().as_text()
            assert ("all-gather" in text) != knows
            run(tree, state)
            ckpt.wait()
            assert_same_tree(flaxckpt.load(ckpt.latest.path, tree), tree)


# ---- what cannot be --------------------------------------------------------------------


def test_vmap_is_told_of_slots(tmp_path):
    ckpt = flaxckpt.ModelCheckpoint(tmp_path / "x", "loss", save_best_only=True)

    def one(loss):
        return ckpt.update(ckpt.init(), {"w": loss}, {"loss": loss}, 0)

    for many in (jax.vmap(one), jax.vmap(jax.jit(one)), jax.jit(jax.vmap(one))):
        with pytest.raises(flaxckpt.CheckpointError, match=r"flaxckpt\.Snapshot"):
            many(jnp.arange(3.0))
    assert not any(tmp_path.iterdir())


def test_shard_map_is_told_where_to_call(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    ckpt = flaxckpt.ModelCheckpoint(tmp_path / "x")

    def local(w):
        ckpt.update(ckpt.init(), {"w": w}, None, 0)
        return w

    with pytest.raises(flaxckpt.CheckpointError, match="within shard_map"):
        jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data"))(
            jnp.arange(8.0)
        )


def test_errors_come_while_tracing(tmp_path):
    """Before anything is written, and before the program runs."""
    ckpt = flaxckpt.ModelCheckpoint(tmp_path / "{val_acc}", "loss", save_best_only=True)
    state, tree = ckpt.init(), {"w": jnp.ones(2)}

    def trace(tree=tree, logs=None, epoch=0, state=state):
        return jax.eval_shape(lambda: ckpt.update(state, tree, logs, epoch))

    with pytest.raises(flaxckpt.TemplateError, match="val_acc"):
        trace(logs={"loss": jnp.float32(1)})
    with pytest.raises(flaxckpt.MetricError, match="scalar"):
        trace(logs={"loss": jnp.ones(3), "val_acc": 1})
    with pytest.raises(flaxckpt.UnsupportedLeafError, match="object of type"):
        trace(tree={"w": object()}, logs={"loss": jnp.float32(1), "val_acc": 1})
    with pytest.raises(flaxckpt.SettingError, match="epoch"):
        trace(logs={"loss": jnp.float32(1), "val_acc": 1}, epoch=jnp.ones(2))
    with pytest.raises(flaxckpt.SettingError, match="logs"):
        trace(logs=[1])
    with pytest.raises(flaxckpt.SettingError, match="state"):
        trace(logs={"loss": jnp.float32(1), "val_acc": 1}, state=tree)
    with pytest.raises(flaxckpt.CheckpointError, match="force=True"):
        jax.eval_shape(lambda w: ckpt.save({"w": w}, epoch=0) and w, tree["w"])
    with pytest.warns(UserWarning, match="Nothing is saved"):
        trace(logs={"val_acc": 1})
    assert not any(tmp_path.iterdir())


def run_ten(ckpt):
    def body(carry, epoch):
        x, state = carry
        x = x + 1
        return (x, ckpt.update(state, {"x": x}, None, epoch)), None

    steps = jnp.arange(10)
    carry = jnp.zeros(3), ckpt.init()
    return jax.block_until_ready(
        jax.jit(lambda c: jax.lax.scan(body, c, steps)[0])(carry)
    )


def test_an_error_does_not_stop_the_program(tmp_path):
    """It is raised by `wait`, and what is saved before and after it is there."""
    (tmp_path / "5").write_text("in the way")
    ckpt = flaxckpt.ModelCheckpoint(tmp_path / "{epoch}")
    x, _ = run_ten(ckpt)
    assert x.tolist() == [10, 10, 10]
    with pytest.raises(flaxckpt.CheckpointPathError, match="is a file"):
        ckpt.wait()
    ckpt.wait()  # raised once
    assert [i.epoch for i in ckpt.checkpoints] == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    ckpt.close()


def test_an_error_may_stop_the_program(tmp_path):
    (tmp_path / "5").write_text("in the way")
    ckpt = flaxckpt.ModelCheckpoint(tmp_path / "{epoch}", stop_on_error=True)
    with pytest.raises(jax.errors.JaxRuntimeError, match="is a file"):
        run_ten(ckpt)
    (tmp_path / "5").unlink()
    with pytest.raises(CheckpointPathError, match="is a file"):
        ckpt.wait()  # also for those who have not asked for the program's results
    ckpt.wait()
    assert ckpt.counts.failed == 1
    assert [info.epoch for info in ckpt.checkpoints] == [0, 1, 2, 3]
    run_ten(ckpt)
    ckpt.close()
    assert [info.epoch for info in ckpt.checkpoints] == list(range(10))


def test_a_program_that_was_ended_half_way_is_heard_of(tmp_path):
    """Of a save that not all devices have come for, nothing is mixed into the next."""
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    tree = {"x": jax.device_put(jnp.arange(4.0), NamedSharding(mesh, P("data")))}
    ckpt = flaxckpt.ModelCheckpoint(tmp_path / "{epoch}")
    ckpt.init(tree)
    run = jax.jit(lambda t, e: ckpt.update(ckpt.init(), t, None, e))
    run(tree, 0)
    ckpt.wait()
    (stream,) = ckpt._programs._streams

    def come(device, epoch, values):
        scalars = {
            "flags": {"save": np.True_, "to_slot": np.False_, "due": np.True_},
            "at": {"epoch": np.int32(epoch)},
            "logs": {},
            "state": {name: np.int32(0) for name in ("seen", "batches")},
            "before": {"best": np.float32(0)},
        }
        cuts = stream._cuts([(4,)])
        stream._take_shards(cuts, (device, scalars), [np.array(values)])

    come(0, 1, [1.0, 1.0])  # and the other device never
    come(0, 2, [2.0, 2.0])
    come(1, 2, [2.0, 2.0])
    with pytest.raises(flaxckpt.CheckpointError, match="ended before all devices"):
        ckpt.wait()
    assert [info.epoch for info in ckpt.checkpoints] == [0]
    run(tree, 3)
    ckpt.close()
    assert [info.epoch for info in ckpt.checkpoints] == [0, 3]
    np.testing.assert_array_equal(flaxckpt.load(tmp_path / "4")["x"], np.arange(4.0))


# ---- processes that end ----------------------------------------------------------------

PROGRAM = """
    import os, signal, sys
    import jax, jax.numpy as jnp, numpy as np, optax
    from jax.experimental import io_callback
    import flaxckpt

    directory, kill_at = sys.argv[1], int(sys.argv[2])
    ckpt = flaxckpt.ModelCheckpoint(directory + "/{epoch}", max_to_keep=3)
    optimizer = optax.adam(1e-2)
    params = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
    train = {"params": params, "opt": optimizer.init(params), "key": jax.random.key(1)}
    found = ckpt.restore(like=train)
    state, start = ckpt.init(), 0
    if found:
        train, state, start = found.tree, found.state, found.epoch + 1
    print("from", start, flush=True)

    def kill(epoch):
        if epoch == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.int32(0)

    def body(carry, epoch):
        train, state = carry
        key, use = jax.random.split(train["key"])
        x = jax.random.normal(use, (32, 64))
        loss_of = lambda p: jnp.mean(jnp.tanh(x @ p["w"]) ** 2)
        loss, grads = jax.value_and_grad(loss_of)(train["params"])
        updates, opt = optimizer.update(grads, train["opt"])
        params = optax.apply_updates(train["params"], updates)
        train = {"params": params, "opt": opt, "key": key}
        state = ckpt.update(state, train, {"loss": loss}, epoch)
        io_callback(kill, jax.ShapeDtypeStruct((), jnp.int32), epoch, ordered=False)
        return (train, state), loss

    run = jax.jit(lambda carry, epochs: jax.lax.scan(body, carry, epochs))
    run((train, state), jnp.arange(start, 40))
"""


def run_program(program, *arguments, flags=""):
    """Run a program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "XLA_FLAGS": flags},
    )


def start(directory, kill_at=-1, ending=""):
    return run_program(textwrap.dedent(PROGRAM) + ending, directory, kill_at)


def test_killed_in_a_scan_it_goes_on_bit_for_bit(tmp_path):
    """And a program that forgets `wait` loses nothing where it ends by itself."""
    whole = start(tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    killed = start(tmp_path / "killed", kill_at=25)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = start(tmp_path / "killed")
    assert resumed.returncode == 0, resumed.stderr
    first = int(resumed.stdout.split()[1])
    assert 0 < first <= 26
    found = flaxckpt.list_checkpoints(tmp_path / "whole")
    assert [info.epoch for info in found] == [37, 38, 39]
    others = flaxckpt.list_checkpoints(tmp_path / "killed")
    for one, other in zip(found, others, strict=True):
        assert (one.epoch, one.logs, one.state) == (
            other.epoch,
            other.logs,
            other.state,
        )
        assert_same_tree(flaxckpt.load(one.path), flaxckpt.load(other.path))


@pytest.mark.parametrize("ending", ["\nraise SystemExit(3)", "\nraise ValueError"])
def test_an_end_by_an_error_loses_nothing(tmp_path, ending):
    result = start(tmp_path, ending=ending)
    assert result.returncode in (1, 3)
    found = flaxckpt.list_checkpoints(tmp_path)
    assert [info.epoch for info in found] == [37, 38, 39]


def test_a_function_that_is_differentiated_may_save(tmp_path):
    with flaxckpt.ModelCheckpoint(tmp_path / "{epoch}") as ckpt:

        def total(w, state):
            def body(carry, epoch):
                w, state = carry
                loss = (w**2).sum()
                return (w * 0.5, ckpt.update(state, {"w": w}, {"l": loss}, epoch)), loss

            (_, state), losses = jax.lax.scan(body, (w, state), jnp.arange(3))
            return losses.sum(), state

        fresh = jax.tree.map(jnp.asarray, ckpt.init())
        grad, _ = jax.jit(jax.grad(total, has_aux=True))(jnp.ones(2), fresh)
        np.testing.assert_allclose(grad, 2 * (1 + 1 / 4 + 1 / 16))
        ckpt.wait()
        found = [flaxckpt.load(info.path)["w"].tolist() for info in ckpt.checkpoints]
        assert found == [[1, 1], [0.5, 0.5], [0.25, 0.25]]


def test_no_value_of_a_trace_is_kept(tmp_path):
    with (
        jax.checking_leaks(),
        flaxckpt.ModelCheckpoint(tmp_path / "{epoch}") as ckpt,
    ):
        run = jax.jit(lambda w, s: ckpt.update(s, {"w": w}, {"l": w.sum()}, 0))
        run(jnp.ones(3), jax.tree.map(jnp.asarray, ckpt.init()))


@pytest.mark.parametrize("in_flight", [1, 8])
def test_large_shards_do_not_hang(tmp_path, in_flight):
    """Where as many threads hand over as there are devices."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    tree = {
        "w": jax.device_put(jnp.zeros((1200, 1200)), NamedSharding(mesh, P("a", "b")))
    }
    with flaxckpt.ModelCheckpoint(tmp_path / "x", max_in_flight=in_flight) as ckpt:

        def body(carry, epoch):
            tree, state = carry
            tree = {"w": tree["w"] + 1}
            return (tree, ckpt.update(state, tree, None, epoch)), None

        steps = jnp.arange(6)
        run = jax.jit(lambda c: jax.lax.scan(body, c, steps)[0])
        run((tree, ckpt.init(tree)))
        found = ckpt.restore(tree)
        assert found.epoch == 5
        assert (np.asarray(found.tree["w"]) == 6).all()


def test_what_was_stopped_on_a_mesh_saves_again(tmp_path):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    x = jax.device_put(jnp.zeros((8, 8)), NamedSharding(mesh, P("a", "b")))
    (tmp_path / "5").write_text("in the way")
    ckpt = flaxckpt.ModelCheckpoint(tmp_path / "{epoch}", stop_on_error=True)

    def body(carry, epoch):
        x, state = carry
        return (x + 1, ckpt.update(state, {"x": x}, None, epoch)), None

    steps = jnp.arange(10)
    run = jax.jit(lambda c: jax.lax.scan(body, c, steps)[0])
    with pytest.raises(jax.errors.JaxRuntimeError, match="is a file"):
        jax.block_until_ready(run((x, ckpt.init({"x": x}))))
    (tmp_path / "5").unlink()
    with pytest.raises(CheckpointPathError, match="is a file"):
        ckpt.wait()
    run((x, ckpt.init()))
    ckpt.close()
    assert [info.epoch for info in ckpt.checkpoints] == list(range(10))


def auto_mesh():
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("dtype", ["int4", "int2", "float4_e2m1fn"])
@pytest.mark.parametrize("meshed", [False, True])
def test_elements_of_less_than_a_byte(tmp_path, dtype, meshed):
    values = (jnp.arange(32) % 4 - int(dtype[0] != "u")).reshape(8, 4).astype(dtype)
    if meshed:
        values = jax.device_put(values, NamedSharding(auto_mesh(), P("a", "b")))
    with flaxckpt.ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        run = jax.jit(lambda x, s: ckpt.update(s, {"x": x}, None, 0))
        run(values, ckpt.init({"x": values}))
        ckpt.wait()
        found = flaxckpt.load(ckpt.latest.path, {"x": values})["x"]
    assert found.dtype == values.dtype
    expected = np.asarray(values).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(found).astype(np.float32), expected)


def test_without_known_shardings_it_does_not_hang(tmp_path):
    w = jax.device_put(jnp.ones((1024, 1024)), NamedSharding(auto_mesh(), P("a", "b")))
    with flaxckpt.ModelCheckpoint(tmp_path / "{epoch}", max_to_keep=1) as ckpt:

        def body(carry, epoch):
            w, state = carry
            w = w + 1
            return (w, ckpt.update(state, {"w": w}, None, epoch)), None

        steps = jnp.arange(8)
        jax.jit(lambda c: jax.lax.scan(body, c, steps)[0])((w, ckpt.init()))
        found = ckpt.restore({"w": w})
    assert found.epoch == 7
    assert (np.asarray(found.tree["w"]) == 9).all()


def test_shardings_of_another_tree_are_warned_of(tmp_path):
    w = jax.device_put(jnp.ones((8, 8)), NamedSharding(auto_mesh(), P("a", "b")))
    with flaxckpt.ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        state = ckpt.init(w)
        with pytest.warns(UserWarning, match="another structure"):
            jax.jit(lambda w: ckpt.update(state, {"w": w}, None, 0))(w)


def test_an_error_ends_all_devices_that_wait_for_each_other(tmp_path):
    """And the next run saves at once, with no `wait` between them."""
    x = jax.device_put(jnp.ones((8, 8)), NamedSharding(auto_mesh(), P("a", "b")))
    (tmp_path / "5").write_text("in the way")
    ckpt = flaxckpt.ModelCheckpoint(tmp_path / "{epoch}", stop_on_error=True)
    state = ckpt.init({"x": x})

    def body(carry, epoch):
        x, state = carry
        x = x + x.sum() / 64  # which every device waits for
        return (x, ckpt.update(state, {"x": x}, None, epoch)), None

    run = jax.jit(lambda carry, epochs: jax.lax.scan(body, carry, epochs)[0])
    with pytest.raises(jax.errors.JaxRuntimeError, match="is a file"):
        jax.block_until_ready(run((x, state), jnp.arange(20)))
    (tmp_path / "5").unlink()
    jax.block_until_ready(run((x, state), jnp.arange(20, 30)))
    with pytest.raises(CheckpointPathError, match="is a file"):
        ckpt.close()
    expected = [0, 1, 2, 3, *range(20, 30)]
    assert [info.epoch for info in ckpt.checkpoints] == expected


@pytest.mark.parametrize("how", ["update", "save"])
def test_a_call_behind_a_program_that_saves_does_not_hang(tmp_path, how):
    """Where there is memory for one save, which the program is to have first."""
    x = jax.device_put(jnp.ones((512, 512)), NamedSharding(auto_mesh(), P("a", "b")))
    ckpt = flaxckpt.ModelCheckpoint(tmp_path / "{epoch}", max_in_flight=1)
    state = ckpt.init({"x": x})

    def body(carry, epoch):
        x, state = carry
        return (x + 1, ckpt.update(state, {"x": x}, None, epoch)), None

    run = jax.jit(lambda carry, epochs: jax.lax.scan(body, carry, epochs)[0])
    for first in (0, 5, 10):
        x, state = run((x, state), first + jnp.arange(4))
        if how == "update":
            state = ckpt.update(state, {"x": x}, None, first + 4)
        else:
            ckpt.save({"x": x}, first + 4, state=state)
    ckpt.close()
    assert [info.epoch for info in ckpt.checkpoints] == list(range(15))


FAILED_BEFORE = """
    import sys
    import jax, jax.numpy as jnp
    from jax.experimental import io_callback
    from jax.sharding import NamedSharding, PartitionSpec as P
    import flaxckpt

    mesh = jax.make_mesh((4,), ("a",), devices=jax.devices()[4:])
    y = jax.device_put(jnp.ones(8), NamedSharding(mesh, P("a")))

    def fail(_):
        raise ValueError("of somebody else")

    def call(y):
        return io_callback(fail, jax.ShapeDtypeStruct(y.shape, y.dtype), y)

    over = dict(mesh=mesh, in_specs=P("a"), out_specs=P("a"), check_vma=False)
    try:
        jax.block_until_ready(jax.jit(jax.shard_map(call, **over))(y))
    except jax.errors.JaxRuntimeError:
        print("failed", flush=True)

    ours = jax.make_mesh((4,), ("a",), devices=jax.devices()[:4],
                         axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(jnp.eye(512) * 0.5, NamedSharding(ours, P("a")))
    ckpt = flaxckpt.ModelCheckpoint(sys.argv[1] + "/{epoch}")

    def body(carry, epoch):
        x, state = carry
        x = jax.lax.fori_loop(0, 20, lambda i, y: jnp.tanh(y @ y), x)
        return (x, ckpt.update(state, {"x": x}, None, epoch)), None

    run = jax.jit(lambda c: jax.lax.scan(body, c, jnp.arange(6))[0])
    result = run((x, ckpt.init({"x": x})))
    ckpt.wait()
    print([info.epoch for info in ckpt.checkpoints], flush=True)
"""


def test_wait_waits_though_another_program_has_failed(tmp_path):
    flags = "--xla_force_host_platform_device_count=8"
    result = run_program(FAILED_BEFORE, tmp_path, flags=flags)
    assert result.stdout.splitlines() == ["failed", "[0, 1, 2, 3, 4, 5]"], result.stderr


IN_A_THREAD = """
    import sys, threading, time
    import jax, jax.numpy as jnp
    import flaxckpt

    ckpt = flaxckpt.ModelCheckpoint(sys.argv[1] + "/{epoch}")
    run = jax.jit(lambda s, e: ckpt.update(s, {"w": jnp.ones(9)}, None, e))

    def train():
        state = ckpt.init()
        for epoch in range(4):
            time.sleep(0.2)
            state = run(state, epoch)

    threading.Thread(target=train).start()
"""


def test_a_thread_that_outlives_the_main_one_loses_nothing(tmp_path):
    result = run_program(IN_A_THREAD, tmp_path)
    assert result.returncode == 0, result.stderr
    found = [info.epoch for info in flaxckpt.list_checkpoints(tmp_path)]
    assert found == [0, 1, 2, 3], result.stderr


def test_logs_that_no_record_can_keep(tmp_path):
    with (
        jax.checking_leaks(),
        flaxckpt.ModelCheckpoint(tmp_path / "{epoch}") as ckpt,
    ):

        def step(w, state):
            logs = {"l": w.sum(), "m": {"a": w.sum()}, "k": jax.random.key(0)}
            return ckpt.update(
                state, {"w": w}, {**logs, "z": w.sum().astype(jnp.complex64)}, 0
            )

        state = jax.tree.map(jnp.asarray, ckpt.init())
        with pytest.warns(UserWarning, match=r"'k' is .*, 'z' is of dtype complex64"):
            jax.jit(step)(jnp.ones(3), state)
        ckpt.wait()
        assert ckpt.latest.logs == {"l": 3, "m/a": 3}


def test_an_error_while_copying_does_not_tear_what_waits(tmp_path, monkeypatch):
    go, arrived, write = threading.Event(), threading.Event(), _write.write_checkpoint

    def wait_and_write(*args, **kwargs):
        arrived.set()
        assert go.wait(60)
        return write(*args, **kwargs)

    monkeypatch.setattr(_series_writer, "write_checkpoint", wait_and_write)
    ckpt = flaxckpt.ModelCheckpoint(tmp_path / "best")

    def save(value, epoch):
        tree = {"a": jnp.full(100, value), "b": jnp.full(100, value)}
        return ckpt.update(ckpt.init(), tree, None, epoch)

    run = jax.jit(save)
    jax.block_until_ready(run(0.0, 0))
    assert arrived.wait(60)
    jax.block_until_ready(run(1.0, 1))  # waits
    copyto, copied = np.copyto, []

    def interrupted(*args):
        if copied:
            raise OSError("interrupted")
        copied.append(copyto(*args))

    with monkeypatch.context() as patch:
        patch.setattr(np, "copyto", interrupted)
        jax.block_until_ready(run(2.0, 2))
        jax.effects_barrier()
    assert copied
    go.set()
    with pytest.raises(flaxckpt.CheckpointWriteError, match="interrupted"):
        ckpt.close()
    found = flaxckpt.load(tmp_path / "best")
    assert {float(x) for leaf in found.values() for x in leaf} == {1.0}
