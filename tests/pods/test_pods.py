"""Several processes of one run: what they write together, and what they agree on."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorstore
from multiprocess import pod
from multiprocess.workers import values
from orbax.checkpoint import v1

import flaxckpt


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint that four processes with two devices each have written."""
    directory = tmp_path_factory.mktemp("saved")
    said = pod.run(directory, "save_tree", 4, directory / "run")
    assert said == [[["1", "2"]]] * 4
    return directory / "run"


@pytest.mark.parametrize(
    ("processes", "devices"), [(1, 1), (1, 2), (1, 8), (2, 1), (2, 4), (4, 2)]
)
def test_what_four_have_saved_is_restored_on_others(
    saved, tmp_path, processes, devices
):
    said = pod.run(
        tmp_path, "restore_tree", processes, saved, "rows", "columns", devices=devices
    )
    assert said == [["same", "same"]] * processes


def test_what_four_have_saved_is_whole(saved):
    for info in flaxckpt.list_checkpoints(saved):
        flaxckpt.verify(info.path)
        described = v1.metadata(info.path).metadata
        wanted = {
            name: np.zeros(each.shape, each.dtype)
            for name, each in described.items()
            if name in ("float32", "host")
        }
        others = dict.fromkeys(set(described) - set(wanted), v1.PLACEHOLDER)
        tree = v1.load(info.path, wanted | others)
        assert tree["float32"].shape == (16, 8)
        assert (np.asarray(tree["host"]) == np.arange(500)).all()
    for process in range(4):
        files = (saved / f"2/state/ocdbt.process_{process}").rglob("*")
        assert len(list(filter(Path.is_file, files))) == 2


def test_process_0_calls_on_saved_and_all_raise_its_errors(tmp_path):
    said = pod.run(tmp_path, "call_hooks", 3, tmp_path / "run")
    failed = ["failed", "ValueError: boom"]
    assert said == [[failed, [2, 2, 0]], *[[failed, [0, 2, 0]]] * 2]
    assert flaxckpt.ModelCheckpoint(tmp_path / "run/{epoch}").finished


@pytest.mark.parametrize(
    "way", ["plain", "metric", "best", "late best", "own values", "resumed"]
)
def test_the_first_save_takes_memory_that_was_claimed_ahead(tmp_path, way):
    """It compiles what copies a metric, if one is on devices, and else nothing."""
    said = pod.run(tmp_path, "save_first", 2, tmp_path / "run", way)
    compiles = way in ("metric", "best")
    for by_one in said:
        in_place, numbers = zip(*by_one, strict=True)
        assert all(in_place)
        assert len(numbers) == (2 if way == "late best" else 3)
        assert numbers[0] > 0 if compiles else not any(numbers)


@pytest.mark.parametrize("name", ["bfloat16", "host"])
def test_a_flipped_bit_is_found_on_any_mesh(saved, tmp_path, name):
    shutil.copytree(saved, tmp_path / "run")
    part = {"bfloat16": values()["bfloat16"][:32, 40:80], "host": values()["host"]}[
        name
    ]
    assert _flip_a_bit_of(part.tobytes(), tmp_path / "run/2") == 1
    running = pod.start(tmp_path, "restore_tree", 2, tmp_path / "run", "rows")
    assert running.wait() == [["same"]] * 2  # of the one before
    for log in running.logs:
        assert "PASSED OVER" in log.read_text()
        assert name in log.read_text()


def _flip_a_bit_of(part, directory, at=None):
    """Flip one bit wherever these bytes are below a directory; return how often."""
    byte = len(part) // 2 if at is None else at
    number = 0
    for file in filter(Path.is_file, directory.rglob("*")):
        content = bytearray(file.read_bytes())
        start = content.find(part)
        if start >= 0:
            content[start + byte] ^= 4
            file.write_bytes(content)
            number += 1
    return number


