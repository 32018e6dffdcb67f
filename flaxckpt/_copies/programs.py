"""Programs that copy batches of arrays; batches of the same kinds share one."""

import functools
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from flaxckpt._runtime.locks import new_lock

# Shape, dtype and sharding of an array.
Kind: TypeAlias = tuple[tuple[int, ...], Any, jax.sharding.Sharding]
Kinds: TypeAlias = tuple[Kind, ...]


class Program:
    """Copies arrays one by one, and packs of small arrays into one array each.

    Attributes:
        alone: Kinds of the arrays that are copied one by one.
        packs: Kinds of the arrays of each pack.
        copy_kinds: The kind of each copy.
    """

    def __init__(self, alone: Kinds, packs: tuple[Kinds, ...]) -> None:
        """Compile nothing yet.

        Args:
            alone: Kinds of the arrays that are copied one by one.
            packs: Kinds of the arrays of each pack: of one dtype, on one device.
        """
        self.alone, self.packs = alone, packs
        self.copy_kinds = [*alone, *map(_pack_kind, packs)]
        self._shardings = [kind[2] for kind in self.copy_kinds]
        shardings = self._shardings, None
        jit = functools.partial(jax.jit, keep_unused=True, out_shardings=shardings)
        refills = jit(_refill, donate_argnums=3), jit(_refill_if, donate_argnums=3)
        self._jitted: tuple[Any, Any, Any] = jit(_fill), *refills
        self._programs: list[Any] = [*self._jitted]
        self._has_filled = False
        self._compiling = [new_lock() for _ in self._programs]

    def fill(self, alone: list[Any], packs: list[list[Any]]) -> list[jax.Array]:
        """Copy into new memory."""
        self._has_filled = True
        return self._call(0, alone, packs, self._work)

    def refill(
        self,
        alone: list[Any],
        packs: list[list[Any]],
        earlier: list[jax.Array],
        is_wanted: Any,
    ) -> list[jax.Array]:
        """Copy into the memory of earlier copies, which are deleted.

        Args:
            alone: The arrays that are copied one by one.
            packs: The arrays of each pack.
            earlier: Earlier copies of this program.
            is_wanted: `np.True_` to copy; otherwise a bool[] by which a device decides.
                If it decides not to copy, `earlier` is returned.
        """
        if is_wanted is np.True_:
            return self._call(1, alone, packs, self._work, earlier)
        return self._call(2, alone, packs, self._work, earlier, is_wanted)

    def _call(self, which: int, *arguments: Any) -> list[jax.Array]:
        with self._compiling[which]:
            program = self._programs[which]
        try:
            return program(*arguments)[0]
        except (TypeError, ValueError):
            if program is self._jitted[which]:
                raise
        # `compile` assumed the default layout of each array. The call that failed has
        # donated nothing.
        return self._jitted[which](*arguments)[0]

    def compile(self, which: int, is_wanted: Any = np.True_) -> None:
        """Compile now, on this thread; a call on another thread that needs it waits.

        What `fill` has compiled is not compiled again.

        Args:
            which: 0 for `fill`, 1 for `refill`, 2 for `refill` if a device decides.
            is_wanted: As for `refill`.
        """
        jitted, work = self._jitted[which], self._work  # it has a lock, too
        with self._compiling[which]:
            if self._programs[which] is not jitted or (not which and self._has_filled):
                return
            alone = [_struct(kind) for kind in self.alone]
            packs = [[_struct(kind) for kind in pack] for pack in self.packs]
            earlier = [_struct(kind) for kind in self.copy_kinds]
            arguments = alone, packs, work, earlier, is_wanted
            with jax.enable_x64(True):  # without it, JAX narrows 64-bit kinds
                self._programs[which] = jitted.lower(*arguments[: 3 + which]).compile()

    @functools.cached_property
    def _work(self) -> Any:
        """A matrix that is multiplied, so that JAX on CPU copies asynchronously.

        JAX on CPU runs a program of fewer than 1000 floating-point operations on the
        calling thread, and a copy has no such operations. XLA has a ready routine for
        the product; to compile a loop takes it 30 ms longer.
        """
        work, sharding = np.ones((16, 16), np.float32), self._shardings[0]
        if next(iter(sharding.device_set)).platform != "cpu":
            return None
        if isinstance(sharding, jax.sharding.NamedSharding):
            sharding = jax.sharding.NamedSharding(
                sharding.mesh, jax.sharding.PartitionSpec()
            )
        elif not isinstance(sharding, jax.sharding.SingleDeviceSharding):
            return work
        # `device_put` onto the whole sharding would compare the value in all processes,
        # and wait for them.
        parts = [jax.device_put(work, each) for each in sharding.addressable_devices]
        return jax.make_array_from_single_device_arrays(work.shape, sharding, parts)


@functools.lru_cache(maxsize=512)
def program(alone: Kinds, packs: tuple[Kinds, ...]) -> Program:
    """Return the program for a batch of these kinds."""
    return Program(alone, packs)


def _fill(
    alone: list[jax.Array], packs: list[list[jax.Array]], work: jax.Array | None
) -> tuple[list[jax.Array], jax.Array | None]:
    return _copied(alone, packs), _worked(work)


def _refill(
    alone: list[jax.Array],
    packs: list[list[jax.Array]],
    work: jax.Array | None,
    earlier: list[jax.Array],
) -> tuple[list[jax.Array], jax.Array | None]:
    del earlier  # the copies take its memory
    return _fill(alone, packs, work)


def _refill_if(
    alone: list[jax.Array],
    packs: list[list[jax.Array]],
    work: jax.Array | None,
    earlier: list[jax.Array],
    is_wanted: jax.Array,
) -> tuple[list[jax.Array], jax.Array | None]:
    # Not for each refill: on GPU the thread that calls a `cond` waits for the device.
    copies = jax.lax.cond(is_wanted, lambda: _copied(alone, packs), lambda: earlier)
    return copies, _worked(work)


def _worked(work: jax.Array | None) -> jax.Array | None:
    return None if work is None else jnp.matmul(work, work)


def _copied(
    alone: Sequence[jax.Array], packs: Sequence[Sequence[jax.Array]]
) -> list[jax.Array]:
    joined = [jnp.concatenate([each.reshape(-1) for each in pack]) for pack in packs]
    return [jnp.copy(array) for array in alone] + joined


def _pack_kind(pack: Kinds) -> Kind:
    """Return the kind of the array that a pack is copied into."""
    return (sum(math.prod(kind[0]) for kind in pack),), *pack[0][1:]


def _struct(kind: Kind) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(kind[0], kind[1], sharding=kind[2])
