"""One leaf of a tree, as the table of leaves describes it."""

import functools
import math
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp

from flaxckpt._trees.skeleton import FROM_LIKE

ARRAYS = ("jax", "numpy", "numpy_scalar")  # kinds of leaves that have their own dtype
PLACED = "any value"  # wanted as it is stored, with a sharding from `like`
STORED = "stored"  # wanted as it is stored
SCALARS: dict[Any, str] = {bool: "bool", int: "int", float: "float", complex: "complex"}
PYTHON: dict[str, Any] = {name: kind for kind, name in SCALARS.items()}
STORED_DTYPES = {  # of leaves that have no dtype of their own, and of key data
    "bool": "bool",
    "int": "int64",
    "float": "float64",
    "complex": "complex128",
    "key": "uint32",
}


@dataclass(frozen=True)
class Leaf:
    """The description of one leaf of a stored tree.

    Attributes:
        path: Names from the root to the leaf.
        kind: `jax`, `key` (a typed PRNG key array), `numpy`, `numpy_scalar`, `bool`,
            `int`, `float`, `complex`, `str`, `bytes`, `state` (of an object; see
            `stateful`). An `int` that int64 does not hold
            and a `str` that UTF-8 does not encode have a dtype. Leaves of two more
            kinds are not stored: `function`, and `static`, which is a leaf of an
            Equinox module that is no array, number or text.
        dtype: Name of the dtype, for arrays and keys.
        shape: Shape, for arrays and keys.
        impl: Name of the PRNG implementation, for keys.
        digest: Fingerprint of the value that was saved; see `digest`.
        sums: Checksums of its files, in order; empty if they are not known.
        stored: The keys under which the store has it, if they differ from `path`: as
            many keys as `path` has, or a single key at the root; see `names`.
        rows: For a value that each process has for itself: the number of processes, and
            the width of the stored rows; see `per_process`. Else empty.
    """

    path: tuple[str, ...]
    kind: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    impl: str = ""
    digest: str = ""
    sums: tuple[str, ...] = ()
    stored: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The path as text."""
        return "/".join(self.path) or "(the tree itself)"

    @property
    def stored_path(self) -> tuple[str, ...]:
        """The keys under which the store has it."""
        return self.stored or self.path

    @property
    def stored_name(self) -> str:
        """The name under which the store has it."""
        return ".".join(self.stored_path)

    @property
    def is_apart(self) -> bool:
        """Whether the store has it at the root, and not at its place in the tree."""
        return bool(self.stored) and len(self.stored) != len(self.path)

    @property
    def is_text(self) -> bool:
        """Whether it is stored as text; text that UTF-8 cannot encode is an array."""
        return self.kind == "str" and not self.dtype and not self.rows

    @property
    def is_bytes(self) -> bool:
        """Whether it is stored as bytes, as many as its value takes."""
        return self.kind in ("str", "bytes", "state") or (
            self.kind == "int" and self.shape != ()
        )

    @property
    def stored_dtype(self) -> str:
        """Name of the dtype of its array in the store; empty for text."""
        has_own = self.dtype and self.kind != "key"
        return self.dtype if has_own else STORED_DTYPES.get(self.kind, "")

    @property
    def in_orbax(self) -> bool:
        """Whether Orbax stores it: Orbax takes no arrays without elements."""
        return bool(self.rows) or not (self.is_from_like or 0 in self.shape)

    @property
    def as_stored(self) -> "Leaf":
        """The leaf that the store has in place of this one."""
        if not self.rows:
            return self
        of_rows = {"kind": "numpy", "dtype": "uint8", "shape": self.rows, "rows": ()}
        return replace(self, impl="", **of_rows)

    @property
    def is_from_like(self) -> bool:
        """Whether it is not a value: a load takes it from `like`."""
        return self.kind in FROM_LIKE

    @property
    def nbytes(self) -> int:
        """Bytes of its values in memory; 16 for each key, Python scalar or text."""
        return _nbytes("" if self.kind == "key" else self.dtype, self.shape)

    def __str__(self) -> str:
        if self.kind not in (*ARRAYS, "key"):
            return self.kind
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@functools.lru_cache(maxsize=1024)
def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * jnp.dtype(dtype or "complex128").itemsize


LEAF_FIELDS = frozenset(each.name for each in fields(Leaf))


@functools.lru_cache(maxsize=256)
def is_of_keys(dtype: Any) -> bool:
    """Tell whether arrays of a dtype hold typed PRNG keys."""
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


def without_keys(leaf: Any) -> Any:
    """Return a leaf, or the key data of a leaf of typed PRNG keys."""
    if isinstance(leaf, jax.Array) and is_of_keys(leaf.dtype):
        return jax.random.key_data(leaf)
    return leaf


@functools.lru_cache(maxsize=16)
def key_numbers(impl: str) -> tuple[int, ...]:
    """Return the shape of the key data of one PRNG key of an implementation."""
    key = functools.partial(jax.random.key, 0, impl=impl)
    return jax.eval_shape(lambda: jax.random.key_data(key())).shape


@functools.lru_cache(maxsize=16)
def key_dtype(impl: str) -> Any:
    """Return the dtype of typed PRNG keys of an implementation."""
    return jax.eval_shape(lambda: jax.random.key(0, impl=impl)).dtype
