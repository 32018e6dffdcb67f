"""Checkpoints in object stores, of real servers."""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import object_stores
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1

import flaxckpt
from flaxckpt import ModelCheckpoint
from flaxckpt._object_store import lease as _lease
from flaxckpt._object_store import objects as _objects
from flaxckpt._object_store.objects import Objects
from flaxckpt._object_store.source import Source


def tree_of(number):
    return {
        "w": jnp.arange(6.0) * number,
        "large": jnp.full((300, 1000), number, jnp.float32),
        "key": jax.random.key(number),
        "text": f"some {number}",
        "host": np.arange(number),
        "number": number,
    }


def assert_same(tree, number):
    wanted = tree_of(number)
    assert tree.keys() == wanted.keys()
    for name, value in wanted.items():
        if name == "key":
            tree[name], value = map(jax.random.key_data, (tree[name], value))
        assert type(tree[name]) is type(value)
        assert np.array_equal(tree[name], value)


def train(ckpt, losses):
    state = ckpt.init()
    for epoch, loss in enumerate(losses):
        state = ckpt.update(state, tree_of(epoch), {"loss": loss}, epoch)
    return state


def keys(url):
    return Objects(url).keys_below("")


@contextlib.contextmanager
def running(code, **environment):
    """Run a program in a process of its own, for as long as it is needed."""
    program = textwrap.dedent(code)
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_what_is_saved_is_listed_kept_and_restored(url):
    with ModelCheckpoint(f"{url}/{{epoch:02d}}", "loss", max_to_keep=2) as ckpt:
        train(ckpt, [3.0, 1.0, 2.0, 4.0])
        ckpt.wait()
        names = [f"{url}/02", f"{url}/03", f"{url}/04"]
        assert [str(info.path) for info in ckpt.checkpoints] == names
        assert [info.path.name for info in (ckpt.best, ckpt.latest)] == ["02", "04"]
        found = ckpt.restore()
        assert_same(found.tree, 3)
        assert (found.epoch, str(found.path)) == (3, f"{url}/04")
    listed = flaxckpt.list_checkpoints(url)
    assert [str(info.path) for info in listed] == names
    assert_same(flaxckpt.load(listed[0]), 1)
    flaxckpt.verify(names[1])
    with ModelCheckpoint(f"{url}/{{epoch:02d}}", "loss") as ckpt:  # another run
        assert ckpt.latest.epoch == 3
        assert_same(ckpt.restore(which="best").tree, 1)
        assert_same(ckpt.restore(which=names[1]).tree, 2)


def test_nothing_makes_way_where_its_files_are_not_known(url):
    with ModelCheckpoint(f"{url}/best", "loss", save_best_only=True) as ckpt:
        train(ckpt, [1.0])
        ckpt.wait()
        Objects(url).write(".flaxckpt-current/best", b"{")
        before = [key for key in keys(url) if key.startswith("best")]
        ckpt.save(tree_of(1), 1, logs={"loss": 2.0})
        with pytest.raises(flaxckpt.CheckpointCorruptError, match="cannot be read"):
            ckpt.wait()
        assert [key for key in keys(url) if key.startswith("best")] == before


def test_nothing_is_left_but_what_is_listed(url):
    with ModelCheckpoint(f"{url}/best", "loss", save_best_only=True) as ckpt:
        train(ckpt, [3.0, 2.0, 1.0])
        ckpt.wait()
        assert_same(ckpt.restore().tree, 2)
    (directory,) = {key.rpartition("/flaxckpt.json")[0] for key in keys(url)} - {""}
    rest = [key for key in keys(url) if not key.startswith(f"{directory}/")]
    assert rest == [".flaxckpt-current/best"]


