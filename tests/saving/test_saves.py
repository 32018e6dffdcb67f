"""The loop does not wait, and what is written is what was there when it was saved."""

import contextlib
import errno
import re
import threading
import tracemalloc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from never_ready import take_metrics_for_unknown
from orbax.checkpoint import v1

import flaxckpt
from flaxckpt import CheckpointWriteError, ModelCheckpoint, SettingError
from flaxckpt._checkpoints import series_writer as _series_writer
from flaxckpt._checkpoints import write as _write
from flaxckpt._direct import learn as _learn
from flaxckpt._direct import sources as _sources
from flaxckpt._direct import write as _direct_write
from flaxckpt._saving.queue import JobQueue


def names(infos):
    return [info.path.name for info in infos]


def tree_of(epoch):
    return {
        "w": jnp.full((40, 30), epoch, jnp.float32),
        "key": jax.random.key(epoch),
        "host": np.full(5, epoch),
        "epoch": epoch,
        "name": f"epoch {epoch}",
    }


def epoch_of(tree):
    """The epoch of a tree of `tree_of`; all its leaves must agree."""
    epoch = tree["epoch"]
    wanted = tree_of(epoch)
    tree, wanted = dict(tree), dict(wanted)
    for each in (tree, wanted):
        each["key"] = jax.random.key_data(each["key"])
    jax.tree.map(np.testing.assert_array_equal, tree, wanted)
    return epoch


@contextlib.contextmanager
def held(monkeypatch):
    """Hold the writing thread where it begins to write, until told to go on."""
    arrived, go = threading.Event(), threading.Event()
    write = _write.write_checkpoint

    def wait_and_write(*args, **kwargs):
        arrived.set()
        assert go.wait(60)
        return write(*args, **kwargs)

    monkeypatch.setattr(_series_writer, "write_checkpoint", wait_and_write)
    try:
        yield arrived, go
    finally:
        go.set()


@pytest.fixture
def late(monkeypatch):
    """Treat every device array as not computed yet."""
    take_metrics_for_unknown(monkeypatch)


@jax.jit
def slow(x):
    """Take a second or so."""
    return jax.lax.fori_loop(0, 100, lambda _, y: jnp.tanh(y @ y) + x, x).mean()


# ---- decisions that are taken later ------------------------------------------------------


def test_a_due_check_waits_for_no_metric(tmp_path):
    x = jnp.ones((700, 700)) * 1e-3
    slow(x).block_until_ready()
    with ModelCheckpoint(tmp_path / "{epoch}", save_best_only=True) as ckpt:
        state = ckpt.init()
        tree = {"w": jnp.ones(8)}
        for epoch in range(2):  # these compile what the next one runs
            loss = slow(x) - epoch
            state = ckpt.update(state, tree, {"val_loss": loss}, epoch)
            ckpt.wait()
        loss = slow(x) - 2
        state = ckpt.update(state, tree, {"val_loss": loss}, 2)
        assert not state.best.is_ready()  # asked first: the loss is ready before it
        assert not loss.is_ready()
        worse = ckpt.update(state, tree, {"val_loss": loss + 1}, 3)
        ckpt.wait()
        assert names(ckpt.checkpoints) == ["1", "2", "3"]
        assert worse.best == state.best == loss
        assert ckpt.best.logs == {"val_loss": float(loss)}


@given(
    losses=st.lists(
        st.sampled_from([0.5, 0.25, 0.75, np.nan, np.inf, 0.1]), max_size=8
    ),
    template=st.sampled_from(["best", "{epoch}", "{epoch}-{val_loss:.2f}"]),
    settings=st.fixed_dictionaries(
        {},
        optional={
            "save_last": st.just(True),
            "save_weights_only": st.just(True),
            "max_to_keep": st.just(2),
            "max_in_flight": st.sampled_from([1, 3]),
            "initial_value_threshold": st.just(0.6),
        },
    ),
)
def test_deciding_later_changes_nothing(losses, template, settings, tmp_path_factory):
    """The same is on disk as when every metric is known at once."""
    kept = []
    for late in (False, True):
        path = tmp_path_factory.mktemp("run") / template
        with pytest.MonkeyPatch.context() as patch:
            if late:
                take_metrics_for_unknown(patch)
            with ModelCheckpoint(
                path, save_best_only=True, weights=lambda tree: tree, **settings
            ) as ckpt:
                state = ckpt.init()
                for epoch, loss in enumerate(losses):
                    loss = jnp.float32(loss) if late else loss
                    state = ckpt.update(
                        state, tree_of(epoch), {"val_loss": loss}, epoch
                    )
        found = []
        infos = [*ckpt.checkpoints, *([ckpt.latest] if losses and ckpt.latest else [])]
        for info in infos:
            assert epoch_of(flaxckpt.load(info.path)) == info.epoch
            found.append(
                (info.path.name, info.epoch, repr(info.logs), repr(info.state))
            )
        kept.append((found, np.asarray(state.best).tobytes()))
    assert kept[0][1] == kept[1][1]
    by_name = [[(name, epoch) for name, epoch, *_ in found] for found, _ in kept]
    assert by_name[0] == by_name[1]


