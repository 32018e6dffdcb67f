"""Whatever fault one process meets, the processes never disagree on what was saved."""

import itertools
import json
import os
import shutil

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from multiprocess import pod
from multiprocess.outcome import leftovers, there_below

FULL = os.environ.get("FLAXCKPT_FAULTS") == "full"
TIMEOUT_SECS = 1.0
EPOCHS = 2  # as in `faulty.py`
# Of one call: what waits for a process that gives signs, or none, ends within these.
BOUND_SECS = 12.0
SETTINGS = {
    "derandomize": not FULL,
    "report_multiple_bugs": False,
    "phases": [hypothesis.Phase.explicit, hypothesis.Phase.generate],
}

MESSAGES = ("tell", "told", "hear", "heard", "settle", "settling", "settled")
HIDES = ("blind",) if pod.can_be_apart() else ()
REFUSED = "no room for a copy"  # as in `faulty.py`
KINDS = ("late", "silent", "stopped", "failing", "refusing", *HIDES)


@st.composite
def faults(draw, kinds=KINDS):
    """Draw what befalls a process, and at which message or file call."""
    kind = draw(st.sampled_from(kinds))
    only = {"failing": "file", "refusing": "copy"}
    point = only.get(kind) or draw(st.sampled_from(("call", *MESSAGES, "file")))
    most = {"call": 0, "copy": 0, "file": 60}
    most |= {"settle": 1, "settling": 1, "settled": 1}
    fault = {"kind": kind, "point": point}
    fault["number"] = draw(st.integers(0, most.get(point, 4)))
    if kind in ("late", "silent", "stopped"):
        fault["secs"] = TIMEOUT_SECS * draw(st.sampled_from([0.4, 1.5, 2.5]))
    if kind == "blind":
        fault["in_share"] = draw(st.booleans())
    return fault


def orders(count, a_fault):
    """Draw what a pod of so many processes saves, and the fault of one of them."""
    return st.fixed_dictionaries(
        {
            "fault": a_fault,
            "process": st.integers(0, count - 1),
            "epoch": st.integers(0, EPOCHS - 1),
            "kind": st.sampled_from(["each", "best", "two"]),
            "improves": st.booleans(),
            "waits": st.booleans(),
            "timeout": st.just(TIMEOUT_SECS),
        }
    )


class Lived:
    """A pod that carries out one order after the other; started again after a failure.

    Args:
        directory: For all of its files.
        count: How many processes.
    """

    def __init__(self, directory, count):
        self._directory, self._count = directory, count
        self._number, self._pod = 0, None

    def carry_out(self, order):
        """Return what each process was told, and where it saved."""
        try:
            if self._pod is None:
                self._pod = pod.start(
                    self._directory, "obey", self._count, script="faulty.py",
                    takes_orders=True, is_apart=bool(HIDES),
                )  # fmt: skip
                fault = {"kind": "late", "point": "call", "number": 99, "secs": 0}
                self._order({**order, "fault": fault, "timeout": 30})  # compiles
            return self._order(order)
        except AssertionError:
            self.end()
            raise

    def _order(self, order):
        self._number += 1
        directory = self._directory / f"run-{self._number}"
        directory.mkdir()
        self._pod.order(**order, directory=str(directory))
        done = ["done", str(directory)]
        said = [
            self._pod.wait_until(index, done, beginning=True)[2]
            for index in range(self._count)
        ]
        return said, directory

    def end(self):
        self._pod.kill()
        self._pod = None


@pytest.fixture(scope="module", params=[2, 3])
def lived(request, tmp_path_factory):
    count = request.param
    lived = Lived(tmp_path_factory.mktemp(f"pod-{count}"), count)
    lived.count = count
    yield lived
    if lived._pod is not None:
        lived.end()


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=200 if FULL else 10, **SETTINGS)
def test_whatever_befalls_one_all_are_told_the_same(lived, data):
    order = data.draw(orders(lived.count, faults()))
    said, directory = lived.carry_out(order)
    hypothesis.event(f"has struck: {said[order['process']]['struck']}")
    check(order, said, directory)


# What befalls which process in which save, what is saved there, and whether all are told
# of an error.
MOMENTS = {
    "process 0 settles too late": ("silent", "settle", 0, 0, 1, "each", True),
    "process 0 is silent once it has settled": ("silent", "settled", 0, 0, 1, "each", False),
    "process 0 is silent between two pages": ("silent", "settled", 0, 0, 1, "two", False),
    "process 0 is silent where it saves nothing": ("silent", "tell", 2, 0, 1, "best", False),
    "process 0 is silent as they have met": ("silent", "tell", 1, 0, 0, "each", False),
    "process 0 is silent as they meet": ("silent", "tell", 0, 0, 0, "each", True),
    "process 0 comes too late": ("late", "call", 0, 0, 0, "each", True),
    "process 0 loses the directory": ("blind", "told", 2, 0, 1, "each", True),
    "a process writes elsewhere": ("blind", "heard", 1, 1, 1, "each", True),
    "a process cannot copy": ("refusing", "copy", 0, 1, 0, "each", True),
    "process 0 cannot copy": ("refusing", "copy", 0, 0, 0, "each", True),
    "a process is stopped as it settles": ("stopped", "settling", 0, 0, 1, "each", False),
}  # fmt: skip


