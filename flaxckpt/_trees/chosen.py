"""The leaves of a tree that a user's filter chooses."""

import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import jax

from flaxckpt._trees.remembered import Remembered
from flaxckpt._trees.skeleton import key_of
from flaxckpt._trees.ties import PyTree, flatten, nodes_with_paths
from flaxckpt.errors import SettingError

Filter: TypeAlias = Callable[[tuple[str, ...], Any], bool]
_STRUCTURES = 64  # tree structures for which the choice is remembered


class Chosen:
    """What a filter chooses in trees."""

    def __init__(self, name: str, chosen: Filter | type) -> None:
        """Choose nothing yet.

        Args:
            name: The name of the filter's argument.
            chosen: Takes a leaf's path and the leaf, and tells whether it is chosen; or
                the type of all chosen leaves. A Flax NNX `Variable` counts as one leaf,
                so that NNX's filters work.
        """
        if isinstance(chosen, type):
            of_type = chosen
            self._chosen: Filter = lambda path, leaf: isinstance(leaf, of_type)
        else:
            self._chosen = chosen
        self._name = name
        self._indices = Remembered[list[int]](_STRUCTURES)

    def indices(self, tree: PyTree) -> list[int]:
        """Return the indices of a tree's chosen leaves; filter each structure once."""
        structure = flatten(tree).key
        return self._indices.get_or_make(structure, lambda: self._choose(tree))

    def _choose(self, tree: PyTree) -> list[int]:
        nnx = sys.modules.get("flax.nnx")
        whole = () if nnx is None else (nnx.Variable,)
        found: list[int] = []
        first = 0
        for entries, node in nodes_with_paths(tree, whole):
            after = first + len(jax.tree_util.tree_leaves(node))
            path = tuple(str(key_of(entry)) for entry in entries)
            try:
                is_chosen = self._chosen(path, node)
            except TypeError as error:
                raise SettingError(
                    self._name,
                    self._chosen,
                    f"called with {path} and the leaf, it raised TypeError: {error}.",
                ) from error
            if is_chosen:
                found += range(first, after)
            first = after
        return found

    def refuse_all(self, tree: PyTree, others: str = "") -> SettingError:
        """Make the error for a filter that chooses no leaf.

        Args:
            tree: The tree.
            others: The kind of leaves that do not count, if it chooses some.
        """
        but = f" but {others}" if others and self.indices(tree) else ""
        paths = [path for path, _ in nodes_with_paths(tree, ())][:4]
        names = ["/".join(str(key_of(entry)) for entry in path) for path in paths]
        return SettingError(
            self._name,
            self._chosen,
            f"it holds for no leaf{but}. The tree has {', '.join(names)}... It is "
            "called with a leaf's path, a tuple of names, and the leaf.",
        )
