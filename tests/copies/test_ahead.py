"""Programs that copy a large tree are compiled before the first save, if it is known."""

import itertools
import os
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from never_ready import take_metrics_for_unknown

import flaxckpt
from flaxckpt import ModelCheckpoint
from flaxckpt._copies import ahead as _ahead
from flaxckpt._copies import programs as _programs
from flaxckpt._copies.ahead import Ahead
from flaxckpt._copies.plan import MOST_TOGETHER, Plan, Plans, kinds_of
from flaxckpt._copies.programs import Program

NAME = "flaxckpt-compile"
MANY = MOST_TOGETHER + 6  # leaves that two programs copy
ALL = [(f"{NAME}_0", which) for which in (0, 0, 1, 1)]  # as the saves need them


def compiling():
    return [thread for thread in threading.enumerate() if NAME in thread.name]


def wait():
    for thread in compiling():
        thread.join(120)


def tree_of(number, first=1):
    """Leaves of different shapes, so that each batch has a program of its own."""
    return {f"w{i:03}": np.arange(first + i, dtype=np.float32) for i in range(number)}


def structs(tree, sharding=None):
    sharding = sharding or SingleDeviceSharding(jax.devices()[0])
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for name, x in tree.items()
    }


@pytest.fixture
def compiled(monkeypatch):
    """The threads that have compiled a program, and what a call has had to compile."""
    _programs.program.cache_clear()
    original, threads = Program.compile, []

    def compile(self, which, *others):
        threads.append((threading.current_thread().name, which))
        original(self, which, *others)

    monkeypatch.setattr(Program, "compile", compile)
    yield threads
    wait()


@pytest.fixture
def count():
    """Count what this thread compiles."""
    own, found = threading.get_ident(), []

    def listen(event, *_, **__):
        if event.endswith("backend_compile_duration") and threading.get_ident() == own:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def placements():
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    auto = jax.make_mesh((4, 2), ("x", "y"), (AxisType.Auto,) * 2)
    return {
        "one device": SingleDeviceSharding(jax.devices()[0]),
        "another": SingleDeviceSharding(jax.devices()[3]),
        "explicit": NamedSharding(mesh, jax.P()),
        "auto": NamedSharding(auto, jax.P()),
    }


@pytest.mark.parametrize("where", placements())
@pytest.mark.parametrize("known_by", ["structs", "arrays", "update"])
def test_the_first_saves_compile_nothing(tmp_path, compiled, count, known_by, where):
    sharding = placements()[where]
    values = tree_of(MANY)
    tree = jax.device_put(values, sharding)
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        like = {"structs": structs(tree, sharding), "arrays": tree}.get(known_by)
        state = ckpt.init(like)
        if known_by == "update":
            state = ckpt.update(state, tree, {}, 0, 0)
        wait()
        assert compiled == ALL
        for epoch in range(3):
            before = len(count)
            state = ckpt.update(state, tree, {"val_loss": 1.0}, epoch)
            assert len(count) == before
            values = {name: x + 1 for name, x in values.items()}
            tree = jax.device_put(values, sharding)
            ckpt.wait()
    found = flaxckpt.load(tmp_path / "3")
    assert all(np.array_equal(found[name], values[name] - 1) for name in values)


def test_what_has_no_place_yet_keeps_nothing_from_being_known(tmp_path, compiled):
    like = structs(tree_of(MANY)) | {"step": jax.ShapeDtypeStruct((), np.int32)}
    ModelCheckpoint(tmp_path / "{epoch}").init(like)
    wait()
    assert compiled == ALL


def test_a_restore_makes_a_tree_known(tmp_path, compiled, count):
    tree = jax.device_put(tree_of(MANY))
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        ckpt.save(tree, 0)
    wait()
    _programs.program.cache_clear()
    compiled.clear()
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        found = ckpt.restore(structs(tree))
        wait()
        before = len(count)
        ckpt.save(found.tree, 1)
        assert len(count) == before
    assert compiled == ALL


