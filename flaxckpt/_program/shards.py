"""Which part of a leaf each device hands over."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

Mesh: TypeAlias = jax.sharding.Mesh | AbstractMesh
Cut: TypeAlias = tuple[slice, ...] | None


@dataclass(frozen=True)
class Place:
    """How a leaf is sharded."""

    mesh: Mesh
    spec: PartitionSpec


def place_of(leaf: Any, sharding: Any) -> Place | None:
    """Tell how a value of a trace is sharded, if it tells, or else by what it was.

    Args:
        leaf: The value.
        sharding: That of the array which it stands for, as far as that is known.
    """
    if isinstance(leaf, jax.Array):
        own = jax.typeof(leaf).sharding
        if AxisType.Explicit in own.mesh.axis_types:
            return Place(own.mesh, own.spec)
    if isinstance(sharding, NamedSharding):
        try:
            sharding.shard_shape(leaf.shape)
        except (ValueError, AttributeError):  # it is another array by now
            return None
        return Place(sharding.mesh, sharding.spec)
    return None


def common(meshes: Sequence[Mesh]) -> Mesh | None:
    """Return the mesh of several devices that all are, if they are the same."""
    found: dict[Any, Mesh] = {}
    for mesh in meshes:
        abstract = mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh
        if abstract not in found or abstract is not mesh:
            found[abstract] = mesh  # one that has devices, if there is one
    if len(found) != 1:
        return None
    (mesh,) = found.values()
    return mesh if mesh.size > 1 else None


def cut_of(
    shape: tuple[int, ...],
    spec: PartitionSpec,
    sizes: Mapping[str, int],
    at: Mapping[str, int],
) -> Cut:
    """Return what part of an array a device holds, None if another one holds it too.

    Args:
        shape: The array's.
        spec: How it is sharded.
        sizes: The mesh's, by its axes.
        at: Where in the mesh the device is.
    """
    parts: list[slice] = []
    others = set(sizes)
    for position, size in enumerate(shape):
        axes = spec[position] if position < len(spec) else None
        axes = () if axes is None else (axes,) if isinstance(axes, str) else axes
        block, blocks = 0, 1
        for axis in axes:
            block, blocks = block * sizes[axis] + at[axis], blocks * sizes[axis]
            others.discard(axis)
        parts.append(slice(size // blocks * block, size // blocks * (block + 1)))
    return None if any(at[axis] for axis in others) else tuple(parts)