@pytest.mark.parametrize("written", ["database", "files"])
def test_what_one_has_saved_is_checked_where_it_is_sharded(tmp_path, written):
    """By each process: none has all of it, and its digest is that of the whole."""
    run, frozen = tmp_path / "run", None
    if written == "files":
        frozen = lambda path, leaf: path == ("host",)  # noqa: E731
    with flaxckpt.ModelCheckpoint(run / "{epoch}", frozen=frozen) as ckpt:
        for epoch in range(2):
            ckpt.save({**values(), "key": jax.random.key(7)}, epoch, logs={"loss": 1.0})
    assert (run / "2/state/manifest.ocdbt").exists() == (written == "database")
    for is_damaged in (False, True):
        if is_damaged:
            part = values()["bfloat16"].tobytes()
            # At a byte that the last process need not keep.
            assert _flip_a_bit_of(part, run / "2/state", at=100) == 1
        running = pod.start(tmp_path, "restore_tree", 2, run, "rows")
        assert running.wait() == [["same"]] * 2
        for log in running.logs:
            assert ("PASSED OVER" in log.read_text()) == is_damaged
            assert ("bfloat16" in log.read_text()) == is_damaged


@pytest.mark.parametrize("setting", ["", "many", "compress", "orbax"])
def test_a_share_that_orbax_has_shown_is_written_straight_from_memory(
    tmp_path, setting
):
    said = pod.run(tmp_path, "save_in_ways", 2, tmp_path / "run", setting, devices=4)
    is_direct = setting in ("", "many")
    assert said == [[[2, 1] if is_direct else [0, 3], []]] * 2
    contents = [
        _contents(info.path) for info in flaxckpt.list_checkpoints(tmp_path / "run")
    ]
    assert len(contents) == 3
    assert contents[0] == contents[1] == contents[2]
    said = pod.run(tmp_path, "restore_tree", 4, tmp_path / "run", "columns")
    assert said == [["same"]] * 4


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize(
    ("setting", "name"),
    [
        *(("", name) for name in ("database_of", "sum_of_share", "chunks_of")),
        *(("", name) for name in ("trailer_of", "give_way")),
        *(("many", name) for name in ("database_at", "chunks_of", "trailer_of")),
    ],
)
def test_a_fault_of_the_direct_way_in_one_process_costs_no_checkpoint(
    tmp_path, setting, name, process
):
    run, faulty = tmp_path / "run", (setting, name, process)
    said = pod.run(tmp_path, "save_in_ways", 2, run, *faulty, devices=4)
    (counts, warned), good = said[process], said[1 - process]
    # After a fault of process 0, Orbax writes in all.
    assert (counts, good) == ([0, 3], [[1 + process, 2 - process], []])
    assert len(warned) == 1
    assert "injected" in warned[0]
    infos = flaxckpt.list_checkpoints(run)
    contents = [_contents(info.path) for info in infos]
    assert contents[0] == contents[1] == contents[2]
    flaxckpt.verify(infos[1].path)


@pytest.mark.parametrize("what", ["merge", "look"])
def test_what_fails_as_process_0_finishes_is_told_to_all_and_orbax_writes_then(
    tmp_path, what
):
    run = tmp_path / "run"
    for (epoch, text), counts in pod.run(tmp_path, "fail_as_it_finishes", 2, run, what):
        assert epoch == 1
        assert "injected" in text
        assert counts == [0, 2]
    infos = flaxckpt.list_checkpoints(run)
    assert [info.path.name for info in infos] == ["1", "3"]
    assert _contents(infos[0].path) == _contents(infos[1].path)


@pytest.mark.parametrize("process", [0, 1])
def test_where_one_does_not_know_which_replicas_it_has_written_none_are_divided_later(
    tmp_path, process
):
    run = tmp_path / "run"
    said = pod.run(tmp_path, "learn_nothing", 2, run, process, devices=4)
    for index, ((epoch, text), counts) in enumerate(said):
        assert epoch == 0
        assert f"nobody knows what process {process} has written" in text
        assert counts == ([0, 2] if index == process else [1, 1])
    infos = flaxckpt.list_checkpoints(run)
    assert [info.path.name for info in infos] == ["2", "3"]
    for info in infos:
        flaxckpt.verify(info.path)


def _contents(path):
    """Verify a checkpoint; return its database, and its small files less the times."""
    flaxckpt.verify(path)
    base = {"driver": "file", "path": f"{path}/state/"}
    database = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    values = {
        key: database.read(key).result().value for key in database.list().result()
    }
    small = [path / "_CHECKPOINT_METADATA", *(path / "state").rglob("*")]
    for file in small:
        parts = file.relative_to(path).parts
        is_data = "d" in parts or file.name == "manifest.ocdbt"
        if file.is_file() and not is_data:
            found = json.loads(re.sub(rb"\d{19}", b"0", file.read_bytes()))
            if isinstance(
                found.get("array_metadatas"), list
            ):  # in the order of threads
                found["array_metadatas"].sort(key=json.dumps)
            values[parts] = found
    return values


