"""The trees that a call saves: copied once each, and superseded by which others."""

from pathlib import Path

import numpy as np
import pytest

from flaxckpt._decision.moment import Moment
from flaxckpt._saving.call import Call, OnDevice, Save, Skip, Undecided
from flaxckpt._saving.contents import Contents, StoredTree

WHOLE = StoredTree("whole", ["a", "b"], "weights", [], [], [None] * 2)
WEIGHTS = StoredTree("picked", ["a"], "weights", [], [], [None])
PATH = Path("run/1")


def call_of(decision, line=0):
    call = Call(False, Moment(0), None, None)
    call.decision, call.line = decision, line
    return call


def test_a_tree_for_both_series_and_slot_is_copied_once():
    call = call_of(Save())
    assert Contents(WHOLE, WHOLE, PATH).leaves(call)[0] == ["a", "b"]
    assert Contents(WEIGHTS, WHOLE, PATH).leaves(call) == (["a", "a", "b"], [None] * 3)
    assert Contents(None, WHOLE, None).leaves(call)[0] == ["a", "b"]


@pytest.mark.parametrize("decision", [Undecided(), OnDevice(np.True_)])
def test_the_device_may_choose_between_series_and_slot(decision):
    assert Contents(WEIGHTS, WHOLE, PATH).key(call_of(decision)) is None
    assert Contents(WEIGHTS, None, PATH).key(call_of(decision)) is not None


def test_what_goes_to_one_path_supersedes_only_its_line():
    contents = Contents(WHOLE, None, PATH)
    key = contents.key(call_of(Save(), line=1))
    assert key == contents.key(call_of(Undecided(), line=1))
    assert key != contents.key(call_of(Save(), line=2))
    assert key != Contents(WHOLE, None, Path("run/2")).key(call_of(Save(), line=1))
    assert key != Contents(WHOLE, WHOLE, PATH).key(call_of(Save(), line=1))
    assert Contents(WHOLE, None, None).key(call_of(Save(), line=1)) is None


def test_any_later_state_supersedes_the_state_for_the_slot():
    one = Contents(None, WHOLE, None).key(call_of(Skip(), line=1))
    other = Contents(None, WHOLE, PATH).key(call_of(Skip(), line=2))
    assert one == other


def test_a_slot_is_copied_to_whatever_the_device_decides():
    call = call_of(OnDevice(np.False_))
    assert not Contents(WHOLE, None, PATH).wanted(call)
    assert Contents(WHOLE, WHOLE, PATH).wanted(call)


def test_after_a_call_is_judged_the_series_may_get_nothing():
    contents = Contents(WEIGHTS, WHOLE, PATH)
    assert contents.decided(call_of(Save())).trees == [WEIGHTS, WHOLE]
    assert contents.decided(call_of(Skip())).trees == [WHOLE]