@pytest.mark.parametrize("weights_only", [False, True])
def test_the_slot_gets_the_state_of_now_into_memory_of_before(
    tmp_path, late, weights_only
):
    """What does not improve goes to the slot all the same, so it is copied."""
    with ModelCheckpoint(
        tmp_path / "best", save_best_only=True, save_last=True,
        save_weights_only=weights_only, weights=lambda tree: {"w": tree["w"]},
    ) as ckpt:  # fmt: skip
        state = ckpt.init()
        for epoch, loss in enumerate([0.5, 0.75, 0.8, 0.9]):
            logs = {"val_loss": jnp.float32(loss)}
            state = ckpt.update(state, tree_of(epoch), logs, epoch)
            ckpt.wait()  # so that the next one is given its memory
            assert epoch_of(ckpt.restore().tree) == epoch
        assert (flaxckpt.load(tmp_path / "best")["w"] == 0).all()


def test_verbose_tells_of_a_late_decision_when_it_is_known(tmp_path, late, capsys):
    with ModelCheckpoint(tmp_path / "best", verbose=1, save_best_only=True) as ckpt:
        state = ckpt.init()
        for epoch, loss in enumerate([0.5, 0.75, 0.25]):
            logs = {"val_loss": jnp.float32(loss)}
            state = ckpt.update(state, tree_of(epoch), logs, epoch)
            ckpt.wait()
    path = tmp_path / "best"
    assert capsys.readouterr().out.splitlines() == [
        f"Epoch 1: val_loss improved from None to 0.50000, saving model to {path}",
        f"Epoch 1: finished saving model to {path}",
        "Epoch 2: val_loss did not improve from 0.50000",
        f"Epoch 3: val_loss improved from 0.50000 to 0.25000, saving model to {path}",
        f"Epoch 3: finished saving model to {path}",
    ]


def test_a_template_that_cannot_be_filled_in_is_an_error_at_once(tmp_path, late):
    with ModelCheckpoint(tmp_path / "{val_loss:d}", save_best_only=True) as ckpt:
        state = ckpt.init()
        with pytest.raises(flaxckpt.TemplateError):
            ckpt.update(state, tree_of(0), {"val_loss": jnp.float32(1)}, 0)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_name_leads_nowhere_else(tmp_path):
    for name in ("{tag}/{epoch}", "{epoch}/{tag}", "{epoch}/{tag}/x"):
        with ModelCheckpoint(tmp_path / name) as ckpt:
            with pytest.raises(flaxckpt.TemplateError, match="a name is empty"):
                ckpt.save(tree_of(0), 0, logs={"tag": ""})
            with pytest.raises(flaxckpt.TemplateError, match="a name is empty"):
                ckpt.update(ckpt.init(), tree_of(0), {"tag": ""}, 0)
            program = jax.jit(lambda s, c=ckpt: c.update(s, tree_of(0), {"tag": ""}, 0))
            with pytest.raises(flaxckpt.TemplateError, match="a name is empty"):
                program(ckpt.init())
            assert ckpt.checkpoints == ()
    assert list(tmp_path.iterdir()) == []
    with ModelCheckpoint(f"{tmp_path}/{{epoch}}//{{tag}}") as ckpt:
        path = ckpt.save(tree_of(0), 0, logs={"tag": "x"})
    assert [info.path for info in ckpt.checkpoints] == [path] == [tmp_path / "1/x"]


def test_a_name_that_a_program_cannot_show_is_an_error_of_the_host(tmp_path):
    """No width of four digits, which would fill the memory, gets to the formatting."""
    with ModelCheckpoint(tmp_path / "{epoch:{n}d}") as ckpt:
        program = jax.jit(lambda s, n: ckpt.update(s, tree_of(0), {"n": n}, 0))
        program(ckpt.init(), jnp.int32(10**9))
        with pytest.raises(flaxckpt.CheckpointError, match="no file name has a width"):
            ckpt.wait()
        program(ckpt.init(), jnp.int32(3))
        ckpt.wait()
    assert [info.path.name for info in ckpt.checkpoints] == ["  1"]


