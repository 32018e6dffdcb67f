"""Whether devices have room for a copy."""

import jax
import jax.numpy as jnp
import pytest

from flaxckpt._copies.on_host import fits_on_device

NBYTES = 4 * 1024


@pytest.fixture
def limit(monkeypatch):
    """Let each device tell that it has room for so many bytes."""

    def set_limit(nbytes):
        stats = {"bytes_limit": nbytes, "bytes_in_use": 0}
        kind = type(jax.devices()[0])
        monkeypatch.setattr(kind, "memory_stats", lambda self: stats)

    return set_limit


@pytest.mark.parametrize(
    ("spec", "part"), [(("x", "y"), 4), (("x",), 2), ((None, "y"), 2), ((), 1)]
)
def test_each_device_needs_room_for_its_shard(limit, spec, part):
    mesh = jax.make_mesh((2, 2), ("x", "y"), devices=jax.devices()[:4])
    sharding = jax.sharding.NamedSharding(mesh, jax.P(*spec))
    array = jax.device_put(jnp.zeros((32, 32)), sharding)
    limit(2 * NBYTES // part)
    assert fits_on_device([array, array])
    limit(2 * NBYTES // part - 1)
    assert not fits_on_device([array, array])


def test_arrays_in_host_memory_need_none(limit):
    kind = jax.sharding.SingleDeviceSharding(
        jax.devices()[0], memory_kind="pinned_host"
    )
    array = jax.device_put(jnp.zeros((32, 32)), kind)
    limit(NBYTES)
    assert fits_on_device([array, array, jnp.zeros((32, 32)), 3])
    assert fits_on_device([jnp.zeros((0, 32))])
    assert not fits_on_device([jnp.zeros((32, 33))])