@pytest.mark.parametrize("lived", [2, 3] if FULL else [2], indirect=True)
@pytest.mark.parametrize("moment", MOMENTS)
def test_at_the_moments_at_which_they_could_disagree(lived, moment):
    kind, point, number, process, epoch, what, fails = MOMENTS[moment]
    if kind == "blind" and not HIDES:
        pytest.skip("no file systems of their own for processes")
    fault = {"kind": kind, "point": point, "number": number}
    late = 1.5 if kind == "late" else 2.5  # the others are in the next save, or beyond
    fault |= {"secs": late * TIMEOUT_SECS, "in_share": process == 1}
    order = {"fault": fault, "process": process, "epoch": epoch, "kind": what}
    order |= {"improves": False, "waits": kind != "refusing", "timeout": TIMEOUT_SECS}
    said, directory = lived.carry_out(order)
    errors = [error for each in said for *_, error, _ in each["told"]]
    check(order, said, directory)
    assert any(errors) == fails, json.dumps(said, indent=1)
    assert said[process]["struck"]
    if moment == "a process writes elsewhere":
        assert any("process 1 has written" in (error or "") for error in errors)


def check(order, said, directory):
    """Check all that an order without a death has to leave behind."""
    shown = json.dumps([order, said], indent=1)
    check_agreement(order, said, shown)
    check_calls(order, said[0]["told"], directory, shown)
    *_, (_, _, error, _), _ = said[0]["told"]
    assert error is None, shown  # all go on
    if order["fault"]["kind"] != "blind":  # what it does not see, the next run sweeps
        assert not leftovers(directory), shown
    shutil.rmtree(directory)


def check_agreement(order, said, shown):
    """Check that each call has told all processes the same, and in time.

    A process that cannot copy says so at once, and the others at the next call.
    """
    if order["fault"]["kind"] == "refusing":
        for call, after in itertools.pairwise(said[order["process"]]["told"]):
            if call[2] == REFUSED:
                assert after[2] is None, shown
                call[2], after[2] = None, REFUSED
                break
    for calls in zip(*(each["told"] for each in said), strict=True):
        assert (
            len({(what, epoch, error is None) for what, epoch, error, _ in calls}) == 1
        ), shown
        late = order["fault"].get("secs", 0)
        assert all(secs < BOUND_SECS + late for *_, secs in calls), shown
    assert len({each["saved"] for each in said}) == 1, shown


def check_calls(order, told, directory, shown):
    """Check that what was acknowledged is there, and that all that is there is whole."""
    there = there_below(directory)
    improved, best = set(), np.inf
    losses = [float(-epoch) for epoch in range(EPOCHS + 1)]
    if not order["improves"]:
        losses[order["epoch"]] = 10.0
    for epoch, loss in enumerate(losses):
        if loss < best or order["kind"] == "each":
            improved.add(epoch)
            best = loss
    acknowledged = acknowledged_by(told)
    assert acknowledged & improved <= there, shown
    if order["kind"] == "two" and acknowledged:
        assert max(there) >= max(acknowledged), shown


def acknowledged_by(told):
    """Return the epochs of which neither the call nor the next call has told an error."""
    pairs = itertools.pairwise(told)
    return {
        epoch
        for (what, epoch, error, _), (*_, later, _) in pairs
        if what == "save" and error is None and later is None
    }


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=100 if FULL else 4, **SETTINGS)
def test_where_one_dies_no_other_is_told_of_what_is_not_there(tmp_path_factory, data):
    count = data.draw(st.sampled_from([2, 3]))
    order = data.draw(orders(count, faults(kinds=("dead",))))
    directory = tmp_path_factory.mktemp("run")
    order |= {"directory": str(directory / "run"), "waits": True}
    running = pod.start(
        directory, "obey_and_die", count, json.dumps(order), script="faulty.py"
    )
    said = running.wait(check=False)
    shown = f"{json.dumps(order, indent=1)}\n{running.told()}"
    dead, leads = order["process"], order["process"] == 0
    told = [[line[1:] for line in lines if line[0] == "told"] for lines in said]
    living = [each for index, each in enumerate(told) if index != dead]
    for index, lines in enumerate(said):
        if index != dead and not leads:
            assert lines[-1] == "survived", shown
    for each in told:
        assert all(secs < BOUND_SECS for *_, secs in each), shown
        check_calls(order, each, directory / "run", shown)
    if not leads:
        for calls in zip(*living, strict=True):
            assert len({error is None for _, _, error, _ in calls}) == 1, shown