def test_the_last_state_is_in_its_slot(s3):
    with ModelCheckpoint(
        f"{s3}/{{epoch}}", "loss", save_best_only=True, save_last=True
    ) as ckpt:
        train(ckpt, [1.0, 2.0])
        ckpt.wait()
        assert str(ckpt.latest.path) == f"{s3}/last"
        assert_same(ckpt.restore().tree, 1)
    with ModelCheckpoint(
        f"{s3}/{{epoch}}", "loss", save_best_only=True, save_last=True
    ) as ckpt:
        state = ckpt.restore().state
        ckpt.update(state, tree_of(9), {"loss": 0.5}, 9)
        ckpt.wait()
        assert [info.path.name for info in flaxckpt.list_checkpoints(s3)] == ["1", "10"]


def test_it_is_restored_onto_another_mesh_reading_no_more_than_that(s3, monkeypatch):
    devices = NamedSharding(jax.make_mesh((8,), ("x",)), PartitionSpec("x"))
    tree = {
        "a": jax.device_put(np.arange(2**14, dtype=np.float32), devices),
        "b": np.ones(2**21, np.float32),
    }
    with ModelCheckpoint(f"{s3}/{{epoch}}") as ckpt:
        for epoch in range(2):
            path = ckpt.save(tree, epoch, logs={"loss": 1.0})
    like = {"a": jax.ShapeDtypeStruct((2**14,), np.float32, sharding=devices)}
    read, one = [], Objects.read

    def note(self, key):
        read.append(key)
        return one(self, key)

    monkeypatch.setattr(Objects, "read", note)
    with pytest.raises(flaxckpt.CheckpointMismatchError, match=re.escape(str(path))):
        flaxckpt.load(path, like)
    assert not [key for key in read if "/state/" in key]
    found = flaxckpt.load(path, {**like, "b": tree["b"]})
    assert (np.asarray(found["a"]) == np.arange(2**14)).all()
    assert found["a"].sharding == devices
    assert (found["b"] == 1).all()


def test_weights_are_read_alone(s3, monkeypatch):
    monkeypatch.setattr("flaxckpt._checkpoints.write._LARGE_LEAF", 0)  # a file for each
    state = {"params": {"w": jnp.arange(8.0)}, "opt_state": np.ones(2**20)}
    with ModelCheckpoint(f"{s3}/{{epoch}}") as ckpt:
        path = ckpt.save(state, 0)
    read, one = [], Objects.read

    def note(self, key):
        read.append(key)
        return one(self, key)

    monkeypatch.setattr(Objects, "read", note)
    found = flaxckpt.load_weights(path)["params"]["w"]
    assert (np.asarray(found) == np.arange(8)).all()
    assert any("params.w" in key for key in read)
    assert not any("opt_state" in key for key in read)


