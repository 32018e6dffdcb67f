"""Retention: records in, deletions out; with Orbax's own policies."""

import datetime
import math
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given
from orbax.checkpoint import v1 as ocp

from flaxckpt import CheckpointInfo, SettingError
from flaxckpt._checkpoints.retention import LatestN, expired, ranked

policies = ocp.training.preservation_policies
EPOCH = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def info(step, loss=None):
    return CheckpointInfo(
        path=Path(f"/r/{step}"),
        epoch=step - 1,
        batch=None,
        step=step,
        logs={} if loss is None else {"loss": loss},
        time=EPOCH + datetime.timedelta(hours=step),
        weights_only=False,
        series="{epoch}",
    )


def best_of(infos, mode):
    return next(iter(ranked(infos, "loss", mode)), None)


def kept(infos, policy, mode="min"):
    gone = expired(infos, policy, best_of(infos, mode))
    return [each.step for each in infos if each not in gone]


def test_latest_n_keeps_the_best_beside_them():
    infos = [info(1, 0.1), info(2, 0.5), info(3, 0.4), info(4, 0.3)]
    assert kept(infos, LatestN(2)) == [1, 3, 4]
    assert kept(infos, LatestN(1)) == [1, 4]
    assert kept(infos, LatestN(2), "max") == [2, 3, 4]
    assert kept(infos, None) == [1, 2, 3, 4]


def test_without_metrics_the_newest_stay():
    assert kept([info(1), info(2), info(3)], LatestN(1)) == [3]
    assert kept([], LatestN(1)) == []


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (policies.LatestN(2), [3, 5, 6]),
        (policies.EveryNSteps(2), [2, 3, 4, 6]),
        (policies.EveryNSeconds(2 * 3600), [1, 3, 5, 6]),
        (policies.CustomSteps([1, 5]), [1, 3, 5, 6]),
        (policies.PreserveAll(), [1, 2, 3, 4, 5, 6]),
        (policies.BestN(get_metric_fn=lambda logs: logs["loss"], reverse=True, n=2), [1, 3, 6]),
        (policies.AnyPreservationPolicy([policies.LatestN(1), policies.CustomSteps([2])]), [2, 3, 6]),
    ],
    ids=lambda each: type(each).__name__ if hasattr(each, "should_preserve") else "",
)  # fmt: skip
def test_policies_of_orbax(policy, expected):
    """Step 3 is the best and 6 the newest: they stay whatever a policy says."""
    losses = [0.2, 0.9, 0.1, 0.8, 0.7, 0.6]
    infos = [info(step, loss) for step, loss in enumerate(losses, start=1)]
    assert kept(infos, policy) == expected


def test_a_policy_must_answer_for_each():
    class Short:
        def should_preserve(self, checkpoints, *, context):
            return [True]

        def __repr__(self):
            return "Short()"

    with pytest.raises(SettingError) as caught:
        kept([info(1), info(2)], Short())
    assert str(caught.value) == (
        "preserve=Short() cannot work: it gave 1 answers for 2 checkpoints. It must "
        "give one for each."
    )


def test_nan_and_what_is_no_number_is_never_the_best():
    infos = [info(1, math.nan), info(2, "low"), info(3), info(4, 0.5), info(5, 0.5)]
    assert best_of(infos, "min") is infos[3]
    assert best_of(infos, "max") is infos[3]
    assert best_of(infos[:3], "min") is None


losses = st.one_of(st.none(), st.floats(), st.sampled_from([0.5, 1.0]))


@given(
    st.lists(losses, max_size=12), st.integers(1, 4), st.sampled_from(["min", "max"])
)
def test_retention_is_idempotent_and_keeps_newest_and_best(values, n, mode):
    infos = [info(step, value) for step, value in enumerate(values, start=1)]
    best = best_of(infos, mode)
    gone = expired(infos, LatestN(n), best)
    left = [each for each in infos if each not in gone]
    assert all(each in left for each in infos[-n:])
    assert best is None or best in left
    assert len(left) <= n + 1
    assert expired(left, LatestN(n), best_of(left, mode)) == ()
    assert best_of(left, mode) is best