@pytest.mark.parametrize("processes", [2, 4])
def test_a_run_goes_on_where_it_was(tmp_path, processes):
    whole = pod.run(tmp_path, "train", processes, tmp_path / "a", 12)
    pod.run(tmp_path, "train", processes, tmp_path / "b", 7)
    resumed = pod.run(tmp_path, "train", processes, tmp_path / "b", 12)
    for index in range(processes):
        assert resumed[index][0] == ["starts at", 7]
        assert resumed[index][-2:] == whole[index][-2:]
    assert whole[0][-2][2] == "012"


@pytest.mark.parametrize(
    "kinds", [("host", "host"), ("host", "auto"), ("auto", "host")]
)
def test_what_is_donated_at_once_is_saved_as_it_was(tmp_path, kinds):
    """Each process copies to where it has room."""
    said = pod.run(tmp_path, "donate_at_once", 2, tmp_path / "run", *kinds, devices=4)
    assert said == [[[["1", "2", "4"], 1.0]]] * 2
    for info in flaxckpt.list_checkpoints(tmp_path / "run"):
        flaxckpt.verify(info.path)


@pytest.mark.parametrize("kind", ["host", "device", "nan"])
def test_metrics_that_differ_are_an_error_in_all_at_the_same_call(tmp_path, kind):
    said = pod.run(tmp_path, "differ", 2, tmp_path / "run", kind)
    for (name, epoch, text), names in said:
        assert (name, epoch) == ("MetricError", 3)
        assert "'loss'" in text
        assert "in process 0" in text
        assert "in process 1" in text
        assert names == ["1", "2", "4"]  # the call that raises saves, too


@pytest.mark.parametrize("save_best_only", [0, 1])
def test_processes_count_the_same_stale_checks(tmp_path, save_best_only):
    said = pod.run(tmp_path, "count_stale", 2, tmp_path / "run", save_best_only)
    assert said == [[[0, 0, 1, 2, 0, 1]]] * 2


def test_processes_count_the_same_global_steps(tmp_path):
    said = pod.run(tmp_path, "count_steps", 2, tmp_path / "run")
    for first, again, text in said:
        assert first == [["3", "6"], 0]
        assert again == [["3", "6", "9"], 7]
        assert "step is 20 in process 0 and 21 in process 1" in text


@pytest.mark.parametrize("kind", ["metric", "logs"])
def test_an_error_before_the_copy_is_told_to_all_at_once(tmp_path, kind):
    said = pod.run(tmp_path, "fail_early", 2, tmp_path / "run", kind)
    for index, (*errors, names) in enumerate(said):
        # The one that fails raises the error at once, and the others at the next call.
        assert [epoch for epoch, _, _ in errors] == ([1] if index else [2])
        for _, name, text in errors:
            assert name == {"metric": "MetricError", "logs": "SettingError"}[kind]
            assert "logs" in text
        assert names == ["1", "3", "4"]


def test_one_that_does_not_come_is_named_in_time(tmp_path):
    said = pod.run(tmp_path, "stay_away", 2, tmp_path / "run")
    text, in_time = said[0][0]
    assert "Process 1 (of 0 to 1) gave no sign within 3 s" in text
    assert in_time
    assert said[0][1] == said[1][0] == ["1"]


@pytest.mark.parametrize(("slow", "what"), [(1, "share"), (0, "commit"), (0, "sweep")])
def test_one_that_is_slow_but_alive_is_waited_for(tmp_path, slow, what):
    assert pod.run(tmp_path, "be_slow", 2, tmp_path / "run", slow, what) == [[2]] * 2


def test_a_process_0_that_is_silent_is_given_up_by_all(tmp_path):
    for text, *saved in pod.run(tmp_path, "be_mute", 4, tmp_path / "run", "before"):
        assert "Process 0 (of 0 to 3) gave no sign within 2 s" in text
        assert saved == [[0, []]]


def test_a_process_0_that_has_begun_to_finish_is_waited_for(tmp_path):
    said = pod.run(tmp_path, "be_mute", 4, tmp_path / "run", "after")
    assert said == [[[1, [0]]]] * 4


