"""The forms in which Orbax has written trees."""

import functools
from pathlib import Path
from typing import Any

from flaxckpt._direct.form import Form
from flaxckpt._direct.frozen_files import FrozenLeaf
from flaxckpt._direct.learn import learn, learn_share
from flaxckpt._trees.layout import Layout

_REMEMBERED = 64


class Forms:
    """Remembers forms, by a tree's layout and its leaves' placements."""

    def __init__(self) -> None:
        """Know no form yet."""
        # Replaced as a whole, since several threads look into it.
        self._known: tuple[tuple[Layout, list[Any], Form], ...] = ()

    def find(
        self,
        layout: Layout,
        held: list[Any],
        *,
        is_database: bool,
        spreads: bool | None = None,
    ) -> Form | None:
        """Return the form of a tree; None if Orbax has not written such a tree yet.

        Args:
            layout: The tree's layout.
            held: The leaves that Orbax stores.
            is_database: Whether the arrays go into a database.
            spreads: Of a share, whether replicas are divided; see `Form`.
        """
        asked = layout, placements_of(held), is_database, spreads
        for known in self._known:
            if (*known[:2], known[2].is_database, known[2].spreads) == asked:
                self._note(known)
                return known[2]
        return None

    def _note(self, known: tuple[Layout, list[Any], Form]) -> None:
        """Note a form as the one used last."""
        others = [each for each in self._known if each is not known]
        self._known = known, *others[: _REMEMBERED - 1]

    def has(self, layout: Layout, leaves: list[Any]) -> bool:
        """Tell whether a tree has a form with a file for each array.

        If it has, frozen leaves that are stored already need not be copied.
        """
        held = held_values(layout, leaves)
        return self.find(layout, held, is_database=False) is not None

    def learn(self, directory: Path, layout: Layout, held: list[Any]) -> Form | None:
        """Learn the form of a checkpoint that Orbax has just written; see `learn`."""
        return self._noted(layout, held, learn(directory, layout, held))

    def learn_share(
        self,
        directory: Path,
        layout: Layout,
        held: list[Any],
        process: int,
        *,
        spreads: bool,
    ) -> list[int] | None:
        """Learn the form of the share of a process; see `learn_share`.

        Returns:
            For each leaf, the sum over the chunks in the share; None if the way in
            which Orbax has written it is not known here.
        """
        learnt = learn_share(directory, layout, held, process, spreads=spreads)
        if learnt is None:
            return None
        form, sums = learnt
        self._noted(layout, held, form)
        return sums

    def _noted(self, layout: Layout, held: list[Any], form: Form | None) -> Form | None:
        if form and not self.find(
            layout, held, is_database=form.is_database, spreads=form.spreads
        ):
            self._note((layout, placements_of(held), form))
        return form


@functools.cache
def shared_forms() -> Forms:
    """Return the forms that all series of this process share.

    Orbax writes equal trees in one form. So it writes a tree once for a process, and
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
