"""The collector of garbage is paused for a moment, and then is as it was."""

import contextlib
import gc

import pytest

from flaxckpt._runtime.collector import paused_collector


@pytest.mark.parametrize("is_on", [True, False])
@pytest.mark.parametrize("error", [None, ValueError("within")])
def test_it_is_as_it_was(is_on, error):
    (gc.enable if is_on else gc.disable)()
    try:
        with contextlib.suppress(ValueError), paused_collector():
            assert not gc.isenabled()
            if error:
                raise error
        assert gc.isenabled() is is_on
    finally:
        gc.enable()