def test_one_that_is_silent_is_given_up_by_all(tmp_path):
    stopped = 1  # process 0 has the coordination service
    running = pod.start(tmp_path, "be_stopped", 4, tmp_path / "run")
    running.wait_until(stopped, "saves")
    running.processes[stopped].send_signal(signal.SIGSTOP)
    time.sleep(6)
    running.processes[stopped].send_signal(signal.SIGCONT)
    said = running.wait()
    (at,) = {lines[-2][1] for lines in said}  # the epoch that failed, in all
    for lines in said:
        assert lines[-2][0] == "failed"
        assert f"Process {stopped} (of 0 to 3) gave no sign within 2 s" in lines[-2][2]
        assert lines[-1] == ["saved", at - 1]


def test_a_failure_of_one_is_raised_in_all_and_they_go_on(tmp_path):
    said = pod.run(tmp_path, "run_out_of_room", 2, tmp_path / "run")
    for failed, names in said:
        assert failed[:2] == ["failed", 1]
        assert "File too large" in failed[2]
        assert "in process 1" in failed[2]
        assert names == ["1", "3", "4"]


def test_each_process_has_its_own_values_again(tmp_path):
    run = tmp_path / "run"
    assert pod.run(tmp_path, "keep_own", 2, run) == [["same"]] * 2
    for info in flaxckpt.list_checkpoints(run):
        flaxckpt.verify(info.path)
        described = v1.metadata(info.path).metadata
        assert described["own"]["array"].shape[0] == 2  # a row for each
    for said in pod.run(tmp_path, "load_own", 4, run):
        assert "values that 2 processes had for themselves: own/array" in said[0]
        assert "This is one of 4 processes" in said[0]
    (((told,),),) = pod.run(tmp_path, "load_own", 1, run)
    assert "This one process gets those of process 0" in told


def test_values_that_differ_are_an_error_that_names_them(tmp_path):
    said = pod.run(tmp_path, "keep_own", 2, tmp_path / "run", "array,key,text,bytes")
    for (text,) in said:
        assert "The trees differ between processes: own/complex is complex" in text
        assert "own/flag is bool" in text
        assert "per_process=" in text
    assert not flaxckpt.list_checkpoints(tmp_path / "run")


def apart(tmp_path):
    """Return settings by which each process has a file system of its own there."""
    if not pod.can_be_apart():
        pytest.skip("no file systems of their own for processes")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return {"scratch": scratch}


def test_where_they_have_no_directory_in_common_the_first_call_tells(tmp_path):
    settings = apart(tmp_path)
    where = settings["scratch"] / "run"
    for ((epoch, text),) in pod.run(tmp_path, "meet", 4, where, **settings):
        assert epoch == 0
        assert "what process 0 has made there is not there" in text
        assert "(in process 1)" in text


def test_a_run_that_another_one_writes_is_refused_at_the_first_call(tmp_path):
    with flaxckpt.ModelCheckpoint(tmp_path / "run/{epoch}") as ckpt:
        ckpt.save({"w": np.ones(3)}, 0)
        for ((epoch, text),) in pod.run(tmp_path, "meet", 2, tmp_path / "run"):
            assert epoch == 0
            assert "are being written by process" in text


def test_a_restore_that_one_process_cannot_see_says_so(tmp_path):
    shared = tmp_path / "run"
    shared.mkdir()
    for ((name, text),) in pod.run(
        tmp_path, "restore_blind", 2, shared, **apart(tmp_path)
    ):
        assert name == "CheckpointError"
        assert f"No checkpoint at '{shared}/1'" in text
        assert "Process 0 sees it" in text


def test_a_mount_that_is_lost_costs_no_earlier_checkpoint(tmp_path):
    said = pod.run(tmp_path, "lose_the_mount", 2, tmp_path / "run", **apart(tmp_path))
    for failed, saved in said:
        assert failed[0] == 1
        assert "what process 0 has made there is not there" in failed[1]
        assert "(in process 1)" in failed[1]
        assert saved == [1]
    for info in flaxckpt.list_checkpoints(tmp_path / "run"):
        flaxckpt.verify(info.path)
    assert [info.epoch for info in flaxckpt.list_checkpoints(tmp_path / "run")] == [0]


def test_told_to_end_all_save_at_the_same_step(tmp_path):
    running = pod.start(tmp_path, "train_until_told", 2, tmp_path / "run")
    running.wait_until(1, "runs")
    running.processes[1].send_signal(signal.SIGTERM)
    said = running.wait()
    assert said[0][1][0] == "preempted"
    assert said[0] == said[1]
    assert flaxckpt.verify(tmp_path / "run" / said[0][1][2]) is None