@pytest.mark.parametrize("number", [1, MANY])
def test_the_first_save_has_the_programs_of_the_second_compiled(
    tmp_path, compiled, count, number
):
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        for epoch in range(3):
            ckpt.save(jax.device_put(tree_of(number, first=epoch + 1)), epoch)
            wait()
            before, known = len(count), len(compiled)
            ckpt.save(jax.device_put(tree_of(number, first=epoch + 1)), epoch)
            assert len(count) == before
            assert len(compiled) == known == (epoch + 1) * (4 if number > 1 else 1)


def test_a_new_tree_is_described_while_its_programs_are_compiled(tmp_path, compiled):
    known = []

    def weights(tree):
        wait()
        known.append(len(compiled))
        return tree

    tree = jax.device_put(tree_of(MANY))
    with ModelCheckpoint(tmp_path / "{epoch}", weights=weights) as ckpt:
        ckpt.save(tree, 0)
    assert known == [4]


@pytest.mark.parametrize("number", [MOST_TOGETHER + 1, 3 * MOST_TOGETHER - 1])
def test_small_arrays_of_one_kind_share_one_program(tmp_path, compiled, number):
    tree = {f"w{i:03}": jnp.full(3, i, jnp.float32) for i in range(number)}
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        for epoch in range(3):
            ckpt.save({name: x + epoch for name, x in tree.items()}, epoch)
            wait()
    assert _programs.program.cache_info().currsize == 1
    for epoch in range(3):
        found = flaxckpt.load(tmp_path / str(epoch + 1))
        assert all(np.array_equal(found[name], x + epoch) for name, x in tree.items())


@pytest.mark.parametrize(
    ("before", "number", "last"),
    [
        ([], MOST_TOGETHER + 5, MOST_TOGETHER),
        ([4], MOST_TOGETHER + 4, 1),  # those of one kind are in batches of their own
        ([4] * MOST_TOGETHER, 5, 5),
        ([4], MOST_TOGETHER, 1),
        ([], MOST_TOGETHER, MOST_TOGETHER),
    ],
)
def test_a_last_batch_is_filled_up_to_share_the_program_before(before, number, last):
    arrays = [jnp.zeros(size) for size in [*before, *[3] * number]]
    plan = Plan(kinds_of(arrays))
    *others, batch = [
        [*batch.alone, *itertools.chain(*batch.packs)] for batch in plan.batches
    ]
    assert len(batch) == last
    assert all(len(other) == MOST_TOGETHER for other in others)
    assert {*batch}.union(*others) == {*range(len(arrays))}


def test_many_small_arrays_of_one_kind_have_one_program():
    number, sizes = MOST_TOGETHER * 3 // 2, range(3, 8)
    arrays = [jnp.zeros(size) for _ in range(number) for size in sizes]
    plan = Plan(kinds_of(arrays))
    copied = [itertools.chain(batch.alone, *batch.packs) for batch in plan.batches]
    assert {*itertools.chain(*copied)} == {*range(len(arrays))}
    assert len({batch.program for batch in plan.batches}) == len(sizes)


def test_large_arrays_are_copied_once():
    arrays = [jnp.zeros(17 * 2**10)] * (MOST_TOGETHER + 1)  # each above 64 KiB
    plan = Plan(kinds_of(arrays))
    assert [batch.number for batch in plan.batches] == [MOST_TOGETHER, 1]


def test_a_save_does_not_fail_for_want_of_a_thread(tmp_path, monkeypatch):
    def no_thread(*args):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_ahead, "unchecked_pool", no_thread)
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        ckpt.save({"w": jnp.ones(3)}, 0)
    assert ckpt.counts.saved == 1


