"""The memory of the first copies is tried out before the first save takes it."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flaxckpt._copies import programs as _programs
from flaxckpt._copies.blank import Blank, blank_copies
from flaxckpt._copies.on_device import copy_on_device
from flaxckpt._copies.plan import MOST_TOGETHER, Plan, kinds_of
from flaxckpt._copies.programs import Program


@pytest.fixture
def leaves():
    """Three batches, of which two have the same program."""
    _programs.program.cache_clear()
    devices = jax.devices()
    sharding = NamedSharding(jax.make_mesh((len(devices),), ("d",)), PartitionSpec("d"))
    with jax.enable_x64(True):
        many = [
            jax.device_put(np.full((8, 2100), i, np.float64), sharding)
            for i in range(2 * MOST_TOGETHER)
        ]
    others = jnp.ones(3, bool), jnp.ones((0, 2)), jnp.ones(70_000, jnp.bfloat16)
    return [*many, *others, *(jnp.full(5, i) for i in range(6))]


@pytest.fixture
def blank(leaves):
    blank, plan = Blank(), Plan(kinds_of(leaves))
    blank.keep(blank_copies(plan))
    for batch in plan.batches:
        batch.program.compile(1)
    return blank


@pytest.fixture
def calls(monkeypatch):
    """The programs that were called to refill."""
    original, called = Program.refill, []

    def refill(self, *arguments):
        called.append(self)
        return original(self, *arguments)

    monkeypatch.setattr(Program, "refill", refill)
    return called


def where(copies):
    shards = [shard for each in copies.arrays for shard in each.addressable_shards]
    return [shard.data.unsafe_buffer_pointer() for shard in shards if shard.data.size]


def test_each_program_is_called_once_and_copies_into_that_memory(leaves, blank, calls):
    before, plan = where(blank._copies), blank._copies.plan
    blank.try_out()
    assert len(plan.batches) == 3
    assert len(calls) == len(set(calls)) == 2
    copies = blank.take()
    assert copies.is_blank
    assert where(copies) == before
    saved = copy_on_device(leaves, copies, plan)
    assert where(saved) == before
    for leaf, copy in zip(leaves, saved.leaves(), strict=True):
        assert copy.dtype == leaf.dtype
        assert np.array_equal(copy, leaf)


def test_what_is_copied_there_takes_no_memory_of_its_own(blank, monkeypatch):
    original, read = Program.refill, []

    def refill(self, alone, packs, *others):
        for each in (alone, *packs):
            read.extend(array for array in each if array.size)
        return original(self, alone, packs, *others)

    monkeypatch.setattr(Program, "refill", refill)
    blank.try_out()
    shards = [shard for each in read for shard in each.addressable_shards]
    places = {shard.data.unsafe_buffer_pointer() for shard in shards}
    assert len(shards) > MOST_TOGETHER
    assert len(places) <= 3  # one for each call of `_zeros`


@pytest.mark.parametrize("deletes", [False, True])
def test_memory_that_is_whole_outlives_a_failure(blank, monkeypatch, deletes):
    def fail(self, alone, packs, earlier, is_wanted):
        if deletes:
            earlier[0].delete()
        raise MemoryError

    monkeypatch.setattr(Program, "refill", fail)
    given = blank._copies
    with pytest.raises(MemoryError):
        blank.try_out()
    assert blank.take() is (None if deletes else given)


def test_a_save_waits_for_the_memory_meanwhile(blank, monkeypatch):
    original, inside, goes_on = Program.refill, threading.Event(), threading.Event()

    def refill(self, *arguments):
        inside.set()
        assert goes_on.wait(60)
        return original(self, *arguments)

    monkeypatch.setattr(Program, "refill", refill)
    taken = []
    trying = threading.Thread(target=blank.try_out)
    trying.start()
    assert inside.wait(60)
    taking = threading.Thread(target=lambda: taken.append(blank.take()))
    taking.start()
    taking.join(0.2)
    assert not taken
    goes_on.set()
    trying.join()
    taking.join()
    assert not any(array.is_deleted() for array in taken[0].arrays)


def test_there_need_be_no_memory():
    blank = Blank()
    blank.try_out()
    assert blank.take() is None