@pytest.mark.parametrize(
    "name", [".flaxckpt-z", "flaxckpt.json", "FLAXCKPT_LEAVES.JSON"]
)
def test_the_last_state_has_no_name_of_our_own_files(tmp_path, name):
    with pytest.raises(flaxckpt.SettingError, match="flaxckpt's own files"):
        ModelCheckpoint(tmp_path / "{epoch}", save_last=name)


def test_nothing_is_saved_within_the_last_state(tmp_path):
    """It would go with it, when a newer one takes its place."""
    path = tmp_path / "{tag}/{epoch}"
    with ModelCheckpoint(path, save_best_only=True, save_last=True) as ckpt:
        state = ckpt.init()
        for epoch, loss in enumerate((1.0, 2.0)):
            logs = {"tag": "a", "val_loss": loss}
            state = ckpt.update(state, tree_of(epoch), logs, epoch)
        with pytest.raises(
            flaxckpt.CheckpointPathError, match="the last state is kept"
        ):
            ckpt.update(state, tree_of(2), {"tag": "last", "val_loss": 0.5}, 2)
    assert [info.path for info in ckpt.checkpoints] == [tmp_path / "a/1"]


def test_on_a_mesh(tmp_path, late):
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    w = jax.device_put(jnp.arange(64.0).reshape(8, 8), place)
    with ModelCheckpoint(tmp_path / "{epoch}", save_best_only=True) as ckpt:
        state = ckpt.init()
        for epoch, loss in enumerate([0.5, 0.75, 0.25]):
            loss = jax.device_put(jnp.float32(loss), everywhere)
            state = ckpt.update(state, {"w": w + epoch}, {"val_loss": loss}, epoch)
        on_one = jax.device_put(jnp.float32(0.1), jax.devices()[3])  # of no one mesh
        state = ckpt.update(state, {"w": w + 9}, {"val_loss": on_one}, 9)
    assert names(ckpt.checkpoints) == ["1", "3", "10"]
    for info in ckpt.checkpoints:
        found = flaxckpt.load(info.path, {"w": w})["w"]
        assert found.sharding == place
        assert (found == w + info.epoch).all()


# ---- copies ------------------------------------------------------------------------------


@pytest.mark.parametrize("snapshot", ["auto", "device", "host", "none"])
def test_training_may_donate_and_change_what_was_saved(tmp_path, snapshot):
    train = jax.jit(lambda w: w + 1, donate_argnums=0)
    w, host = jnp.zeros((200, 200)), np.zeros(50)
    with ModelCheckpoint(tmp_path / "{epoch}", snapshot=snapshot) as ckpt:
        state = ckpt.init()
        for epoch in range(6):
            w = train(w)
            host += 1
            state = ckpt.update(state, {"w": w, "host": host}, {}, epoch)
            if snapshot == "none":
                assert names(ckpt.checkpoints)[-1] == f"{epoch + 1}"
    for info in ckpt.checkpoints:
        found = flaxckpt.load(info.path)
        assert (found["w"] == info.epoch + 1).all()
        assert (found["host"] == info.epoch + 1).all()


@pytest.mark.parametrize("snapshot", ["auto", "host"])
def test_metrics_may_be_donated_too(tmp_path, late, snapshot):
    """As where they are part of the training state."""
    train = jax.jit(
        lambda s: {"w": s["w"] + 1, "loss": s["loss"] * 0.5}, donate_argnums=0
    )
    train_state = {"w": jnp.zeros(50), "loss": jnp.float32(8)}
    settings = {"save_best_only": True, "snapshot": snapshot}
    with ModelCheckpoint(tmp_path / "{epoch}-{loss}", "loss", **settings) as ckpt:
        state = ckpt.init()
        for epoch in range(6):
            train_state = train(train_state)
            logs = {"loss": train_state["loss"], "first": train_state["w"][0]}
            state = ckpt.update(state, train_state, logs, epoch)
    wanted = [f"{epoch + 1}-{4 / 2**epoch}" for epoch in range(6)]
    assert sorted(names(ckpt.checkpoints)) == sorted(wanted)
    for info in ckpt.checkpoints:
        assert info.logs == {"loss": 4 / 2**info.epoch, "first": info.epoch + 1}


