"""Which part of a leaf each device hands over."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

Mesh: TypeAlias = jax.sharding.Mesh | AbstractMesh
Cut: TypeAlias = tuple[slice, ...] | None


@dataclass(frozen=True)
class MeshSpec:
    """How a leaf is sharded."""

    mesh: Mesh
    spec: PartitionSpec


def mesh_spec_of(leaf: Any, sharding: Any) -> MeshSpec | None:
    """Return how a traced value is sharded; None if that is not known.

    Its type tells if its mesh has explicit axes. Otherwise `sharding` counts, if it
    fits.

    Args:
        leaf: The value.
        sharding: The sharding of the array that it stands for; None if not known.
    """
    if isinstance(leaf, jax.Array):
        own = jax.typeof(leaf).sharding
        if AxisType.Explicit in own.mesh.axis_types:
            return MeshSpec(own.mesh, own.spec)
    if isinstance(sharding, NamedSharding):
        try:
            sharding.shard_shape(leaf.shape)
        except (ValueError, AttributeError):  # the sharding is of another array
            return None
        return MeshSpec(sharding.mesh, sharding.spec)
    return None


def common(meshes: Sequence[Mesh]) -> Mesh | None:
    """Return the one mesh that all are; None if they differ or it has one device."""
    found: dict[Any, Mesh] = {}
    for mesh in meshes:
        abstract = mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh
        if abstract not in found or abstract is not mesh:
            found[abstract] = mesh  # preferably one that has devices
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
    """Return the part of an array that a device hands over, if it has any.

    Args:
        shape: The array's shape.
        spec: How the array is sharded.
        sizes: The sizes of the mesh's axes, by their names.
        at: The device's index along each axis.

    Returns:
        The part; None for a device with another replica.
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