def test_a_copy_to_new_memory_does_not_wait_for_the_other_program(monkeypatch):
    array, original = jnp.ones(1001), _programs._struct
    program = Program((kinds_of([array])[0],), ())
    program.fill([array], [])
    begun, go = threading.Event(), threading.Event()

    def struct(kind):
        begun.set()
        assert go.wait(60)
        return original(kind)

    monkeypatch.setattr(_programs, "_struct", struct)
    thread = threading.Thread(target=program.compile, args=(1,))
    thread.start()
    assert begun.wait(60)
    copies = program.fill([array], [])  # while the other one is compiled
    assert not go.is_set()
    go.set()
    thread.join()
    (again,) = program.refill([array + 1], [], copies, np.True_)
    np.testing.assert_array_equal(again, array + 1)


NESTED = """
    import os, signal, sys, threading, time
    import jax, jax.numpy as jnp, numpy as np
    from flaxckpt._copies.plan import kinds_of
    from flaxckpt._copies.programs import Program

    array, put = jnp.ones(1001), jax.device_put
    program = Program((kinds_of([array])[0],), ())

    def late(*args, **kwargs):  # while the loop prepares its first copy
        if threading.current_thread() is threading.main_thread() and not told:
            told.append(1)
            thread.start()
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.5)
        return put(*args, **kwargs)

    def refill(*args):
        told.append(program.refill([array], [], [jnp.ones(1001)], np.True_))

    told, jax.device_put = [], late
    thread = threading.Thread(target=program.compile, args=(1,), daemon=True)
    signal.signal(signal.SIGUSR1, refill)
    copies = program.fill([array], [])
    thread.join()
    assert len(told) == 2 and len(copies) == 1
"""


def test_a_copy_made_by_a_signal_handler_ends_beside_the_compiling_thread():
    code = textwrap.dedent(NESTED)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_weights_alone_are_known_too(tmp_path, compiled, count):
    tree = {"params": jax.device_put(tree_of(MANY)), "opt_state": jnp.ones(99)}
    with ModelCheckpoint(tmp_path / "{epoch}", save_weights_only=True) as ckpt:
        ckpt.init(tree)
        wait()
        before = len(count)
        ckpt.save(tree, 0)
        assert len(count) == before
    assert compiled == ALL


def test_nothing_is_compiled_for_one_of_two_trees(tmp_path, compiled):
    tree = {"params": jax.device_put(tree_of(MANY)), "opt_state": jnp.ones(99)}
    path, both = tmp_path / "{epoch}", {"save_weights_only": True, "save_last": True}
    with ModelCheckpoint(path, **both) as ckpt:
        ckpt.update(ckpt.init(), tree, {}, 0)
        wait()
    assert [which for _, which in compiled] == [1, 1, 1]


@pytest.mark.parametrize("where", ["one device", "auto", "explicit"])
@pytest.mark.parametrize("number", [1, MANY])
@pytest.mark.parametrize("first", ["device", "host"])
def test_a_copy_that_a_device_decides_on_is_compiled_before_the_second(
    tmp_path, monkeypatch, caplog, compiled, number, where, first
):
    def told_of(x):
        return x

    take_metrics_for_unknown(monkeypatch)
    sharding = placements()[where]
    with (
        jax.log_compiles(),
        ModelCheckpoint(tmp_path / "{epoch}", save_best_only=True) as ckpt,
    ):
        jax.jit(told_of)(0)
        state = ckpt.init()
        for epoch in range(4):
            tree, loss = jax.device_put((tree_of(number), np.float32(-epoch)), sharding)
            if first == "host" and epoch == 0:
                loss = 0.0
            state = ckpt.update(state, tree, {"val_loss": loss}, epoch)
            ckpt.wait()
            wait()
    assert [which for _, which in compiled].count(2) == (1 if number == 1 else 2)
    assert "told_of" in caplog.text  # what this thread has compiled
    assert "_refill_if" not in caplog.text
    found = flaxckpt.load(tmp_path / "4")
    assert all(np.array_equal(found[name], value) for name, value in tree.items())


