"""`state.stale`: due checks since the last improvement, for early stopping."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import flaxckpt
from flaxckpt import CheckpointState, ModelCheckpoint, step

LOSSES = [0.5, 0.4, 0.6, np.nan, 0.45, 0.3, 0.3, 0.35]
STALE = [0, 0, 1, 2, 3, 0, 1, 2]


def tree_of(epoch):
    return {"w": np.full(3, epoch, np.float32)}


@pytest.mark.parametrize("wrap", [float, np.float32, jnp.float32])
@pytest.mark.parametrize("save_best_only", [True, False])
def test_update_counts_as_step_does(tmp_path, save_best_only, wrap):
    settings = {"mode": "min", "save_best_only": save_best_only}
    pure = CheckpointState.create("loss", **settings)
    with ModelCheckpoint(tmp_path / "{epoch}", "loss", **settings) as ckpt:
        state = ckpt.init()
        for epoch, (loss, stale) in enumerate(zip(LOSSES, STALE, strict=True)):
            logs = {"loss": wrap(loss)}
            state = ckpt.update(state, tree_of(epoch), logs, epoch)
            pure, _ = step(pure, logs, epoch)
            assert int(state.stale) == int(pure.stale) == stale
    np.testing.assert_array_equal(
        state.best, np.float32(0.3 if save_best_only else np.nan)
    )


def test_a_device_counts_what_it_computes(tmp_path):
    """The loop may donate the state that it gets."""
    copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state), donate_argnums=0)
    with ModelCheckpoint(tmp_path / "{epoch}", "loss", mode="min") as ckpt:
        state = ckpt.init()
        for epoch, loss in enumerate(LOSSES):
            logs = {"loss": jnp.float32(loss)}
            state = ckpt.update(state, tree_of(epoch), logs, epoch)
            assert isinstance(state.stale, jax.Array)
            donated, state = state, copy(state)
            assert donated.stale.is_deleted()
        assert int(state.stale) == STALE[-1]
        ckpt.wait()
        for info, stale in zip(ckpt.checkpoints, STALE, strict=True):
            assert ckpt.restore(which=info.path).state.stale == stale


@pytest.mark.parametrize("where", ["sharded", "on one device", "on the host"])
def test_programs_take_the_state_beside_the_tree(tmp_path, where):
    """Whatever devices have computed the metrics: those of an evaluation, say."""
    devices, traced = jax.devices(), []
    assert len(devices) == 8
    mesh = Mesh(np.array(devices), "x")
    tree = {
        "sharded": lambda: jax.device_put(jnp.ones(8), NamedSharding(mesh, P("x"))),
        "on one device": lambda: jax.device_put(jnp.ones(8), devices[3]),
        "on the host": lambda: np.ones(8),
    }[where]()

    @jax.jit
    def train(tree, state):
        traced.append(1)
        return tree + 1, state

    with ModelCheckpoint(tmp_path / "{epoch}", "loss", mode="min") as ckpt:
        state = ckpt.init()
        for epoch, loss in enumerate(LOSSES):
            other = devices[0 if where == "on the host" else epoch % 3]
            logs = {"loss": jax.device_put(jnp.float32(loss), other)}
            state = ckpt.update(state, tree, logs, epoch)
            tree, state = train(tree, state)
        assert int(state.stale) == STALE[-1]
        # A mesh also sees the counters change, from numpy's to arrays, once.
        assert len(traced) == (2 if where == "sharded" else 1)


def test_devices_that_nobody_has_chosen_are_not_chosen(tmp_path):
    """Where nothing is committed, a program on any devices still takes the state."""
    mesh = Mesh(np.array(jax.devices()), "x")
    spread = jax.device_put(jnp.ones(8), NamedSharding(mesh, P("x")))
    use = jax.jit(lambda state, params: (state, params + 1))
    for tree in ({"w": jnp.ones(3)}, {"epoch": jnp.int32(0), "params": spread}):
        with ModelCheckpoint(tmp_path / "{epoch}", "loss", mode="min") as ckpt:
            state = ckpt.init()
            for epoch, loss in enumerate(LOSSES):
                state = ckpt.update(state, tree, {"loss": jnp.float32(loss)}, epoch)
                use(state, spread)
        assert int(state.stale) == STALE[-1]


@pytest.mark.parametrize("where", ["default device", "mesh"])
def test_a_metric_in_the_host_s_memory_counts(tmp_path, where):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if where == "mesh":
        sharding = NamedSharding(Mesh(np.array(jax.devices()), "x"), P())
    tree = {"w": jax.device_put(jnp.ones(8), sharding)}
    pinned = sharding.with_memory_kind("pinned_host")
    with ModelCheckpoint(tmp_path / "{epoch}", "loss", mode="min") as ckpt:
        state = ckpt.init()
        for epoch, loss in enumerate(LOSSES):
            logs = {"loss": jax.device_put(jnp.float32(loss), pinned)}
            state = ckpt.update(state, tree, logs, epoch)
        assert int(state.stale) == STALE[-1]


@pytest.mark.parametrize("kinds", [("Explicit",) * 2, ("Auto", "Explicit")])
@pytest.mark.parametrize("save_best_only", [True, False])
def test_a_metric_on_another_mesh_counts(tmp_path, kinds, save_best_only):
    """With explicit axes, the types of arrays have their mesh."""
    meshes = [
        jax.make_mesh(shape, names, axis_types=(getattr(AxisType, kind),) * len(shape))
        for shape, names, kind in [
            ((4, 2), ("a", "b"), kinds[0]),
            ((8,), "x", kinds[1]),
        ]
    ]
    rows, whole = NamedSharding(meshes[0], P("a")), NamedSharding(meshes[1], P())
    tree = {"w": jax.device_put(jnp.ones(8), rows)}
    settings = {"mode": "min", "save_best_only": save_best_only}
    with ModelCheckpoint(tmp_path / "{epoch}", "loss", **settings) as ckpt:
        state = ckpt.init(tree)
        for epoch, loss in enumerate(LOSSES):
            logs = {"loss": jax.device_put(jnp.float32(loss), whole)}
            state = ckpt.update(state, tree, logs, epoch)
    assert int(state.stale) == STALE[-1]
    assert len(ckpt.checkpoints) == (3 if save_best_only else len(LOSSES))


def test_it_is_never_waited_for_the_metric(tmp_path):
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 400, lambda _, x: x @ x / 9e2, x))
    devices = jax.devices()[:2]
    with ModelCheckpoint(tmp_path / "{epoch}", "loss", mode="min") as ckpt:
        state = ckpt.update(ckpt.init(), tree_of(0), {"loss": jnp.float32(1)}, 0)
        ckpt.wait()
        for epoch, device in enumerate(devices, 1):
            loss = slow(jax.device_put(jnp.ones((900, 900)), device))[0, 0]
            state = ckpt.update(state, tree_of(epoch), {"loss": loss}, epoch)
            assert not loss.is_ready()
            assert not state.stale.is_ready()


@pytest.mark.parametrize("settings", [{}, {"save_best_only": True, "save_last": True}])
@pytest.mark.parametrize("stop", range(1, len(LOSSES)))
def test_a_run_goes_on_counting_where_it_stopped(tmp_path, settings, stop):
    def run(until):
        losses = []
        with ModelCheckpoint(tmp_path / "{epoch}", "loss", **settings) as ckpt:
            tree, state, start = ckpt.resume(tree_of(0))
            for epoch in range(start, until):
                state = ckpt.update(state, tree, {"loss": LOSSES[epoch]}, epoch)
                losses.append(int(state.stale))
        return losses

    assert run(stop) + run(len(LOSSES)) == STALE


def test_another_metric_begins_anew(tmp_path):
    with ModelCheckpoint(tmp_path / "{epoch}", "loss") as ckpt:
        state = ckpt.init()
        for epoch, loss in enumerate([0.1, 0.2, 0.3]):
            logs = {"loss": loss, "accuracy": 0.5}
            state = ckpt.update(state, tree_of(epoch), logs, epoch)
    assert state.stale == 2
    for monitor, stale in (("loss", 2), ("accuracy", 0)):
        with ModelCheckpoint(tmp_path / "{epoch}", monitor) as ckpt:
            state = ckpt.restore().state
            assert state.stale == stale
            state = ckpt.update(state, tree_of(3), {"loss": 0.2, "accuracy": 0.1}, 3)
            assert state.stale == (3 if monitor == "loss" else 0)


@pytest.mark.parametrize("save_best_only", [True, False])
def test_as_the_condition_of_a_loop_in_a_program(tmp_path, save_best_only):
    values = jnp.float32([5, 4, 3, 3.5, 3, 2, 4, 5, 6, 7, 8, 1])
    with ModelCheckpoint(
        tmp_path / "{step}", "loss", mode="min", save_freq=1,
        save_best_only=save_best_only,
    ) as ckpt:  # fmt: skip

        @jax.jit
        def train(state):
            def body(carry):
                state, number = carry
                logs = {"loss": values[number]}
                state = ckpt.update(state, {"n": number}, logs, step=number)
                return state, number + 1

            def goes_on(carry):
                return (carry[0].stale < 3) & (carry[1] < 12)

            return jax.lax.while_loop(goes_on, body, (state, jnp.int32(1)))

        state, number = train(ckpt.init())
        assert (int(state.stale), int(number)) == (3, 9)
        ckpt.wait()
        names = [info.path.name for info in ckpt.checkpoints]
    expected = [1, 2, 5] if save_best_only else range(1, 9)
    assert names == list(map(str, expected))


@pytest.mark.parametrize(
    "logs",
    [{}, None, {"other": 0.1}, {"m": "text"}, {"m": np.ones(3)}, {"m": len}],
    ids=repr,
)  # fmt: skip
def test_what_cannot_be_compared_does_not_count(tmp_path, logs):
    """Nor is it an error, since the decision does not need it."""
    with ModelCheckpoint(tmp_path / "{epoch}", "m", mode="min") as ckpt:
        state = ckpt.init()
        for epoch, each in enumerate([{"m": 1.0}, {"m": 2.0}, logs, {"m": 2.0}]):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                state = ckpt.update(state, tree_of(epoch), each, epoch)
    assert state.stale == 2
    assert len(flaxckpt.list_checkpoints(tmp_path)) == 4


def test_without_a_direction_nothing_counts(tmp_path):
    state = CheckpointState.create("m")
    for epoch in range(3):
        state, save = step(state, {"m": 1.0}, epoch)
        assert save
    assert state.stale == 0


def test_it_stays_at_the_largest_number():
    for jit in (lambda f: f, jax.jit):
        state = CheckpointState.create("loss")
        for epoch, loss in enumerate([1, 2, 3]):
            state, _ = jit(step)(state, {"loss": loss}, epoch)
            if epoch == 0:
                largest = {"stale": np.int32(2**31 - 2)}
                state = flaxckpt._decision.state.with_leaves(state, **largest)
        assert int(state.stale) == 2**31 - 1


def test_members_with_metrics_of_their_own_count_none(tmp_path):
    """They share one state, and so their saves; each may count by `step` for itself."""
    with ModelCheckpoint(tmp_path / "{step}", "loss", save_freq=2) as ckpt:

        def member(w, state):
            def body(carry, number):
                w, state = carry
                mean = jax.lax.pmean(w.sum(), "seed")
                logs = {"loss": mean if shares else w.sum()}
                return (w + 1, ckpt.update(state, {"w": w}, logs, step=number)), None

            return jax.lax.scan(body, (w, state), jnp.arange(1, 7))[0]

        for shares in (True, False):
            train = jax.vmap(member, (0, None), (0, None), axis_name="seed")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _, state = jax.jit(train)(jnp.ones((3, 2)), ckpt.init())
            ckpt.wait()
            assert int(state.stale) == (2 if shares else 0)
            assert ckpt.restore().state.stale == state.stale
            assert ckpt.restore().tree["w"].shape == (3, 2)


def test_a_gradient_goes_through(tmp_path):
    with ModelCheckpoint(tmp_path / "{step}", "loss", save_freq=1) as ckpt:

        def loss_of(w, state):
            loss = (w**2).sum()
            state = ckpt.update(state, {"w": w}, {"loss": loss}, step=1)
            return loss * (state.stale + 1).astype(loss.dtype), state

        slope, state = jax.jit(jax.grad(loss_of, has_aux=True))(
            jnp.ones(2), ckpt.init()
        )
        assert (slope == 2).all()
        assert int(state.stale) == 0
        assert state.has_met


# ---- what need not be compared is no error -------------------------------------------


@pytest.mark.parametrize("value", [2**40, 10**400, np.longdouble("1e400")], ids=repr)
def test_a_constant_in_a_program(tmp_path, value):
    with ModelCheckpoint(tmp_path / "{step}", "loss", save_freq=1) as ckpt:

        @jax.jit
        def train(state, at):
            state = ckpt.update(state, {"n": at}, {"loss": value}, step=at)
            return state, step(ckpt.init(), {"loss": value}, step=at)[0]

        for state in train(ckpt.init(), 1):
            assert (int(state.stale), bool(state.has_met)) == (0, True)


def test_an_infinite_metric_ends_no_program(tmp_path):
    """As of a run that has not evaluated yet."""
    with (
        jax.debug_infs(True),
        ModelCheckpoint(tmp_path / "{epoch}", "loss") as ckpt,
    ):
        state = ckpt.init()
        for epoch, (loss, stale) in enumerate([(np.inf, 0), (np.inf, 1), (3.0, 0)]):
            state = ckpt.update(state, tree_of(epoch), {"loss": loss}, epoch)
            state = jax.jit(lambda state: state)(state)
            assert int(state.stale) == stale


def test_a_shard_s_own_metric_does_not_count_in_a_state_that_all_share():
    mesh = Mesh(np.array(jax.devices()), "x")

    def train(state, x, total):
        loss = jax.lax.pmean(x.sum(), "x") if total else x.sum()
        body = lambda state, epoch: (step(state, {"loss": loss}, epoch)[0], None)  # noqa: E731
        return jax.lax.scan(body, state, jnp.arange(3))[0]

    for total in (True, False):
        train_all = jax.shard_map(
            functools.partial(train, total=total),
            mesh=mesh,
            in_specs=(P(), P("x")),
            out_specs=P(),
        )
        state = train_all(CheckpointState.create("loss"), jnp.arange(8.0))
        assert int(state.stale) == (2 if total else 0)


class Counting:
    def __init__(self):
        self.calls = 0

    def compute(self):
        self.calls += 1
        return 1.0


def test_step_looks_at_the_monitored_metric_alone():
    metric, monitored = Counting(), Counting()
    state = CheckpointState.create("val_loss")
    for logs in (
        np.ones(3), [1, 2], {"other": metric}, {"val": {"other": metric}},
        {("no", "text"): metric},
    ):  # fmt: skip
        state, save = step(state, logs, 0)
        assert save
    assert (metric.calls, state.has_met) == (0, False)
    for logs in ({"val": {"loss": monitored}}, {"val/loss": 1}, {"val_loss": 2}):
        state, _ = step(state, {**logs, "other": metric}, 0)
    assert (metric.calls, monitored.calls, state.stale) == (0, 1, 2)


def test_a_state_of_members_is_refused(tmp_path):
    state = CheckpointState.create("loss")
    states, _ = jax.vmap(lambda x: step(state, {"loss": x}, 0))(jnp.arange(3.0))
    assert states.stale.shape == (3,)
    with (
        ModelCheckpoint(tmp_path / "{epoch}", "loss") as ckpt,
        pytest.raises(flaxckpt.SettingError, match="has an axis, as vmap returns it"),
    ):
        ckpt.update(states, tree_of(0), {"loss": 1.0}, 0)
