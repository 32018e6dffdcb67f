"""The collector of garbage is paused for a moment, and then is as it was."""

import gc

import pytest

from flaxckpt._runtime.collector import paused_collector


@pytest.mark.parametrize("is_on", [True, False])
@pytest.mark.parametrize("error", [None, ValueError("within")])
def test_it_is_as_it_was(is_on, error):
    (gc.enable if is_on else gc.disable)()
    try:
        with paused_collector():
            assert not gc.isenabled()
            if error:
                raise error
    except ValueError as caught:
        assert caught is error
    finally:
        is_enabled = gc.isenabled()
        gc.enable()
    assert is_enabled is is_on
