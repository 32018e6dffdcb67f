"""The forms in which Orbax has written trees."""

import functools
from collections import deque
from pathlib import Path
from typing import Any

from flaxckpt._direct.form import OrbaxFiles
from flaxckpt._direct.frozen_files import FrozenLeaf
from flaxckpt._direct.learn import learn
from flaxckpt._trees.layout import Layout

_REMEMBERED = 16


class Forms:
    """Remembers forms, by a tree's layout and its leaves' placements."""

    def __init__(self) -> None:
        """Know no form yet."""
        self._known: deque[tuple[Layout, list[Any], OrbaxFiles]] = deque(
            maxlen=_REMEMBERED
        )

    def find(
        self, layout: Layout, held: list[Any], *, is_database: bool
    ) -> OrbaxFiles | None:
        """Return the form of a tree; None if Orbax has not written such a tree yet.

        Args:
            layout: The tree's layout.
            held: The leaves that Orbax stores.
            is_database: Whether the arrays go into a database.
        """
        placements = placements_of(held)
        for known, placed, form in tuple(self._known):
            if (known, placed, form.is_database) == (layout, placements, is_database):
                return form
        return None

    def has(self, layout: Layout, leaves: list[Any]) -> bool:
        """Tell whether a tree has a form with a file for each array.

        If it has, frozen leaves that are stored already need not be copied.
        """
        held = held_values(layout, leaves)
        return self.find(layout, held, is_database=False) is not None

    def learn(
        self, directory: Path, layout: Layout, held: list[Any], *, leads: bool = True
    ) -> OrbaxFiles | None:
        """Learn the form of a checkpoint that Orbax has just written; see `learn`."""
        form = learn(directory, layout, held, leads=leads)
        if form is not None:
            self._known.appendleft((layout, placements_of(held), form))
        return form


@functools.cache
def shared_forms() -> Forms:
    """Return the forms that all series of this process remember together.

    Orbax writes equal trees in one form, so it writes a tree once for the process, and
    not once for each series.
    """
    return Forms()


def held_values(layout: Layout, leaves: list[Any]) -> list[Any]:
    """Return the leaves of a tree that Orbax stores."""
    pairs = zip(layout.leaves, leaves, strict=True)
    return [value for leaf, value in pairs if leaf.in_orbax]


def thawed(leaves: list[Any]) -> list[Any]:
    """Return leaves with the values of the frozen ones."""
    return [leaf.value if isinstance(leaf, FrozenLeaf) else leaf for leaf in leaves]


def placements_of(held: list[Any]) -> list[Any]:
    """Return each leaf's sharding, or its type if it is no JAX array."""
    return [getattr(value, "sharding", type(value)) for value in thawed(held)]
