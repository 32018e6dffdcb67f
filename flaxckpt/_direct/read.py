"""A checkpoint's arrays are read straight into memory, and their chunks checked."""

import contextlib
import functools
import math
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import jax
import numpy as np

from flaxckpt._copies.memory_kinds import part_of
from flaxckpt._direct.sources import (
    Database,
    Files,
    Sourced,
    Store,
    array_of,
    first_chunk,
    outlined,
    stored_of,
)
from flaxckpt._direct.zarr import (
    DESCRIPTION,
    MANIFEST,
    NUMBERS,
    STATE,
    STRINGS,
    UNREADABLE,
    Array,
    OtherwiseError,
    ZarrArray,
    aligned,
    below,
)
from flaxckpt._disk.open import is_there
from flaxckpt._disk.zarr_json import parse_texts, parse_zarr
from flaxckpt._object_store.source import Source
from flaxckpt._trees.digest import agrees, checksum_in
from flaxckpt._trees.leaf import Leaf
from flaxckpt.errors import CheckpointPathError

F = TypeVar("F", bound=Callable[..., Any])
Bounds: TypeAlias = tuple[tuple[int, int], ...]  # start and stop on each axis


def _or_else(result: Any) -> Callable[[F], F]:
    """Decorate a function to return `result` if what it reads is incomplete or unknown.

    It still raises if this process may not read the files.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except CheckpointPathError:
                raise
            except UNREADABLE:
                return result

        return cast("F", run)

    return decorate


class Reader:
    """Reads leaves of a checkpoint without Orbax. Several threads may use it.

    Attributes:
        is_database: Whether the arrays are in a database, and not in files.
    """

    def __init__(self, directory: Path, source: Source | None = None) -> None:
        """Find out whether the arrays are in files or in a database.

        Args:
            directory: The checkpoint.
            source: The store that has the files missing from the directory; None if
                no file is missing.

        Raises:
            ValueError: If the database cannot be opened.
            CheckpointPathError: If this process cannot read the checkpoint.
        """
        state = directory / STATE
        self._texts: dict[str, str] | None = None
        self._files = Files(state) if source is None else Sourced(source)
        self.is_database = is_there(state / MANIFEST)
        if source is not None and source.read(f"{STATE}/{MANIFEST}") is not None:
            source.complete()
            self.is_database = True
        try:
            self._store = Database(state) if self.is_database else self._files
        except OtherwiseError as error:
            raise ValueError("its database cannot be opened") from error

    @_or_else(False)
    def knows(self, leaf: Leaf) -> bool:
        """Tell whether `read` knows the way in which a leaf is stored."""
        return leaf.is_text or stored_of(self._store, leaf) is not None

    def describes_any(self, leaves: Iterable[Leaf]) -> bool:
        """Tell whether an array has a description in Zarr 3.

        None has one in a checkpoint that an Orbax of another format has written.
        """
        for leaf in leaves:
            with contextlib.suppress(*UNREADABLE):
                if self._store.has(below(leaf.stored_name, DESCRIPTION), None):
                    return True
        return False

    @_or_else(True)
    def contradicts(self, leaf: Leaf) -> bool:
        """Tell whether a leaf is missing, or stored with another shape or dtype."""
        if not leaf.in_orbax:
            return False
        if leaf.is_text:
            self._text(leaf)
            return False
        found = parse_zarr(self._store.read(below(leaf.stored_name, DESCRIPTION)))
        return (found.shape, found.dtype) != array_of(leaf)

    @property
    def most_at_once(self) -> int:
        """Of how many leaves `expecting` reads values at once; 0 for none."""
        return self._store.most_at_once

    @contextlib.contextmanager
    def expecting(
        self, leaves: Iterable[Leaf], *, values: bool = True
    ) -> Generator[None]:
        """Read at once what the block will `read`, or without `values` what it `holds`.

        A database answers many requests in hardly more time than one request.
        """
        if not isinstance(self._store, Database):
            yield
            return
        arrays = [leaf for leaf in leaves if not leaf.is_text]
        arrays = arrays[: self.most_at_once if values else None]
        keys = [below(leaf.stored_name, DESCRIPTION) for leaf in arrays]
        keys += [first_chunk(leaf) for leaf in arrays if values]
        try:
            self._store.expect(keys)
            yield
        finally:
            self._store.forget(keys)

    @_or_else(False)
    def holds(self, leaf: Leaf) -> bool:
        """Tell whether all files of a leaf are there, with the sizes they should have.

        Reads no values, and a database tells no sizes. Also False if the way in which
        the leaf is stored is not known.
        """
        if leaf.is_text:
            self._text(leaf)
            return True
        stored, nbytes = outlined(self._store, leaf)
        return all(self._store.has(key, nbytes) for key, _ in stored.keys())

    def read(self, leaf: Leaf, *, check: bool) -> tuple[Any, bool]:
        """Read a leaf to the host.

        Args:
            leaf: The leaf.
            check: Whether to compare the values with the recorded checksums or digest.

        Returns:
            The values, in memory that JAX on CPU need not copy, and whether they are
            what was saved, as far as that was checked. PRNG keys come as their data.
            The values are None if they are incomplete, or stored in a way that is not
            known here; the caller can have Orbax read them.
        """
        if leaf.is_text:
            return self._read_text(leaf, check=check)
        recorded = _sums(leaf)
        found = read(self._store, leaf, check=check and bool(recorded))
        if found is None:
            return None, True
        _, values, sums = found
        is_same = True
        if check and recorded:
            is_same = recorded == sums
        elif check and leaf.digest:
            is_same = agrees(values, leaf.digest)
        is_number = leaf.kind in NUMBERS and not leaf.shape
        return (values.item() if is_number else values), is_same

    @_or_else((None, True))
    def read_onto(
        self, leaf: Leaf, sharding: jax.sharding.Sharding, *, check: bool
    ) -> tuple[jax.Array | None, bool | None]:
        """Read an array onto this process's devices, without any other process.

        Args:
            leaf: The array.
            sharding: The array's sharding over all devices.
            check: Whether to compare the chunks with the recorded checksums.

        Returns:
            As `read`, but None for the check if no checksums of chunks are recorded:
            the whole array would be needed.
        """
        stored = stored_of(self._store, leaf)
        if stored is None:
            return None, True
        indices = sharding.addressable_devices_indices_map(stored.shape)
        places = {
            device: tuple(
                part.indices(size)[:2]
                for part, size in zip(index or (), stored.shape, strict=True)
            )
            for device, index in indices.items()
        }
        recorded = _sums(leaf)
        check = check and bool(recorded)
        parts, sums = _read_parts(self._store, stored, places.values(), check=check)
        array = jax.make_array_from_single_device_arrays(
            stored.shape,
            sharding,
            [
                jax.device_put(parts[at], part_of(sharding, device))
                for device, at in places.items()
            ],
            dtype=stored.dtype,
        )
        if not recorded:
            return array, None
        return array, all(
            recorded[position : position + 1] == (found,)
            for position, found in sums.items()
        )

    @_or_else((None, True))
    def _read_text(self, leaf: Leaf, *, check: bool) -> tuple[str | None, bool]:
        text = self._text(leaf)
        return text, not (check and leaf.digest) or agrees(text, leaf.digest)

    def _text(self, leaf: Leaf) -> str:
        if self._texts is None:
            file = STRINGS.removeprefix(f"{STATE}/")
            self._texts = parse_texts(self._files.read(file))
        return self._texts[leaf.stored_name]


def _sums(leaf: Leaf) -> tuple[str, ...]:
    """Return the recorded checksums of a leaf's chunks; empty if there are none."""
    whole = checksum_in(leaf.digest)
    return leaf.sums if whole is None else (whole,)


