"""What one of several processes has or meets alone."""

import pytest
from multiprocess import pod

import flaxckpt


def run(directory, worker, *arguments, count=2, devices=2):
    return pod.run(
        directory, worker, count, directory / "run", *arguments,
        script="unequal.py", devices=devices,
    )  # fmt: skip


@pytest.mark.parametrize("differing", ["processes", "devices", "none"])
def test_replicas_that_differ_are_saved_as_one_array(tmp_path, differing):
    """JAX says that replicas are equal, and does not check it."""
    said = run(tmp_path, "save_replicas", differing)
    values = [value for _, shards in said for value in shards]
    assert all(value == values[0] for value in values)
    assert [direct for direct, _ in said] == [2, 2]
    for info in flaxckpt.list_checkpoints(tmp_path / "run"):
        flaxckpt.verify(info.path)


def test_two_leaves_whose_paths_read_alike_are_compared_each(tmp_path):
    for (text,) in run(tmp_path, "save_two_of_a_name"):
        assert "The trees differ between processes: a/b is" in text


@pytest.mark.parametrize("kind", ["text", "bytes"])
def test_own_texts_may_change_their_length(tmp_path, kind):
    assert run(tmp_path, "save_texts", kind) == [[[5, True]]] * 2


def test_own_integers_may_be_of_any_size(tmp_path):
    assert run(tmp_path, "save_integers") == [[[True, 1]]] * 2


def test_each_process_s_data_go_on_in_mid_epoch(tmp_path):
    """No example is lost or repeated, in either process."""
    (tmp_path / "parts").mkdir()
    whole = run(tmp_path, "train_on_grain", 11)
    parts = [run(tmp_path / "parts", "train_on_grain", stop) for stop in (5, 11)]
    for index in range(2):
        ((start, seen, _),) = whole[index]
        ((_, early, _),), ((resumed, late, is_same),) = (each[index] for each in parts)
        assert (start, resumed, is_same) == (0, 5, True)
        assert early + late == seen
        epoch = [each for batch in seen for each in batch][:10]  # of its 10
        assert sorted(epoch) == list(range(index, 20, 2))


def test_states_that_differ_are_no_one_state(tmp_path):
    for (text,) in run(tmp_path, "share_a_state"):
        assert "draws" in text
        assert "per_process=" in text


def test_an_array_of_all_is_no_process_s_own(tmp_path):
    said = run(tmp_path, "choose_all")
    for index, ((number, refusal),) in enumerate(said):
        assert number == index
        assert "no leaf but arrays of all processes" in refusal


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("epoch", "epoch is 0 in process 0 and 1 in process 1"),  # the metric, too
        ("loss", "logs['loss'] differs between processes"),
        ("directory", "Saving '/proc/none' failed"),
    ],
)
def test_what_differs_first_is_what_the_error_names(tmp_path, what, told):
    for (text,) in run(tmp_path, "save_otherwise", what):
        assert told in text


def test_a_warning_that_one_takes_for_an_error_leaves_all_in_step(tmp_path):
    said = run(tmp_path, "be_warned")
    assert [errors for *errors, _ in said] == [[], [2]]
    assert [names for *_, names in said] == [[str(n) for n in range(1, 8)]] * 2


@pytest.mark.parametrize("what", ["copy", "leaf"])
@pytest.mark.parametrize("way", ["wait", "none", "plain"])
@pytest.mark.parametrize("victim", [0, 1])
def test_one_failure_costs_one_save(tmp_path, what, way, victim):
    """Whether or not the loop waits for each save, as it goes on in all processes."""
    said = run(tmp_path, "fail_once", what, way, victim)
    for index, ((seen, names),) in enumerate(said):
        ((epoch, text),) = seen
        assert epoch == (2 if way == "plain" and index != victim else 1)
        if index != victim:
            assert f"in process {victim}" in text
        assert names == ["1", "3", "4"]


def test_an_interrupt_while_the_loop_waits_is_told(tmp_path):
    first, second = run(tmp_path, "be_interrupted")
    ((number, told, there),) = first
    assert number == 1
    assert "KeyboardInterrupt (in process 1)" in told
    ((number, told, own),) = second
    assert number == 1
    assert told.startswith("KeyboardInterrupt")
    assert there == own
    assert len(there) == 4


def test_an_interrupt_where_others_never_come_delays_nobody(tmp_path):
    assert run(tmp_path, "leave_alone") == [[[None, 1]], [[[], 1]]]


def test_a_preemption_tells_of_an_earlier_failure(tmp_path):
    for ((notes, there),) in run(tmp_path, "be_preempted_after_a_failure"):
        (note,) = notes
        assert "injected (in process 1)" in note
        assert there == ["2"]


def test_an_error_does_not_swallow_an_interrupt(tmp_path):
    first, second = run(tmp_path, "fail_while_interrupted")
    ((told, there),) = first
    assert [epoch for epoch, _, _ in told] == [2]  # process 1's at epoch 1
    assert there == ["1", "3", "4"]
    ((told, own),) = second
    assert [each[:2] for each in told] == [
        [1, "UnsupportedLeafError"], [2, "KeyboardInterrupt"],
    ]  # fmt: skip
    assert own == there


@pytest.mark.parametrize("snapshot", ["host", "device"])
def test_wide_arrays_without_elements_are_saved(tmp_path, snapshot):
    said = run(tmp_path, "save_wide_empty", snapshot)
    assert said == [[["float64", "int64", "float32"]]] * 2


def test_close_ends_what_a_save_has_begun_to_compile(tmp_path):
    assert run(tmp_path, "close_at_once") == [[True]] * 2


@pytest.mark.parametrize("snapshot", ["host", "device"])
def test_arrays_without_elements_may_be_donated(tmp_path, snapshot):
    said = run(tmp_path, "save_empty", snapshot)
    assert said == [[[4, [0, 4]]]] * 2


@pytest.mark.parametrize("kinds", [("gone", "damaged"), ("damaged", "gone")])
def test_all_restore_the_same_whatever_each_has_met(tmp_path, kinds):
    said = run(tmp_path, "restore_otherwise", *kinds)
    assert said == [[1 if kinds[0] == "gone" else 0]] * 2