def test_where_nothing_is_due_no_message_is_sent(tmp_path):
    said = pod.run(tmp_path, "count_messages", 2, tmp_path / "run")
    assert said == [[0, [0, True]]] * 2


def test_processes_whose_clocks_differ_save_at_the_same_step(tmp_path):
    said = pod.run(tmp_path, "train_by_the_clock", 2, tmp_path / "run")
    (steps, on_disk), restored = said[0]
    assert steps == on_disk
    assert restored == "same"
    assert said[1] == said[0]


def test_until_the_time_is_over_they_meet_at_few_calls(tmp_path):
    said = pod.run(tmp_path, "count_meetings", 2, tmp_path / "run")
    assert [first for first, _ in said] == [3, 3]  # calls 2, 4 and 8, of 9


def test_what_works_in_one_process_only_is_refused(tmp_path):
    for said in pod.run(tmp_path, "refuse", 2, tmp_path / "run"):
        assert said == ["max_in_flight", "frozen"]


def test_within_jit_the_alternatives_are_named(tmp_path):
    for (text,) in pod.run(tmp_path, "trace", 2, tmp_path / "run"):
        assert "Snapshot" in text
        assert "scan_in_chunks" in text


@pytest.mark.parametrize("are_apart", [False, True], ids=["one disk", "a disk each"])
def test_in_a_store_each_process_writes_and_reads_its_part(s3, tmp_path, are_apart):
    settings = {}
    if are_apart:
        if not pod.can_be_apart():
            pytest.skip("no file systems of their own for processes")
        settings["scratch"] = tmp_path / "scratch"
        settings["scratch"].mkdir()
    said = pod.run(tmp_path, "save_tree", 4, f"{s3}/run", **settings)
    assert said == [[["1", "2"]]] * 4
    for processes, devices in [(2, 2), (1, 8)]:
        said = pod.run(
            tmp_path, "restore_tree", processes, f"{s3}/run", "columns",
            devices=devices, **settings,
        )  # fmt: skip
        assert said == [["same"]] * processes
    for info in flaxckpt.list_checkpoints(s3):
        flaxckpt.verify(info.path)


def test_in_a_store_a_run_goes_on_where_it_was(s3, tmp_path):
    whole = pod.run(tmp_path, "train", 2, f"{s3}/a", 12)
    pod.run(tmp_path, "train", 2, f"{s3}/b", 7)
    resumed = pod.run(tmp_path, "train", 2, f"{s3}/b", 12)
    for index in range(2):
        assert resumed[index][0] == ["starts at", 7]
        assert resumed[index][-2:] == whole[index][-2:]


@pytest.mark.parametrize("in_a_store", [False, True], ids=["disk", "store"])
def test_what_is_saved_by_hand_makes_a_better_one_go_aside(s3, tmp_path, in_a_store):
    said = pod.run(tmp_path, "save_by_hand", 2, s3 if in_a_store else tmp_path / "run")
    for first, again, last in said:
        assert first == [np.float32([0.7, 0.2]).round(3).tolist(), 2]
        assert again == [np.float32([0.8, 0.2]).round(3).tolist(), 2]
        assert last == [0.1]


def test_a_full_disk_of_any_process_is_told_with_the_space_it_lacks(s3, tmp_path):
    if not pod.can_be_apart():
        pytest.skip("no file systems of their own for processes")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    said = pod.run(
        tmp_path, "fill_a_disk", 2, s3, scratch, scratch=scratch,
        faults={1: {"SCRATCH_SIZE": "256m"}},
    )  # fmt: skip
    for failed, names in said:
        assert failed[:3] == ["failed", 1, f"{s3}/2"]
        assert failed[3].startswith("No space left on device: it needs about 33.6 MB")
        assert "are free on" in failed[3]
        assert failed[3].endswith("(in process 1)")
        assert names == ["1", "3"]


def test_what_fails_in_process_0_alone_keeps_no_other_one_waiting(tmp_path):
    said = pod.run(tmp_path, "fail_as_leader", 3)
    assert [name for ((name, _),) in said] == ["PermissionError"] + [
        "CheckpointError"
    ] * 2
    assert "Process 0 failed: PermissionError: [Errno 13]" in said[1][0][1]
