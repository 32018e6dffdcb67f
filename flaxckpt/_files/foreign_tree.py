"""A tree that another library stored, and reads of its files that may fail."""

import contextlib
from collections.abc import Callable, Collection, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from flaxckpt._disk.open import NoFileError, is_damage, unreadable
from flaxckpt._runtime.failures import in_one_line
from flaxckpt._trees.layout import Layout
from flaxckpt._trees.ties import PyTree
from flaxckpt._trees.wanted import Wanted, is_of_jax
from flaxckpt.errors import CheckpointCorruptError, CheckpointError

_LEVELS = 100  # of dicts and lists in a file, at most


@dataclass(frozen=True)
class ForeignTree:
    """A tree that another library stored.

    Attributes:
        layout: Its structure, and what its leaves are.
        read: Reads the leaf with an index in the layout, for a wanted form. It returns
            an array of the stored dtype, on the host or on the wanted sharding, or
            another value.
        expect: Gets the indexes of all leaves that will be read, before the first.
    """

    layout: Layout
    read: Callable[[int, Wanted], Any]
    expect: Callable[[Collection[int]], None] = lambda _: None


@contextlib.contextmanager
def reading(path: Path) -> Generator[None]:
    """Turn what another library raises about a file into flaxckpt's errors.

    A library has many exceptions for a damaged file, and names few of them.

    Raises:
        CheckpointCorruptError: If the file cannot be read.
        CheckpointPathError: If this process may not read it.
    """
    try:
        yield
    except (CheckpointError, MemoryError, RecursionError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and not is_damage(error):
            raise unreadable(path, error) from error
        is_ours = isinstance(error, NoFileError)
        problem = str(error) if is_ours else in_one_line(error)
        raise CheckpointCorruptError(str(path), problem) from error


def check_depth(tree: PyTree) -> None:
    """Check that a tree of dicts and lists is not nested too deeply for JAX to walk.

    JAX's error would be one that no caller can handle.

    Raises:
        NoFileError: If it is.
    """
    level: list[Any] = [tree]
    for _ in range(_LEVELS):
        level = [child for node in level for child in _children(node)]
    if level:
        raise NoFileError("its tree is nested more deeply than can be read")


def _children(node: Any) -> Iterable[Any]:
    if isinstance(node, dict):
        return node.values()
    return node if isinstance(node, list | tuple) else ()


def is_numeric(dtype: Any) -> bool:
    """Tell whether a dtype is one of numbers or booleans that JAX knows by its name."""
    try:
        known = jnp.dtype(str(dtype))
    except TypeError:
        return False
    return jnp.issubdtype(known, jnp.number) or known == jnp.bool_


def kind_of(dtype: str) -> str:
    """Return the kind of a file's array: `jax`, or `numpy` if JAX lacks the dtype.

    Without x64, JAX has no dtypes of 64 bits.
    """
    return "jax" if is_of_jax(dtype) else "numpy"
