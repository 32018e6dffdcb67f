"""`scan_in_chunks`: a scan that comes back to Python between its chunks.

So a loop can save without a callback in the program, and without slots.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from flaxckpt._copies.memory_kinds import copied, is_offloaded
from flaxckpt._decision.scalars import as_number
from flaxckpt._runtime.jax_internals import weakly_typed
from flaxckpt._runtime.unchecked import unchecked, unguarded
from flaxckpt._trees.ties import PyTree
from flaxckpt.errors import SettingError

Body: TypeAlias = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]


@dataclass(frozen=True)
class Chunk:
    """Some steps of a scan, done.

    Attributes:
        carry: The carry after these steps. The next chunk donates it: save it, or copy
            it, before going on.
        ys: What `body` returned for each of these steps, stacked as by `jax.lax.scan`.
        start: Index of the first of these steps.
        stop: Index of the first step after them.
    """

    carry: PyTree
    ys: PyTree
    start: int
    stop: int


def scan_in_chunks(
    body: Body,
    carry: PyTree,
    xs: PyTree = None,
    length: int | None = None,
    *,
    chunk: int,
    start: int = 0,
) -> Iterator[Chunk]:
    """Do what `jax.lax.scan` does, in jitted chunks, and come back after each.

    The result equals the result of one scan, bit for bit: one compiled program runs
    every chunk, a shorter last one, too.

    Args:
        body: As for `jax.lax.scan`: from carry and x to carry and y.
        carry: The first carry. Not donated.
        xs: Arrays to scan over, for the whole run; None with `length`.
        length: Number of steps of the whole run; may be None with `xs`.
        chunk: Steps in a chunk, at least 1.
        start: Steps that a resumed run has done already; `carry` is the carry after
            these steps.

    Yields:
        A `Chunk` after every `chunk` steps, and after the last step.

    Raises:
        SettingError: A `ValueError`, if a number cannot work, or if `xs` and `length`
            do not agree.

    Example:
        >>> body = lambda total, x: (total + x, total)
        >>> for part in scan_in_chunks(body, 0, jnp.arange(5), chunk=2):
        ...     print(part.start, part.stop, int(part.carry), part.ys.tolist())
        0 2 1 [0, 0]
        2 4 6 [1, 3]
        4 5 10 [6]
    """
    chunk = _number("chunk", chunk, 1)
    start = _number("start", start, 0)
    total = _length(xs, length)
    if start > total:
        raise SettingError("start", start, f"the run has {total} steps in all.")
    return _chunks(body, carry, xs, total, chunk, start)


def _chunks(
    body: Body, carry: PyTree, xs: PyTree, total: int, chunk: int, start: int
) -> Iterator[Chunk]:
    with unchecked():
        if start < total:
            carry = _promoted(body, carry, xs)
        weak = tuple(map(_is_weak, jax.tree.leaves(carry)))
        carry = _donatable(carry)
        xs = jax.tree.map(
            lambda x: x if isinstance(x, jax.Array) else jnp.asarray(x), xs
        )
    if inspect.ismethod(body):  # equal for `jit` although its object may have changed
        body = functools.partial(body)
    chunk = min(chunk, max(total, 1))
    for first in range(start, total, chunk):
        count = min(chunk, total - first)
        # `body` is the user's: `jax_debug_nans` and the like judge it as in a scan.
        with unguarded():
            carry, ys = _run(carry, xs, first, count, body=body, chunk=chunk, weak=weak)
        if count < chunk:
            with unchecked():
                ys = jax.tree.map(lambda y: y[:count], ys)  # noqa: B023  # called now
        yield Chunk(carry, ys, first, first + count)


def _promoted(body: Body, carry: PyTree, xs: PyTree) -> PyTree:
    """Give Python numbers the dtypes that `body` returns, as a scan does.

    Raise what a scan raises for a `body` that it does not take.
    """

    def one(carry: PyTree) -> PyTree:
        first = jax.tree.map(lambda x: x[:1], xs)
        return jax.lax.scan(body, carry, first, length=1)[0]

    def promoted(x: Any, want: Any) -> Any:
        x = x if hasattr(x, "dtype") else jnp.asarray(x)
        return x if x.dtype == want.dtype else jnp.asarray(x, want.dtype)

    return jax.tree.map(promoted, carry, jax.eval_shape(one, carry))


def _is_weak(x: Any) -> bool:
    return getattr(x, "weak_type", False)


def _donatable(carry: PyTree) -> PyTree:
    """Return a copy of a carry to donate, each leaf in the same kind of memory."""
    leaves, structure = jax.tree.flatten(carry)
    moved = [
        isinstance(leaf, jax.Array) and is_offloaded(leaf.sharding) for leaf in leaves
    ]
    own = [None if is_moved else leaf for leaf, is_moved in zip(leaves, moved)]  # noqa: B905
    copies = [
        copied(leaf) if is_moved else copy
        for leaf, is_moved, copy in zip(leaves, moved, _copied(own), strict=True)
    ]
    return structure.unflatten(copies)


@jax.jit
def _copied(carry: PyTree) -> PyTree:
    return jax.tree.map(jnp.copy, carry)


@functools.partial(
    jax.jit, static_argnames=("body", "chunk", "weak"), donate_argnames="carry"
)
def _run(
    carry: PyTree,
    xs: PyTree,
    first: Any,
    count: Any,
    *,
    body: Body,
    chunk: int,
    weak: tuple[bool, ...],
) -> tuple[PyTree, PyTree]:
    """Run `count` steps, at most `chunk`.

    As in a scan, a number that is weakly typed in the first step is so in every step.
    """
    leaves, structure = jax.tree.flatten(carry)
    carry = structure.unflatten(
        weakly_typed(leaf) if is_weak else leaf
        for leaf, is_weak in zip(leaves, weak, strict=True)
    )

    def x_of(index: Any) -> PyTree:
        pick = jax.lax.dynamic_index_in_dim
        return jax.tree.map(lambda x: pick(x, index, keepdims=False), xs)

    def step(index: Any, carried: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        carry, ys = carried
        carry, y = body(carry, x_of(first + index))
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, axis=0)
        return carry, jax.tree.map(lambda all, one: put(all, one, index=index), ys, y)

    _, y = jax.eval_shape(lambda carry: body(carry, x_of(first)), carry)
    ys = jax.tree.map(lambda y: jnp.zeros((chunk, *y.shape), y.dtype), y)
    return jax.lax.fori_loop(0, count, step, (carry, ys))


def _number(name: str, value: Any, least: int) -> int:
    number = as_number(value, otherwise=least - 1)
    if isinstance(value, bool) or number < least:
        raise SettingError(name, value, f"pass a number of steps of at least {least}.")
    return number


def _length(xs: PyTree, length: int | None) -> int:
    lengths = {jnp.shape(x)[:1] for x in jax.tree.leaves(xs)}
    if () in lengths or len(lengths) > 1:
        raise SettingError("xs", xs, "pass arrays whose first axes are equally long.")
    if length is not None:
        lengths.add((_number("length", length, 0),))
    if len(lengths) != 1:
        advice = "pass xs, or length, or both and let them agree."
        raise SettingError("length", length, advice)
    ((total,),) = lengths
    return total
