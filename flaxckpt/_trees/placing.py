"""Where the leaves of a wanted tree go: shardings, and the mesh with the devices.

`jax.eval_shape` names the axes of a mesh and none of its devices. The mesh that the
caller has set, with `jax.set_mesh` or `with mesh:`, has the devices.
"""

import contextlib
from typing import Any, TypeGuard

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

from flaxckpt._runtime.jax_internals import entered_mesh


class AsStored:
    """Stands for a leaf that is wanted as it is stored."""


def is_placement(leaf: Any) -> TypeGuard[Sharding | PartitionSpec | AsStored]:
    """Tell whether a leaf only says where a value goes, or not even that."""
    return isinstance(leaf, Sharding | PartitionSpec | AsStored)


def placed(sharding: Any) -> Any:
    """Return a sharding on devices.

    Args:
        sharding: A sharding, which may be on a mesh without devices, or a
            `PartitionSpec`, which goes on the mesh that is set; None gives None.

    Raises:
        ValueError: If the sharding names no devices, and the caller has set no mesh, or
            no mesh with the same axes.
    """
    if isinstance(sharding, PartitionSpec):
        mesh = next(iter(_meshes()), None)
        if mesh is None:
            raise ValueError(
                "a PartitionSpec, and no mesh is set; pass a NamedSharding, or call "
                "within jax.set_mesh(mesh)"
            )
        return NamedSharding(mesh, sharding)
    if not isinstance(getattr(sharding, "mesh", None), AbstractMesh):
        return sharding
    for mesh in _meshes():
        if dict(mesh.shape) == dict(sharding.mesh.shape):
            kind = sharding.memory_kind
            return NamedSharding(mesh, sharding.spec, memory_kind=kind)
    axes = ", ".join(f"{name}={size}" for name, size in sharding.mesh.shape.items())
    raise ValueError(
        "a ShapeDtypeStruct whose sharding names no devices (its mesh is an "
        "AbstractMesh); call within jax.set_mesh(mesh) with a mesh of the same axes "
        f"({axes}), or give it the sharding on a mesh of devices"
    )


def _meshes() -> list[Mesh]:
    """Return the meshes that the caller has set in this thread."""
    found: list[Mesh | None] = []
    with contextlib.suppress(ValueError):  # within a trace
        found.append(jax.sharding.get_mesh())
    found.append(entered_mesh())
    return [mesh for mesh in found if mesh is not None and not mesh.empty]