@pytest.mark.parametrize("where", ["one device", "auto"])
def test_a_metric_on_the_device_decides_in_a_compiled_program(
    tmp_path, compiled, where
):
    """Whether to copy comes as an array then."""
    values, sharding = tree_of(MANY), placements()[where]
    slow = jax.jit(lambda x, loss: loss + 0 * jnp.sin(x @ x).sum())
    with ModelCheckpoint(tmp_path / "best", mode="min", save_best_only=True) as ckpt:
        state = ckpt.init(jax.device_put(values, sharding))
        wait()
        for epoch, loss in enumerate([0.5, 0.25, 0.75]):
            newer = {name: x + epoch for name, x in values.items()}
            tree = jax.device_put(newer, sharding)
            ones = jax.device_put(np.ones((1500, 1500), np.float32), sharding)
            logs = {"val_loss": slow(ones, loss)}
            state = ckpt.update(state, tree, logs, epoch)
    assert ckpt.best.epoch == 1
    found = flaxckpt.load(tmp_path / "best")
    assert all(np.array_equal(found[name], values[name] + 1) for name in values)


def test_arrays_in_another_layout_are_copied_all_the_same(tmp_path, compiled):
    tree = {
        str(i): np.arange(6.0 * (i + 1), dtype="f4").reshape(2, -1) for i in range(MANY)
    }
    like = structs(tree)
    other = Format(Layout((1, 0)), SingleDeviceSharding(jax.devices()[0]))
    with ModelCheckpoint(tmp_path / "{epoch}") as ckpt:
        ckpt.init(like)
        wait()
        moved = {
            name: jax.device_put(tree[name], other) for name in ("0", str(MANY - 1))
        }
        for epoch in range(2):
            ckpt.save(jax.device_put(tree) | moved, epoch)
    assert jax.device_put(tree["0"], other).sharding == like["0"].sharding
    found = flaxckpt.load(tmp_path / "2")
    assert all(np.array_equal(found[name], tree[name]) for name in tree)


def test_wide_numbers_and_keys_stay_as_they_are(tmp_path, compiled, count):
    with jax.enable_x64(True):
        tree = {name: jnp.asarray(x, "f8") for name, x in tree_of(MANY).items()}
    tree["key"] = jax.random.key(0)
    with ModelCheckpoint(tmp_path / "1") as ckpt:
        ckpt.init(tree)
        wait()
        before = len(count)
        ckpt.save(tree, 0)
        assert len(count) == before
    with jax.enable_x64(True):
        found = flaxckpt.load(tmp_path / "1", tree)
    assert found["w069"].dtype == np.float64
    assert np.array_equal(found["w069"], tree["w069"])
    assert compiled == ALL


@pytest.mark.parametrize(
    "like",
    [
        jax.tree.map(jnp.asarray, tree_of(MOST_TOGETHER)),
        tree_of(MANY),
        jax.eval_shape(lambda: tree_of(MANY)),
        {i: (lambda: 0) for i in range(MANY)},
        {1: 1, "a": 2},
        None,
    ],
    ids=["few", "numpy", "of no devices", "functions", "unsorted", "none"],
)
def test_what_no_program_copies_starts_no_thread(tmp_path, monkeypatch, like):
    monkeypatch.setattr(Ahead, "_do", lambda *_: pytest.fail("it compiles"))
    ckpt = ModelCheckpoint(tmp_path / "{epoch}")
    ckpt.update(ckpt.init(), like, {}, 0, 0)
    ckpt._saves.prepare(like)
    assert not compiling()


@pytest.mark.parametrize("snapshot", ["host", "none"])
def test_neither_do_copies_on_the_host(tmp_path, snapshot):
    ckpt = ModelCheckpoint(tmp_path / "{epoch}", snapshot=snapshot)
    ckpt.init(jax.device_put(tree_of(MANY)))
    assert not compiling()


def test_a_traced_update_is_as_ever(tmp_path):
    ckpt = ModelCheckpoint(tmp_path / "{epoch}")
    state = ckpt.init()
    tree = jax.device_put(tree_of(MANY))
    jax.jit(lambda tree: ckpt.update(state, tree, {}, 0, 0).seen)(tree)
    assert not compiling()


