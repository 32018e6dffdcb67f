"""The collector of garbage is paused for a moment, and then is as it was."""

import contextlib
import gc
import os
import threading

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


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_child_forked_meanwhile_collects():
    paused, go = threading.Event(), threading.Event()

    def pause():
        with paused_collector():
            paused.set()
            go.wait(60)

    thread = threading.Thread(target=pause)
    thread.start()
    assert paused.wait(60)
    child = os.fork()
    if not child:
        os._exit(not gc.isenabled())
    _, status = os.waitpid(child, 0)
    go.set()
    thread.join()
    assert status == 0
    assert gc.isenabled()