def test_many_small_arrays_of_many_kinds(tmp_path):
    """They are copied into a few, and come back as they were."""
    dtypes = [jnp.float32, jnp.bfloat16, jnp.int8, jnp.bool_, jnp.int4, jnp.uint32]
    shapes = [(), (1,), (3, 2), (0, 4), (5, 1, 2)]

    def tree_of(epoch):
        tree = {
            f"{dtype.__name__}{i}{k}": jnp.full(shape, (epoch + i) % 7, dtype)
            for dtype in dtypes
            for i, shape in enumerate(shapes)
            for k in range(3)
        }
        tree["elsewhere"] = jax.device_put(jnp.full(3, epoch), jax.devices()[1])
        tree["large"] = jnp.full((200, 200), epoch)
        return {**tree, "key": jax.random.key(epoch)}

    train = jax.jit(
        lambda t: jax.tree.map(lambda x: x, t), donate_argnums=0, keep_unused=True
    )
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        for epoch in range(4):
            tree = tree_of(epoch)
            ckpt.save(tree, epoch)
            elsewhere = tree.pop("elsewhere")
            train(tree)
            elsewhere.delete()
    for epoch in range(4):
        found = flaxckpt.load(tmp_path / f"{epoch + 1}", like=tree_of(0))
        wanted = tree_of(epoch)
        for each in (found, wanted):
            each["key"] = jax.random.key_data(each["key"])
        for name, value in wanted.items():
            assert found[name].dtype == value.dtype
            np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(value))
        assert found["elsewhere"].sharding == wanted["elsewhere"].sharding


def test_64_bits_in_a_context(tmp_path):
    """Which is this thread's own, and not that of the one that writes."""
    with jax.enable_x64(True), ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        tree = {f"n{i}": jnp.int64(2**40 + i) for i in range(6)}
        tree |= {f"x{i}": jnp.float64(0.1 + i) for i in range(6)}
        for epoch in range(3):
            ckpt.save(tree, epoch)
            ckpt.wait()
            found = flaxckpt.load(tmp_path / f"{epoch + 1}", tree)
            assert found == tree


@pytest.mark.parametrize(
    "dtype", ["float8_e5m2", "float8_e3m4", "float8_e4m3fn", "int2", "int4", "bfloat16"]
)
def test_every_bit_of_small_arrays_stays(tmp_path, dtype):
    """NaNs with all their bits, too, and where XLA cannot join arrays."""
    dtype = jnp.dtype(dtype)
    if dtype in (jnp.int2, jnp.int4):
        half = 2 if dtype == jnp.int2 else 8
        values = jnp.asarray(np.arange(-half, half), dtype)
    else:
        bits = np.arange(2 ** (8 * dtype.itemsize))
        values = jnp.asarray(bits.astype(f"u{dtype.itemsize}").view(dtype))
    tree = {f"w{i}": jnp.copy(values) for i in range(5)}
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        for epoch in range(2):
            ckpt.save(tree, epoch)
    for epoch in range(2):
        found = flaxckpt.load(tmp_path / f"{epoch + 1}")
        for value in found.values():
            assert np.asarray(value).tobytes() == np.asarray(values).tobytes()


def test_the_state_may_be_donated(tmp_path, late):
    """To a jitted loop, say, while its save is under way."""
    renew = jax.jit(lambda state: jax.tree.map(jnp.copy, state), donate_argnums=0)
    settings = {"save_best_only": True, "save_freq": 2, "verbose": 1}
    with ModelCheckpoint(tmp_path / "{epoch}", "loss", **settings) as ckpt:
        state = renew(ckpt.init())
        for epoch, loss in enumerate([0.5, 0.4, 0.6, 0.3]):
            logs = {"loss": jnp.float32(loss)}
            state = ckpt.update(state, tree_of(epoch), logs, epoch, 1)
            state = renew(state)
        state = renew(ckpt.update(state, tree_of(9), logs, 9, 1, force=True))
    assert names(ckpt.checkpoints) == ["1", "2", "4", "10"]
    assert [info.state["best"] for info in ckpt.checkpoints] == [
        pytest.approx(best) for best in (0.5, 0.4, 0.3, 0.3)
    ]
    assert ckpt.checkpoints[-1].state["batches"] == 10


def test_meshes_of_the_same_devices_in_another_order(tmp_path):
    devices = np.array(jax.devices()[:4])
    tree = {
        name: jax.device_put(
            jnp.arange(8.0), NamedSharding(Mesh(order, "x"), PartitionSpec("x"))
        )
        for name, order in {"a": devices, "b": devices[::-1]}.items()
    }
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        path = ckpt.save(tree, 0)
    found = flaxckpt.load(path, tree)
    assert (found["b"] == jnp.arange(8.0)).all()