@pytest.fixture
def held(monkeypatch):
    """Hold the first program that is compiled: that it has begun, go on, all so far."""
    begun, go, done = threading.Event(), threading.Event(), []

    def compile(self, *_):
        done.append(self)
        begun.set()
        assert go.wait(60)

    monkeypatch.setattr(Program, "compile", compile)
    yield begun, go, done
    go.set()


def test_another_tree_takes_the_thread(held):
    """Programs for a tree that is not saved after all are not compiled to the end."""
    begun, go, done = held
    ahead = Ahead(Plans(), is_used=True)
    ahead.prepare([*structs(tree_of(4 * MOST_TOGETHER)).values()])
    assert begun.wait(60)
    ahead.prepare([*structs(tree_of(MANY, first=1000)).values()])
    ahead.prepare([*structs(tree_of(MANY, first=1000)).values()])  # as before: nothing
    go.set()
    wait()
    assert len(done) == 1 + 4


def test_a_save_of_another_tree_is_not_competed_with(held):
    begun, go, done = held
    ahead, plans = Ahead(Plans(), is_used=True), Plans()
    known = kinds_of([jnp.zeros(size) for size in range(MANY)])
    ahead.compile_next(plans.plan(known))
    assert begun.wait(60)
    ahead.keep_to(plans.plan(known[:-1]))
    go.set()
    wait()
    assert len(done) == 1


LARGE = """
    import faulthandler, os, sys, threading, time
    import jax, jax.numpy as jnp, numpy as np, flaxckpt
    from flaxckpt._copies import ahead
    from flaxckpt._copies.plan import MOST_TOGETHER
    from flaxckpt._copies.programs import Program

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = [
        jax.ShapeDtypeStruct((i + 1,), np.float32, sharding=device)
        for i in range(MOST_TOGETHER * 30)
    ]
    begun, number, original = threading.Event(), 0, Program.compile

    def compile(self, *others):
        global number
        begun.set()
        original(self, *others)
        number += 1

    Program.compile = compile
    ckpt = flaxckpt.ModelCheckpoint(sys.argv[1] + "/{epoch}")
    ckpt.init(like)
    assert begun.wait(60)
"""


def run(code, directory):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c",
         textwrap.dedent(LARGE) + textwrap.dedent(code), str(directory)],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "XLA_FLAGS": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("how", ["at the end", "sys.exit(0)"])
def test_an_exit_waits_for_one_program_at_most(tmp_path, how):
    (told,) = run(
        f"""
        left = len(ckpt._saves._parts.ahead._told.plan.batches) - number
        import atexit
        begun_at = number
        atexit.register(lambda: print(left > 20, number <= begun_at + 1))
        {"pass" if how == "at the end" else how}
        """,
        tmp_path,
    )
    assert told == "True True"


def test_a_save_is_finished_first(tmp_path):
    run(
        """
        tree = [jnp.zeros(struct.shape) for struct in like[:100]]
        ckpt.save(tree, 0)
        """,
        tmp_path,
    )
    assert [info.epoch for info in flaxckpt.list_checkpoints(tmp_path)] == [0]


def test_a_child_forked_meanwhile_ends(tmp_path):
    told, again = run(
        """
        def forked():
            child = os.fork()
            if not child:
                faulthandler.dump_traceback_later(60, exit=True)
                ckpt.init(like)
                ckpt.init(like[:100])
                ckpt.update(ckpt.init(), like, {}, 0, 0)
                flaxckpt.ModelCheckpoint(sys.argv[1] + "/own").init(like)
                is_none = not [
                    each for each in threading.enumerate() if "compile" in each.name
                ]
                ckpt.close()
                threading._shutdown()
                os._exit(0 if is_none else 1)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

        print(forked())
        begun.clear()
        assert begun.wait(60)  # the parent goes on
        print(forked())
        """,
        tmp_path,
    )
    assert (told, again) == ("0", "0")
