"""Hypothesis strategies that several test modules share."""

import hypothesis.strategies as st
import numpy as np

TINY = float(np.finfo(np.float32).tiny)
# Ties, infinities, and numbers around the smallest normal one, beside any float32.
SPECIAL = (0.0, -0.0, 0.5, -0.5, np.inf, -np.inf, np.nan, TINY, TINY / 2, -TINY / 4)
metrics = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32))
numbers = st.one_of(
    st.sampled_from([x for x in SPECIAL if x == x]),
    st.floats(width=32, allow_nan=False),
)


freqs = st.one_of(st.just("epoch"), st.integers(1, 7))


@st.composite
def settings(draw, save_freq=freqs):
    """Draw the arguments of `CheckpointState.create`."""
    return {
        "monitor": "score",
        "mode": draw(st.sampled_from(["min", "max"])),
        "save_best_only": draw(st.booleans()),
        "save_freq": draw(save_freq),
        "initial_value_threshold": draw(st.one_of(st.none(), numbers)),
        "min_delta": draw(st.sampled_from([0.0, 0.0, 0.1, 1e-38, 1e30])),
    }


@st.composite
def calls(draw, values=metrics, may_miss=True, ends=True):
    """Draw the calls of a run: (epoch, batch or None, value or None) in order.

    Epochs of different lengths, some left out; batches with gaps between them.
    """
    run = []
    epoch = draw(st.integers(0, 2))
    values = st.one_of(values, st.none()) if may_miss else values
    for _ in range(draw(st.integers(1, 4))):
        batch = -1
        for gap in draw(st.lists(st.integers(1, 4), max_size=5)):
            batch += gap
            run.append((epoch, batch, draw(values)))
        if ends:
            run.append((epoch, None, draw(values)))
        epoch += draw(st.integers(1, 2))
    return run