def test_no_transfers_that_were_not_asked_for(tmp_path):
    tree = {"w": jnp.ones(3), **{f"s{i}": jnp.float32(i) for i in range(5)}}
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt, jax.transfer_guard("disallow"):
        ckpt.save(tree, 0)
        path = ckpt.save(tree, 1)
        ckpt.wait()
    assert (flaxckpt.load(path)["w"] == 1).all()


def test_a_guard_takes_the_state_of_a_call_that_finds_no_new_best(tmp_path):
    tree = {"w": jnp.ones(3)}
    with ModelCheckpoint(
        tmp_path / "best", "loss", mode="min", save_best_only=True
    ) as c:
        state = c.update(c.init(), tree, {"loss": 1.0}, 0)
        with jax.transfer_guard("disallow"):
            state = c.update(state, tree, {"loss": 2.0}, 1)
            jax.jit(lambda state: state)(state)


@pytest.mark.parametrize("batch", [True, -2, np.int32(-2)], ids=repr)
def test_a_call_that_finds_no_new_best_refuses_what_is_no_batch(tmp_path, batch):
    with ModelCheckpoint(
        tmp_path / "best", "loss", mode="min", save_best_only=True, save_freq=1
    ) as ckpt:
        state = ckpt.update(ckpt.init(), {"w": 1}, {"loss": 1.0}, 0, 0)
        with pytest.raises(SettingError, match="batch"):
            ckpt.update(state, {"w": 1}, {"loss": 2.0}, 0, batch)


def test_the_copies_of_one_save_are_used_by_the_next(tmp_path):
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        places = set()
        for epoch in range(5):
            ckpt.save(tree_of(epoch), epoch)
            ckpt.wait()
            (memory,) = ckpt._saves.queue._memory
            places.add(tuple(x.unsafe_buffer_pointer() for x in memory.arrays))
        assert len(places) == 1


def test_a_check_that_does_not_save_leaves_the_copies_alone(
    tmp_path, monkeypatch, late
):
    """A save waits; a check that is not better comes after it, and in its memory."""
    with (
        ModelCheckpoint(tmp_path / "best", save_best_only=True) as ckpt,
        held(monkeypatch) as (arrived, go),
    ):
        state = ckpt.init()
        for epoch, loss in enumerate([0.9, 0.5, 0.7, 0.8]):
            logs = {"val_loss": jnp.float32(loss)}
            state = ckpt.update(state, tree_of(epoch), logs, epoch)
            assert arrived.wait(60)
        assert len(ckpt._saves.queue._waiting) == 1
        go.set()
        ckpt.wait()
        assert epoch_of(flaxckpt.load(tmp_path / "best")) == 1
        assert ckpt.best.logs == {"val_loss": 0.5}
        assert (ckpt.counts.saved, ckpt.counts.superseded) == (2, 0)


# ---- many saves --------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["at once", "late"])
def test_a_newer_save_to_the_same_path_supersedes_one_that_waits(
    tmp_path, monkeypatch, request, when, capsys
):
    if when == "late":
        request.getfixturevalue("late")
    with (
        ModelCheckpoint(tmp_path / "best", verbose=1, save_best_only=True) as ckpt,
        held(monkeypatch) as (arrived, go),
    ):
        state = ckpt.init()
        for epoch in range(6):
            logs = {"val_loss": jnp.float32(-epoch).block_until_ready()}
            state = ckpt.update(state, tree_of(epoch), logs, epoch)
            assert arrived.wait(60)
        go.set()
        ckpt.wait()
        assert epoch_of(flaxckpt.load(tmp_path / "best")) == 5
        assert ckpt.best.epoch == 5
        assert (ckpt.counts.saved, ckpt.counts.superseded) == (2, 4)
        assert ckpt.counts.delayed == 0
    out = capsys.readouterr().out
    assert out.count("superseded by a newer one before it was written") == 4
    assert out.count("finished saving") == 2


def test_saves_to_different_paths_are_all_written(tmp_path, monkeypatch):
    with (
        ModelCheckpoint(tmp_path / "{epoch}") as ckpt,
        held(monkeypatch) as (arrived, go),
    ):
        for epoch in range(6):
            ckpt.save(tree_of(epoch), epoch)
        assert arrived.wait(60)
        go.set()
        ckpt.wait()
        assert names(ckpt.checkpoints) == list("123456")
        assert [epoch_of(flaxckpt.load(i.path)) for i in ckpt.checkpoints] == [
            *range(6)
        ]
        assert ckpt.counts.superseded == 0


