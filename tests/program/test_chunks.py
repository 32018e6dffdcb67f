"""`scan_in_chunks` does what one scan does, bit for bit."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import flaxckpt
from flaxckpt import SettingError, scan_in_chunks
from flaxckpt._program import chunked_scan as _chunked_scan


def adam_like(carry, x):
    w, m, key = carry
    key, use = jax.random.split(key)
    y = jnp.tanh(jax.random.normal(use, (4, 8)) @ w) + x["a"]
    grad = jnp.outer(y.mean(0), y.mean(0))
    m = 0.9 * m + 0.1 * grad
    w = w - 0.01 * m / (jnp.sqrt(jnp.abs(m)) + 1e-8)
    return (w, m, key), {"loss": (y**2).mean(), "x": x["i"]}


def counting(carry, _):
    return {"n": carry["n"] + 1, "odd": ~carry["odd"]}, None


def chaotic(carry, x):
    return 3.9 * carry * (1 - carry), (carry, carry > x)


def case(name, length):
    if name == "adam":
        carry = jnp.eye(8), jnp.zeros((8, 8)), jax.random.key(0)
        xs = {"a": jnp.linspace(0, 1, length), "i": jnp.arange(length)}
        return adam_like, carry, xs
    if name == "counting":
        return counting, {"n": jnp.int32(0), "odd": jnp.array(False)}, None
    return chaotic, jnp.full(3, 0.3), jnp.linspace(0, 1, length)


def assert_equal(found, expected):
    plain = lambda x: (  # noqa: E731
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    )
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        assert one.dtype == other.dtype
        assert np.asarray(plain(one)).tobytes() == np.asarray(plain(other)).tobytes()


@given(
    st.sampled_from(["adam", "counting", "chaotic"]),
    st.integers(1, 23),
    st.integers(1, 9),
    st.data(),
)
@settings(max_examples=60)
def test_the_same_as_one_scan(name, length, chunk, data):
    """Also in a run that was stopped after some steps, and goes on from there."""
    body, carry, xs = case(name, length)
    expected, ys = jax.lax.scan(body, carry, xs, length)
    stop = data.draw(st.integers(0, length))
    first = carry
    if stop:
        first = jax.lax.scan(body, carry, jax.tree.map(lambda x: x[:stop], xs), stop)[0]
    parts = []
    for part in scan_in_chunks(body, first, xs, length, chunk=chunk, start=stop):
        parts.append((part.start, part.stop, part.ys))
        last = part.carry
    if stop == length:
        assert not parts
        return
    assert_equal(last, expected)
    assert parts[0][0] == stop
    assert parts[-1][1] == length
    assert all(end - begin <= chunk for begin, end, _ in parts)
    joined = jax.tree.map(lambda *each: jnp.concatenate(each), *[p[2] for p in parts])
    assert_equal(joined, jax.tree.map(lambda y: y[stop:], ys))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(carry))


def test_all_chunks_are_one_program():
    body, carry, xs = case("chaotic", 10)
    before = _chunked_scan._run._cache_size()
    for _ in range(2):
        for _ in scan_in_chunks(body, carry, xs, chunk=4):
            pass
    assert _chunked_scan._run._cache_size() - before <= 1


def test_carries_are_donated_to_the_next_chunk():
    body, carry, xs = case("chaotic", 10)
    carries = [part.carry for part in scan_in_chunks(body, carry, xs, chunk=4)]
    assert [c.is_deleted() for c in carries] == [True, True, False]
    assert not carry.is_deleted()


def test_saved_between_chunks_it_is_resumed(tmp_path):
    body, carry, xs = case("adam", 20)
    expected, _ = jax.lax.scan(body, carry, xs)
    filepath = tmp_path / "{batch}"
    with flaxckpt.ModelCheckpoint(filepath, "loss", save_freq=6, max_to_keep=2) as ckpt:
        state = ckpt.init()
        for part in scan_in_chunks(body, carry, xs, chunk=3):
            logs = {"loss": part.ys["loss"][-1]}
            state = ckpt.update(state, part.carry, logs, 0, part.stop - 1)
            if part.stop == 15:
                break
    with flaxckpt.ModelCheckpoint(filepath, save_freq=6) as ckpt:
        found = ckpt.restore(like=carry)
        assert found.batch == 11
        for part in scan_in_chunks(body, found.tree, xs, chunk=5, start=12):
            last = part.carry
    assert_equal(last, expected)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"chunk": 0}, "chunk"),
        ({"chunk": True}, "chunk"),
        ({"chunk": 2.5}, "chunk"),
        ({"chunk": 2, "start": -1}, "start"),
        ({"chunk": 2, "start": 9}, "start"),
        ({"chunk": 2, "length": 7}, "length"),
        ({"chunk": 2, "xs": None}, "length"),
        ({"chunk": 2, "xs": (jnp.ones(3), jnp.ones(4))}, "xs"),
        ({"chunk": 2, "xs": 1.0}, "xs"),
    ],
)
def test_bad_numbers_are_refused_at_once(arguments, name):
    given = {"xs": jnp.ones(8), **arguments}
    with pytest.raises(SettingError, match=name):
        scan_in_chunks(chaotic, jnp.ones(3), **given)


def test_a_body_that_returns_no_pair_is_named():
    with pytest.raises(TypeError, match="must be a pair"):
        next(scan_in_chunks(lambda carry, x: carry, 0, jnp.arange(3), chunk=2))


@pytest.mark.parametrize(("carry", "dtype"), [(0, jnp.float32), (0.0, jnp.bfloat16)])
def test_numbers_become_what_a_scan_makes_of_them(carry, dtype):
    xs = jnp.arange(5).astype(dtype)

    def body(total, x):
        return total + x, total

    expected = jax.lax.scan(body, carry, xs)
    parts = list(scan_in_chunks(body, carry, xs, chunk=2))
    assert_equal(parts[-1].carry, expected[0])
    assert_equal(jnp.concatenate([part.ys for part in parts]), expected[1])


@pytest.mark.parametrize(
    ("carry", "body"),
    [
        # A weak number that stays one, beside arrays that it must not promote.
        (
            (0.5, jnp.ones(3, jnp.bfloat16)),
            lambda c, x: ((c[0] * 0.9, c[1] - c[0] * x.astype(jnp.bfloat16)), c[1]),
        ),
        (3, lambda n, x: (n + 1, x.astype(jnp.uint8) + 250 + n)),
        # One that the body makes strong, of the same dtype: a scan still gives it weak.
        (0.5, lambda c, x: (c * jnp.float32(0.9), x.astype(jnp.bfloat16) * c)),
    ],
)
def test_weak_numbers_stay_weak_in_all_chunks(carry, body):
    xs = jnp.arange(7.0)
    expected = jax.lax.scan(body, carry, xs)
    parts = list(scan_in_chunks(body, carry, xs, chunk=2))
    assert_equal(parts[-1].carry, expected[0])
    assert_equal(jnp.concatenate([part.ys for part in parts]), expected[1])


def test_a_method_is_what_its_object_is_now():
    class Trainer:
        rate = 1.0

        def step(self, carry, x):
            return carry + self.rate * x, None

        def __eq__(self, other):
            return isinstance(other, Trainer)

        def __hash__(self):
            return 0

    trainer, found = Trainer(), []
    for trainer.rate in (1.0, 2.0):
        for part in scan_in_chunks(trainer.step, 0.0, jnp.ones(4), chunk=2):
            last = part.carry
        found.append(float(last))
    assert found == [4.0, 8.0]


def test_a_chunk_longer_than_the_run_takes_no_more_memory():
    (part,) = scan_in_chunks(lambda n, x: (n, x), 0, np.arange(3.0), chunk=10**13)
    assert part.ys.tolist() == [0, 1, 2]