def test_a_flipped_bit_is_found_and_the_one_before_taken(url):
    with ModelCheckpoint(f"{url}/{{epoch}}") as ckpt:
        train(ckpt, [2.0, 1.0])
    objects = Objects(url)
    contents = objects.read_all([key for key in keys(url) if key[0] == "2"])
    file = max(contents, key=lambda key: len(contents[key]))
    content = bytearray(contents[file])
    content[len(content) // 2] ^= 1
    objects.write(file, bytes(content))
    with pytest.raises(flaxckpt.CheckpointCorruptError, match=f"{url}/2'"):
        flaxckpt.verify(f"{url}/2")
    with ModelCheckpoint(f"{url}/{{epoch}}") as ckpt:
        with pytest.warns(UserWarning, match=f"PASSED OVER.*{url}/2"):
            found = ckpt.restore()
        assert_same(found.tree, 0)


def test_files_that_are_missing_are_no_checkpoint_of_zeros(s3):
    with ModelCheckpoint(f"{s3}/{{epoch}}") as ckpt:
        train(ckpt, [2.0])
    objects = Objects(s3)
    for key in keys(s3):
        content = objects.read(key).content
        objects.delete(key)
        with pytest.raises(flaxckpt.CheckpointError):
            tree = flaxckpt.load(f"{s3}/1")
            assert_same(tree, 0)  # some of Orbax's own files nobody needs
            raise flaxckpt.CheckpointError
        objects.write(key, content)
    assert_same(flaxckpt.load(f"{s3}/1"), 0)
    for key in keys(s3):
        if re.search("flaxckpt(_leaves)?.json", key):  # what is ours alone
            objects.delete(key)
    with pytest.raises(flaxckpt.CheckpointCorruptError, match=f"{s3}/1'"):
        flaxckpt.load(f"{s3}/1")


READER = """
    import numpy as np
    import flaxckpt

    seen = set()
    while max(seen, default=0) < 19:
        try:
            tree = flaxckpt.load("{url}/best")
        except flaxckpt.CheckpointNotFoundError:
            assert not seen
            continue
        number = tree["number"]
        assert (np.asarray(tree["large"]) == number).all()
        assert number >= max(seen, default=0)
        seen.add(number)
    print(len(seen))
"""


def test_who_reads_while_it_is_replaced_gets_one_of_the_two(s3):
    with running(READER.format(url=s3)) as reader:
        with ModelCheckpoint(f"{s3}/best", max_in_flight=1) as ckpt:
            for epoch in range(20):
                ckpt.save(tree_of(epoch), epoch)
                ckpt.wait()
        told, _ = reader.communicate(timeout=120)
    assert reader.returncode == 0
    assert int(told) > 1


def test_what_is_replaced_before_it_is_read_is_looked_up_again(s3, monkeypatch):
    path, begin, number = f"{s3}/best", Source.begin, iter(range(1, 3))

    def save(number):
        with ModelCheckpoint(path) as ckpt:  # and delete the files of before
            ckpt.save(tree_of(number), number)

    def begin_later(source):
        for each in itertools.islice(number, 1):
            save(each)
        begin(source)

    save(0)
    monkeypatch.setattr(Source, "begin", begin_later)
    assert_same(flaxckpt.load(path), 2)


WRITER = """
    import sys
    import numpy as np
    import flaxckpt
    from flaxckpt._object_store import lease as _lease

    _lease.HEARTBEAT_SECS, _lease.WATCH_SECS = 0.1, 0.5
    ckpt = flaxckpt.ModelCheckpoint("{url}/{{epoch}}")
    ckpt.save({{"w": np.ones(3)}}, 0)
    ckpt.wait()
    print("saved", flush=True)
    sys.stdin.readline()
    try:
        ckpt.save({{"w": np.zeros(3)}}, 1)
        ckpt.wait()
    except flaxckpt.CheckpointLockedError as error:
        print(error, flush=True)
"""


@pytest.fixture
def quickly(monkeypatch):
    """Watch a lock for no longer than a test should take."""
    monkeypatch.setattr(_lease, "HEARTBEAT_SECS", 0.2)
    monkeypatch.setattr(_lease, "WATCH_SECS", 2.0)


@pytest.mark.usefixtures("quickly")
def test_one_process_writes_a_series_and_is_succeeded_when_it_dies(s3):
    with running(WRITER.format(url=s3)) as writer:
        assert writer.stdout.readline() == "saved\n"
        with ModelCheckpoint(f"{s3}/{{epoch}}") as ckpt:
            with pytest.raises(flaxckpt.CheckpointLockedError, match=str(writer.pid)):
                ckpt.save(tree_of(1), 1)
            assert [info.epoch for info in ckpt.checkpoints] == [0]
            writer.kill()
            writer.wait()
            ckpt.save(tree_of(1), 1)
            ckpt.wait()
            assert [info.epoch for info in ckpt.checkpoints] == [0, 1]


@pytest.mark.usefixtures("quickly")
def test_who_was_taken_for_dead_writes_no_more(s3):
    with running(WRITER.format(url=s3)) as writer:
        assert writer.stdout.readline() == "saved\n"
        writer.send_signal(signal.SIGSTOP)
        with ModelCheckpoint(f"{s3}/{{epoch}}") as ckpt:
            ckpt.save(tree_of(2), 2)
            ckpt.wait()
            writer.send_signal(signal.SIGCONT)
            told, _ = writer.communicate("go on\n", timeout=60)
            assert f"by process {os.getpid()}" in told
            assert [info.epoch for info in ckpt.checkpoints] == [0, 2]


UPLOADER = """
    import sys
    import numpy as np
    import flaxckpt
    from flaxckpt._object_store import lease as _lease
    from flaxckpt._object_store import objects as _objects

    _lease.HEARTBEAT_SECS, _lease.WATCH_SECS = 0.1, 0.5
    ckpt = flaxckpt.ModelCheckpoint("{url}/best")
    ckpt.save({{"w": np.full(3, 0)}}, 0)
    ckpt.wait()
    upload = _objects.Objects.upload

    def upload_slowly(*arguments):
        if "{when}" == "after":
            upload(*arguments)
        print("uploading", flush=True)
        sys.stdin.readline()
        if "{when}" == "before":
            upload(*arguments)

    _objects.Objects.upload = upload_slowly
    try:
        ckpt.save({{"w": np.full(3, 1)}}, 1)
        ckpt.wait()
        print("acknowledged", flush=True)
    except flaxckpt.CheckpointLockedError as error:
        print("refused", flush=True)
    ckpt.save({{"w": np.full(3, 3)}}, 3)  # waits, and takes the lock again
    sys.stdin.readline()
    ckpt.wait()
    print("acknowledged", flush=True)
"""


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("when", ["before", "after"])
def test_who_loses_the_lock_while_it_uploads_undoes_nothing(url, when):
    with running(UPLOADER.format(url=url, when=when)) as writer:
        assert writer.stdout.readline() == "uploading\n"
        writer.send_signal(signal.SIGSTOP)
        with ModelCheckpoint(f"{url}/best") as ckpt:
            ckpt.save(tree_of(2), 2)
            ckpt.wait()
            writer.send_signal(signal.SIGCONT)
            writer.stdin.write("go on\n")
            writer.stdin.flush()
            assert writer.stdout.readline() == "refused\n"
            assert_same(flaxckpt.load(f"{url}/best"), 2)
            assert_same(ckpt.restore().tree, 2)
            ckpt.save(tree_of(4), 4)
        flaxckpt.verify(f"{url}/best")


LAST = """
    import numpy as np
    import sys
    import flaxckpt

    with flaxckpt.ModelCheckpoint(
        "{url}/a-{{epoch}}", "loss", save_best_only=True, save_last=True
    ) as ckpt:
        state = ckpt.init()
        for epoch in range(3):
            sys.stdin.readline()
            tree = {{"w": np.full(3, epoch)}}
            state = ckpt.update(state, tree, {{"loss": epoch}}, epoch)
            ckpt.wait()
            print(ckpt.latest.epoch, flush=True)
"""


def test_the_last_state_of_another_series_is_not_replaced(s3):
    with (
        running(LAST.format(url=s3)) as other,
        ModelCheckpoint(
            f"{s3}/b-{{epoch}}", "loss", save_best_only=True, save_last=True
        ) as ckpt,
    ):
        state = ckpt.init()
        for epoch in range(3):
            state = ckpt.update(state, tree_of(epoch), {"loss": epoch}, epoch)
            ckpt.wait()
            assert ckpt.latest.epoch == epoch
            other.stdin.write("\n")
            other.stdin.flush()
            assert other.stdout.readline() == f"{epoch}\n"
        assert_same(ckpt.restore().tree, 2)
    assert sorted(info.epoch for info in flaxckpt.list_checkpoints(s3)) == [0, 0, 2, 2]


def test_a_slot_that_two_series_have_chosen_is_the_first_ones(s3):
    """Each sees it free before the other one puts its state there."""
    settings = {"save_best_only": True, "save_last": True}
    with (
        ModelCheckpoint(f"{s3}/a", "loss", **settings) as a,
        ModelCheckpoint(f"{s3}/b", "loss", **settings) as b,
    ):
        states = {ckpt: train(ckpt, [0.5]) for ckpt in (a, b)}
        a.update(states[a], tree_of(1), {"loss": 1.0}, 1)
        a.wait()
        b._series.slot = lambda: b._series.slots[0]
        b.update(states[b], tree_of(2), {"loss": 2.0}, 2)
        b.wait()
        del b._series.slot
        for epoch in (1, 5):
            if epoch == 5:
                a.update(states[a], tree_of(5), {"loss": 5.0}, 5)
                a.wait()
            assert_same(a.restore().tree, epoch)
            assert_same(b.restore().tree, 2)
        assert a.restore().path.name == "last"
        assert b.restore().path.name == b._series.slots[1].name
        area, shared = b._series.area, b._series.slots[0]
        with area.staging() as directory:  # several processes write to the first place
            written = directory / "new"
            place = area.meeting_place(written, shared)
            with area.share(place) as share:
                (share / "share").write_text("another process's")
            written.mkdir()
            key = f".flaxckpt-current/{b._series.slots[1].name}"
            record = json.loads(area._objects.read(key).content)["record"]
            (written / "flaxckpt.json").write_text(record)
            page = SimpleNamespace(path=shared)
            with area.claim.turn:
                own = b._saves._parts.disk._put_in_slot(page, written, shared)
        area.sweep()
        assert own == page.path == b._series.slots[1]
        names = [key.split("/") for key in keys(s3) if f"{own.name}/" in key]
        assert [each[-1] for each in names] == ["flaxckpt.json", "share"]
        assert_same(a.restore().tree, 5)
    assert not [key for key in keys(s3) if "doubtful" in key or place in key]


def test_a_damaged_pointer_is_that_of_one_checkpoint(s3):
    with ModelCheckpoint(f"{s3}/{{epoch}}") as ckpt:
        train(ckpt, [3.0, 2.0])
    objects, key = Objects(s3), ".flaxckpt-current/2"
    objects.write(key, objects.read(key).content[:-5])
    with pytest.raises(flaxckpt.CheckpointCorruptError, match=f"{s3}/2'"):
        flaxckpt.load(f"{s3}/2")
    with pytest.warns(UserWarning, match=f"{s3}/2'"):
        assert [info.epoch for info in flaxckpt.list_checkpoints(s3)] == [0]
    with ModelCheckpoint(f"{s3}/{{epoch}}") as ckpt:
        with pytest.warns(UserWarning, match=f"PASSED OVER.*{s3}/2'"):
            assert_same(ckpt.restore().tree, 0)
        ckpt.save(tree_of(2), 2)
        ckpt.save(tree_of(1), 1)
        ckpt.wait()
        assert [info.epoch for info in ckpt.checkpoints] == [0, 2, 1]
    assert_same(flaxckpt.load(f"{s3}/2"), 1)


def test_a_program_that_ends_without_close_keeps_nobody_waiting(s3):
    program = f"""
    import numpy as np
    import flaxckpt

    flaxckpt.ModelCheckpoint("{s3}/best").save({{"w": np.ones(3)}}, 0)
    """
    with running(program) as process:
        process.communicate(timeout=60)
    assert [key for key in keys(s3) if "lock" in key] == []
    assert (flaxckpt.load(f"{s3}/best")["w"] == 1).all()


def test_what_a_killed_writer_has_here_is_deleted(s3, tmp_path):
    here = {"TMPDIR": str(tmp_path)}
    other = f"import flaxckpt as f; f.ModelCheckpoint('{s3}/a')"
    with running(WRITER.format(url=s3), **here) as writer:
        assert writer.stdout.readline() == "saved\n"
        (left,) = tmp_path.iterdir()
        with running(other, **here) as process:
            process.communicate(timeout=60)
        assert list(tmp_path.iterdir()) == [left]  # it lives
    with running(other, **here) as process:
        process.communicate(timeout=60)
    assert not list(tmp_path.iterdir())


def test_a_store_that_is_gone_is_an_error_and_nothing_is_lost(monkeypatch):
    retries = {"max_retries": 2, "initial_delay": "20ms", "max_delay": "100ms"}
    monkeypatch.setattr(_objects, "_RETRIES", retries)
    with object_stores.s3_server() as server:
        ckpt = ModelCheckpoint(f"s3://{object_stores.BUCKET}/run/{{epoch}}")
        ckpt.save(tree_of(0), 0)
        ckpt.wait()
        os.kill(server.pid, signal.SIGSTOP)
        os.kill(server.pid, signal.SIGKILL)
        ckpt.save(tree_of(1), 1)
        with pytest.raises(
            flaxckpt.CheckpointError, match=r"s3://bucket/run.*attempts"
        ):
            ckpt.wait()
        assert [info.epoch for info in ckpt.checkpoints] == [0]
        with pytest.raises(flaxckpt.CheckpointError, match="attempts"):
            ckpt.close()
        with contextlib.suppress(flaxckpt.CheckpointError):
            ckpt.close()  # of what was to be deleted afterwards
        with pytest.raises(flaxckpt.CheckpointError, match="attempts"):
            flaxckpt.load(f"s3://{object_stores.BUCKET}/run/1")


def test_what_cannot_work_is_said_at_once(s3):
    with pytest.raises(flaxckpt.CheckpointError, match="bucket of that name"):
        ModelCheckpoint("s3://no-such-bucket/run").save({"w": 1}, 0)
    for path in (
        *("s3://bucket", "s3://{epoch}/run", "s3:///run", "ftp://some/where"),
        *("s3://bucket/../run", "s3://bucket/run//{epoch}", "gs://bucket/"),
    ):
        with pytest.raises(flaxckpt.TemplateError, match=re.escape(path)):
            ModelCheckpoint(path)
    for use in (ModelCheckpoint, flaxckpt.load, flaxckpt.list_checkpoints):
        with pytest.raises(flaxckpt.CheckpointPathError, match="as text"):
            use(Path("s3://bucket/run"))
    with pytest.raises(flaxckpt.TemplateError, match=f"{s3}/.*loss"):
        ModelCheckpoint(f"{s3}/{{loss}}").save({"w": 1}, 0)
    with pytest.raises(flaxckpt.SettingError, match="object store"):
        ModelCheckpoint(f"{s3}/best", frozen=lambda path, leaf: True)
    with pytest.raises(flaxckpt.CheckpointNotFoundError, match=f"{s3}/7"):
        flaxckpt.load(f"{s3}/7")
    assert flaxckpt.list_checkpoints(s3) == ()


def test_what_is_too_large_for_one_request_is_refused(s3, tmp_path):
    with (tmp_path / "file").open("wb") as file:
        file.truncate(6 * 2**30)
    with pytest.raises(flaxckpt.CheckpointError, match=r"6\.4 GB.*Shard"):
        Objects(s3).upload(tmp_path, "some")
    assert keys(s3) == []


def test_plain_orbax_checkpoints_are_read_and_ours_by_plain_orbax(s3, tmp_path):
    tree = {"w": jnp.arange(5.0), "n": np.arange(3)}
    v1.save(tmp_path / "theirs", tree)
    Objects(s3).upload(tmp_path / "theirs", "theirs")
    found = flaxckpt.load(f"{s3}/theirs", tree)
    assert (np.asarray(found["w"]) == np.arange(5)).all()
    with ModelCheckpoint(f"{s3}/{{epoch}}") as ckpt:
        ckpt.save(tree, 0)
        ckpt.wait()
        (directory,) = {
            "/".join(key.split("/")[:2]) for key in keys(s3) if key[0] == "1"
        }
    Objects(s3).download(directory, tmp_path / "ours")
    assert (v1.load(tmp_path / "ours", tree)["n"] == np.arange(3)).all()


def test_several_series_are_in_one_place(s3):
    with (
        ModelCheckpoint(f"{s3}/a-{{epoch}}", max_to_keep=1) as one,
        ModelCheckpoint(f"{s3}/b-{{epoch}}", max_to_keep=2) as other,
    ):
        for epoch in range(3):
            one.save(tree_of(epoch), epoch)
            other.save(tree_of(epoch), epoch)
        one.wait()
        other.wait()
        assert [info.path.name for info in one.checkpoints] == ["a-3"]
        assert [info.path.name for info in other.checkpoints] == ["b-2", "b-3"]
    names = [info.path.name for info in flaxckpt.list_checkpoints(s3)]
    assert sorted(names) == ["a-3", "b-2", "b-3"]
