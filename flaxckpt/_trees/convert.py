"""Conversion of loaded values to the wanted kinds: keys, numbers, texts, arrays."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxckpt._runtime.jax_internals import put_alike
from flaxckpt._trees.describe import impl_of
from flaxckpt._trees.integers import int_of
from flaxckpt._trees.leaf import ARRAYS, PYTHON, STORED_DTYPES, Leaf, key_numbers
from flaxckpt._trees.stateful import STATEFUL, decoded_state
from flaxckpt._trees.wanted import Wanted


def convert(value: Any, have: Leaf, want: Wanted, *, cast: bool) -> Any:
    """Convert a loaded value to the wanted form; `match` has compared the two kinds.

    An array for `want.sharding` stays where it is, and only its dtype changes:
    `put_on_shardings` moves it.

    Raises:
        ValueError: If a Python number does not fit the wanted dtype exactly, and `cast`
            does not allow that. It never allows a NaN or an infinity as an integer.
            Also if the wanted type of a number or text refuses the value.
        OverflowError: If `cast` is to make a Python integer of an infinity.
    """
    kind = want.leaf.kind
    own: Callable[[Any], Any] = want.type or (lambda value: value)
    if 0 in have.shape and not have.rows:
        value = _empty(have, want.sharding)
    if have.kind == "bytes":
        return np.asarray(value).tobytes()
    if have.kind == STATEFUL:
        return decoded_state(np.asarray(value))
    if have.kind == "str" and not have.is_text:
        return own(np.asarray(value).tobytes().decode(errors="surrogatepass"))
    if have.kind == "int" and have.dtype and not have.rows:
        value = int_of(np.asarray(value))
    if kind == "key":
        if want.sharding is None:
            data = jnp.asarray(np.asarray(jax.random.key_data(value)))  # uncommitted
            return jax.random.wrap_key_data(data, impl=impl_of(value))
        is_elsewhere = value.sharding.memory_kind != want.sharding.memory_kind
        return jax.device_put(value, want.sharding) if is_elsewhere else value
    if kind not in ARRAYS:
        if have.kind not in ARRAYS and have.kind != "complex" and have.kind == kind:
            return own(value)
        number = np.asarray(value).item()
        return own(PYTHON[kind](number) if cast else number)
    dtype = jnp.dtype(want.leaf.dtype)
    if have.kind not in ARRAYS:
        exact = np.asarray(value)
        if exact.dtype == object:
            raise ValueError(f"{value} does not fit {dtype}")
        if jnp.issubdtype(dtype, jnp.integer) and not np.isfinite(exact):
            raise ValueError(f"{exact.item()!r} does not fit {dtype}")
        value = exact.astype(dtype)
        same = value == exact or (value != value and exact != exact)
        if not (cast or want.is_weak or same):
            raise ValueError(f"{exact.item()!r} does not fit {dtype} exactly")
    elif value.dtype != dtype:
        value = value.astype(dtype)
    if kind == "numpy":
        return np.asarray(value)
    if kind == "numpy_scalar":
        return np.asarray(value)[()]
    is_left = want.sharding is not None or isinstance(value, jax.Array)
    return value if is_left else jnp.asarray(value)


def put_on_shardings(leaves: list[Any], wanted: Mapping[int, Wanted]) -> None:
    """Put converted leaves onto the shardings of those that want one.

    One call of `device_put` puts one host array of each shape, dtype and sharding, and
    all other arrays. `put_alike` puts the rest: JAX takes several times as long to put
    an array of a new kind. Of a host array for several processes each puts its shards:
    `device_put` would have all processes compare the array, in a collective.
    """
    shardings = {
        position: want.sharding
        for position, want in wanted.items()
        if want.sharding is not None and want.leaf.kind == "jax"
    }
    groups: dict[Any, list[int]] = {}
    for at, sharding in shardings.items():
        if not (sharding.is_fully_addressable or isinstance(leaves[at], jax.Array)):
            leaves[at] = put_own_shards(np.asarray(leaves[at]), sharding)
            continue
        group: Any = at
        if type(leaves[at]) is np.ndarray and wanted[at].is_in_one_piece:
            group = leaves[at].shape, leaves[at].dtype, sharding
        groups.setdefault(group, []).append(at)
    firsts = [group[0] for group in groups.values()]
    values = [leaves[at] for at in firsts]
    placed = jax.device_put(values, [shardings[at] for at in firsts])
    for array, (first, *others) in zip(placed, groups.values(), strict=True):
        leaves[first] = array
        if others:
            alike = put_alike([leaves[at] for at in others], array, shardings[first])
            for at, each in zip(others, alike, strict=True):
                leaves[at] = each


def put_own_shards(value: np.ndarray[Any, Any], sharding: Any) -> jax.Array:
    """Put a host array, which all processes have, on devices of several processes."""
    return jax.make_array_from_callback(
        value.shape, sharding, value.__getitem__, dtype=value.dtype
    )


def _empty(leaf: Leaf, sharding: Any) -> Any:
    """Make an array without elements; if it is of keys, put it on the sharding."""
    if leaf.kind != "key":
        return np.zeros(leaf.shape, jnp.dtype(leaf.dtype))
    data = np.zeros((*leaf.shape, *key_numbers(leaf.impl)), STORED_DTYPES["key"])
    placed = jnp.asarray(data) if sharding is None else put_own_shards(data, sharding)
    return jax.random.wrap_key_data(placed, impl=leaf.impl)