def _read_parts(
    store: "Store", stored: ZarrArray, bounds: Iterable[Bounds], *, check: bool
) -> tuple[dict[Bounds, Array], dict[int, str]]:
    """Read parts of an array, and each file at most once.

    Args:
        store: Where the array is.
        stored: How the array is stored.
        bounds: The parts' bounds.
        check: Whether to compute checksums.

    Returns:
        The parts, in memory that JAX on CPU need not copy, and the checksums of the
        chunks that were read, by their positions.
    """
    sizes = {
        where: math.prod(stop - start for start, stop in where) for where in bounds
    }
    store.check_room(stored.name, sum(sizes.values()) * stored.dtype.itemsize)
    parts = {
        where: aligned(tuple(stop - start for start, stop in where), stored.dtype)
        for where in sizes
    }
    sums: dict[int, str] = {}
    for position, (key, start) in enumerate(stored.keys()):
        own = tuple(
            (at, at + size) for at, size in zip(start, stored.chunk, strict=True)
        )
        overlaps = {where: _overlap(where, own) for where in parts}
        overlaps = {
            where: both
            for where, both in overlaps.items()
            if all(low < high for low, high in both)
        }
        if not overlaps:
            continue
        chunk = parts[own] if own in parts else np.empty(stored.chunk, stored.dtype)
        for found in store.read_into(key, chunk, check=check):
            sums[position] = found
        for where, both in overlaps.items():
            if where != own:
                parts[where][_within_part(both, where)] = chunk[_within_part(both, own)]
            sizes[where] -= math.prod(high - low for low, high in both)
    if any(sizes.values()):  # no chunk was read into some of the memory
        raise OtherwiseError
    return parts, sums


def _overlap(one: Bounds, other: Bounds) -> Bounds:
    pairs = zip(one, other, strict=True)
    return tuple((max(a[0], b[0]), min(a[1], b[1])) for a, b in pairs)


def _within_part(bounds: Bounds, part: Bounds) -> tuple[slice, ...]:
    pairs = zip(bounds, part, strict=True)
    return tuple(slice(low - at, high - at) for (low, high), (at, _) in pairs)


@_or_else(None)
def read(
    store: "Store", leaf: Leaf, *, check: bool = True
) -> tuple[ZarrArray, Array, tuple[str, ...]] | None:
    """Return how an array is stored, its values, and, if `check`, chunks' checksums.

    None if the array is incomplete, or stored in a way that is not known here.
    """
    stored = stored_of(store, leaf)
    if stored is None:
        return None
    if stored.is_one_chunk:
        nbytes = math.prod(stored.shape) * stored.dtype.itemsize
        store.check_room(stored.name, nbytes)
        values = aligned(stored.shape, stored.dtype)
        [(key, _)] = stored.keys()
        return stored, values, tuple(store.read_into(key, values, check=check))
    whole = tuple((0, size) for size in stored.shape)
    parts, sums = _read_parts(store, stored, [whole], check=check)
    return stored, parts[whole], tuple(sums.values())
