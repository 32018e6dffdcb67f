"""What saves in the background cost the loop: no collective, and few messages."""

import re

from multiprocess import pod

COLLECTIVE = re.compile(
    r"\b(all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+|send|recv)"
    r"(-start)?\("
)
MOST = 8  # messages of one process in one save


def test_a_save_sends_few_messages_and_enters_no_collective(tmp_path):
    said = pod.run(
        tmp_path, "train_watched", 2, tmp_path / "run", script="watched.py",
        faults={
            index: {"FLAXCKPT_TEST_DUMP": str(tmp_path / f"programs-{index}")}
            for index in range(2)
        },
    )  # fmt: skip
    for index, lines in enumerate(said):
        by_step = dict(lines[0])
        assert lines[1:] == [["saved", 3], ["forbidden", []]]
        del by_step[0]  # at the first call, all processes meet
        due = [by_step.pop(batch) for batch in (9, 19, 29)]
        assert not any(by_step.values()), (index, by_step)
        assert all(0 < number <= MOST for number in due), (index, due)
        with_collectives = {
            program.name.split(".")[1]
            for program in (tmp_path / f"programs-{index}").glob("*after_opt*.txt")
            if COLLECTIVE.search(program.read_text())
        }
        assert with_collectives == {"jit_users_step"}