def test_more_saves_than_allowed_wait_and_are_counted(tmp_path, monkeypatch):
    with (
        ModelCheckpoint(tmp_path / "{epoch}", max_in_flight=2) as ckpt,
        held(monkeypatch) as (arrived, go),
    ):
        for epoch in range(2):
            ckpt.save(tree_of(epoch), epoch)
        assert arrived.wait(60)
        assert ckpt.counts.delayed == 0
        threading.Timer(0.2, go.set).start()
        ckpt.save(tree_of(2), 2)
        assert ckpt.counts.delayed == 1
        assert ckpt.counts.delayed_secs > 0.05
        ckpt.wait()
        assert names(ckpt.checkpoints) == list("123")
        assert len(ckpt._saves.queue._memory) == 2


def test_where_it_would_wait_for_the_disk_it_looks_at_the_metric(
    tmp_path, monkeypatch, late
):
    """What does not improve is not held up by a save that is under way."""
    with (
        ModelCheckpoint(
            tmp_path / "{epoch}", save_best_only=True, max_in_flight=1
        ) as c,
        held(monkeypatch) as (arrived, go),
    ):
        state = c.update(c.init(), tree_of(0), {"val_loss": jnp.float32(1)}, 0)
        assert arrived.wait(60)
        state = c.update(state, tree_of(1), {"val_loss": jnp.float32(2)}, 1)
        assert c.counts.delayed == 0
        go.set()
    assert names(c.checkpoints) == ["1"]


def test_those_that_fail_among_several_are_told_and_the_others_written(
    tmp_path, monkeypatch
):
    ckpt = ModelCheckpoint(tmp_path / "{epoch}")
    with held(monkeypatch) as (arrived, go):
        for epoch in range(4):
            ckpt.save(tree_of(epoch), epoch)
        assert arrived.wait(60)
        for epoch in (1, 2):  # after they were looked at
            (tmp_path / f"{epoch + 1}").write_text("in the way")
        go.set()
        with pytest.raises(
            CheckpointWriteError, match=f"Saving '{tmp_path}/2' failed"
        ) as e:
            ckpt.wait()
    assert re.match(f"And: Saving '{tmp_path}/3' failed", *e.value.__notes__)
    ckpt.close()
    assert names(ckpt.checkpoints) == ["1", "4"]
    assert (ckpt.counts.saved, ckpt.counts.failed) == (2, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"snapshot": "gpu"}, "snapshot='gpu' cannot work: pass \"auto\", \"device\", \"host\" or \"none\"."),
        ({"max_in_flight": 0}, "max_in_flight=0 cannot work: pass a number of at least 1, or None."),
        ({"max_in_flight": True}, "max_in_flight=True cannot work: pass a number of at least 1, or None."),
    ],
)  # fmt: skip
def test_wrong_settings(tmp_path, settings, message):
    with pytest.raises(SettingError) as caught:
        ModelCheckpoint(tmp_path / "x", **settings)
    assert str(caught.value) == message


def test_an_interrupted_copy_does_not_tear_what_waits(tmp_path, monkeypatch):
    with (
        ModelCheckpoint(tmp_path / "best", snapshot="host") as ckpt,
        held(monkeypatch) as (arrived, go),
    ):
        ckpt.save(tree_of(0), 0)
        assert arrived.wait(60)
        ckpt.save(tree_of(1), 1)  # waits
        copyto = np.copyto

        def interrupted(*args):
            copyto(*args)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(np, "copyto", interrupted)
            ckpt.save(tree_of(2), 2)
        go.set()
        ckpt.wait()
        assert epoch_of(flaxckpt.load(tmp_path / "best")) == 1


def test_saves_of_other_weights_do_not_supersede_each_other(tmp_path, monkeypatch):
    same = jnp.zeros(3)
    with (
        ModelCheckpoint(tmp_path / "best", weights=lambda tree: tree["params"]) as ckpt,
        held(monkeypatch) as (arrived, go),
    ):
        ckpt.save({"params": same, "target": same}, 0)
        assert arrived.wait(60)
        ckpt.save({"params": same, "target": same}, 1)
        ckpt.save({"params": jnp.ones(3), "target": jnp.zeros(3)}, 2)
        go.set()
        ckpt.wait()
        assert flaxckpt.load_weights(tmp_path / "best").tolist() == [1, 1, 1]


def test_logs_may_be_changed_in_place(tmp_path, monkeypatch):
    loss = np.array(0.25)
    with (
        ModelCheckpoint(tmp_path / "best") as ckpt,
        held(monkeypatch) as (arrived, go),
    ):
        for epoch in range(2):
            ckpt.save(tree_of(0), epoch, logs={"val_loss": loss})
        assert arrived.wait(60)
        loss[...] = 9
        go.set()
        ckpt.wait()
        assert ckpt.best.logs == {"val_loss": 0.25}


