"""The collector of garbage is paused for a moment, and then is as it was."""

import contextlib
import gc
import os
import threading

import jax.numpy as jnp
import pytest

import flaxckpt
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


def test_a_function_that_picks_the_weights_may_collect(tmp_path):
    seen = []

    def weights(tree):
        seen.append(gc.isenabled())
        return tree["params"]

    with flaxckpt.ModelCheckpoint(tmp_path / "{epoch}", weights=weights) as ckpt:
        for epoch in range(2):
            ckpt.save({"params": jnp.ones(3), "step": jnp.ones(())}, epoch)
    assert seen
    assert all(seen)