def test_what_failed_to_compute_does_not_spoil_later_saves(tmp_path):
    def refuse(x):
        raise ValueError("no such data")

    @jax.jit
    def bad(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(refuse, shape, x)

    with ModelCheckpoint(
        tmp_path / "{epoch}", snapshot="device", max_in_flight=1
    ) as ckpt:
        for epoch in range(5):
            tree = {"w": jnp.full(4, epoch, jnp.float32)}
            if epoch == 1:
                with pytest.raises(Exception, match="no such data"):
                    ckpt.save({"w": bad(tree["w"])}, epoch)
                    ckpt.wait()
            else:
                ckpt.save(tree, epoch)
                ckpt.wait()
        assert names(ckpt.checkpoints) == ["1", "3", "4", "5"]


def test_a_thread_that_cannot_start_is_an_error_and_no_hang(tmp_path, monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    with ModelCheckpoint(tmp_path / "{epoch}", max_in_flight=1) as ckpt:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="can't start"):
                ckpt.save(tree_of(0), 0)
        ckpt.save(tree_of(1), 1)
    assert names(ckpt.checkpoints) == ["2"]


def test_a_message_that_cannot_be_printed_blocks_no_later_save(tmp_path, monkeypatch):
    with (
        ModelCheckpoint(tmp_path / "{epoch}", verbose=1, max_in_flight=1) as ckpt,
        held(monkeypatch) as (arrived, go),
    ):
        ckpt.save(tree_of(0), 0)
        assert arrived.wait(60)
        threading.Timer(0.2, go.set).start()
        with monkeypatch.context() as patch:

            def refuse(call, message):
                if "waited" in message:
                    raise BrokenPipeError

            patch.setattr(ckpt._saves.report, "say", refuse)
            with pytest.raises(BrokenPipeError):
                ckpt.save(tree_of(1), 1)
        ckpt.save(tree_of(2), 2)
    assert names(ckpt.checkpoints) == ["1", "3"]


# ---- the form that Orbax has shown -------------------------------------------------------


def large_tree(epoch):
    return {"big": jnp.full((1024, 1024), epoch, jnp.float32), "n": epoch}


@pytest.mark.direct
@pytest.mark.parametrize("make", [tree_of, large_tree], ids=["database", "files"])
def test_orbax_writes_the_first_and_reads_them_all(tmp_path, make):
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        for epoch in range(4):
            ckpt.save(make(epoch), epoch)
        ckpt.wait()
        assert (ckpt.counts.by_orbax, ckpt.counts.direct) == (1, 3)
        for info in ckpt.checkpoints:
            flaxckpt.verify(info.path)
            found = v1.load(info.path)
            found, wanted = dict(found), dict(make(info.epoch))
            for each in (found, wanted):
                if "key" in each:
                    each["key"] = jax.random.key_data(each["key"])
            jax.tree.map(np.testing.assert_array_equal, found, wanted)
        ckpt.save({**make(9), "more": 1}, 9)  # another structure
        ckpt.wait()
        assert ckpt.counts.by_orbax == 2


@pytest.mark.direct
def test_shards_are_written_as_orbax_does(tmp_path):
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    specs = [("x", "y"), ("y", None), (None, "x"), (None, None)]
    places = [
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        for spec in specs
    ]
    for size in (8, 1024):
        x = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
        tree = [jax.device_put(x + i, place) for i, place in enumerate(places)]
        with ModelCheckpoint(tmp_path / f"{size}-{{epoch}}") as ckpt:
            ckpt.save([leaf - 1 for leaf in tree], 0)
            ckpt.save(tree, 1)
        assert (ckpt.counts.by_orbax, ckpt.counts.direct) == (1, 1)
        path = tmp_path / f"{size}-2"
        flaxckpt.verify(path)
        for found in (v1.load(path), flaxckpt.load(path, tree)):
            for got, want in zip(found, tree, strict=True):
                assert got.sharding == want.sharding
                np.testing.assert_array_equal(got, want)
        one = flaxckpt.load(path)[0]
        np.testing.assert_array_equal(one, x)


def test_where_orbax_writes_otherwise_it_goes_on_writing(tmp_path, monkeypatch):
    for module in (_learn, _sources, _direct_write):
        monkeypatch.setattr(module, "trailer_of", lambda nbytes: b"unknown")
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        for epoch in range(3):
            ckpt.save(tree_of(epoch), epoch)
    assert (ckpt.counts.by_orbax, ckpt.counts.direct) == (3, 0)
    assert [epoch_of(flaxckpt.load(i.path)) for i in ckpt.checkpoints] == [0, 1, 2]


@pytest.mark.direct
def test_compressed(tmp_path):
    tree = {"w": jnp.zeros(100_000)}
    sizes = []
    for compress in (True, False):
        path = tmp_path / str(compress)
        with ModelCheckpoint(path, compress=compress) as ckpt:
            for epoch in range(2):
                ckpt.save({"w": tree["w"] + epoch}, epoch)
                ckpt.wait()
        assert ckpt.counts.by_orbax == (2 if compress else 1)
        assert (flaxckpt.load(path)["w"] == 1).all()
        sizes.append(sum(f.stat().st_size for f in path.rglob("*") if f.is_file()))
    assert sizes[0] < 20_000 < 400_000 < sizes[1]


# ---- what a queue remembers --------------------------------------------------------------


def test_checkpoints_deleted_by_hand_do_not_confuse_retention(tmp_path):
    import shutil

    with ModelCheckpoint(tmp_path / "{epoch}", "loss", max_to_keep=2) as ckpt:
        state = ckpt.init()
        for epoch, loss in enumerate([0.1, 0.2, 0.9]):
            state = ckpt.update(state, tree_of(epoch), {"loss": loss}, epoch)
        ckpt.wait()
        assert names(ckpt.checkpoints) == ["1", "2", "3"]
        shutil.rmtree(tmp_path / "1")  # the best
        for epoch, loss in enumerate([0.8, 0.7], 3):
            state = ckpt.update(state, tree_of(epoch), {"loss": loss}, epoch)
        ckpt.wait()
        assert names(ckpt.checkpoints) == ["2", "4", "5"]  # 2 is the best there is


def test_two_objects_of_one_series_see_each_other_s_saves(tmp_path):
    one, two = (ModelCheckpoint(tmp_path / "{epoch}", max_to_keep=2) for _ in range(2))
    for epoch in range(6):
        ckpt = (one, two)[epoch % 2]
        ckpt.save(tree_of(epoch), epoch)
        ckpt.wait()
    one.close()
    two.close()
    assert names(one.checkpoints) == ["5", "6"]


def test_errors_hold_on_to_nothing_that_was_saved(tmp_path):
    """A program that cannot be told of a full disk may go on for long."""
    queue, held, kept = JobQueue(), [], type("Tree", (), {})

    def run():
        tree = kept()
        held.append(weakref.ref(tree))
        raise OSError(errno.ENOSPC, "No space left on device")

    for number in range(50):
        job = queue.claim(None, 60)
        job.run, job.path = run, f"/p/{number}"
        queue.submit(job)
    with pytest.raises(CheckpointWriteError, match="'/p/0' failed: OSError") as caught:
        queue.wait()
    assert len(caught.value.__notes__) == 20
    assert caught.value.__notes__[-1] == "And 30 more."
    assert not [tree for each in held if (tree := each()) is not None]
    queue.close()


def test_errors_that_compare_strangely(tmp_path):
    class Strange(OSError):
        def __eq__(self, other):
            raise RuntimeError("do not compare me")

        __hash__ = OSError.__hash__

    def run():
        try:
            raise Strange("first")
        except Strange as error:
            raise Strange("second") from error

    queue = JobQueue()
    job = queue.claim(None, 1)
    job.run, job.path = run, "/p"
    queue.submit(job)
    with pytest.raises(CheckpointWriteError, match="second"):
        queue.close()


def test_what_fails_after_a_save_stops_no_later_one():
    def fail():
        raise OSError("sweeping")

    queue, done = JobQueue(), []
    for number in range(2):
        job = queue.claim(None, 9)
        job.run, job.after = lambda number=number: done.append(number), fail
        queue.submit(job)
    with pytest.raises(CheckpointWriteError, match="sweeping"):
        queue.close()
        queue.close()
    with contextlib.suppress(CheckpointWriteError):  # of what came after the first
        queue.close()
    assert done == [0, 1]


def test_what_is_superseded_on_the_host_is_let_go(tmp_path, monkeypatch):
    tree = {"w": np.zeros(2**20, np.uint8)}
    with (
        ModelCheckpoint(tmp_path / "best", max_in_flight=2) as ckpt,
        held(monkeypatch) as (arrived, go),
    ):
        ckpt.save(tree, 0)
        assert arrived.wait(60)
        tracemalloc.start()
        for epoch in range(1, 20):
            ckpt.save(tree, epoch)
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert size < 3 * 2**20
        go.set()
