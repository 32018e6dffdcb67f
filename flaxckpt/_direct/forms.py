"""The forms that Orbax has shown, by a tree's layout and its leaves' placements."""

from collections import deque
from typing import Any

from flaxckpt._direct.form import Form
from flaxckpt._direct.frozen_files import FrozenLeaf
from flaxckpt._trees.layout import Layout


def held_values(layout: Layout, leaves: list[Any]) -> list[Any]:
    """Return the leaves of a tree that Orbax stores."""
    pairs = zip(layout.leaves, leaves, strict=True)
    return [value for leaf, value in pairs if leaf.in_orbax]


def known_form(layout: Layout, leaves: list[Any]) -> tuple[Form, list[Any]]:
    held = held_values(layout, leaves)
    form = form_of(layout, held, is_database=False)
    assert form is not None
    return form, held


def thawed(leaves: list[Any]) -> list[Any]:
    return [leaf.value if isinstance(leaf, FrozenLeaf) else leaf for leaf in leaves]


def has_form(layout: Layout, leaves: list[Any]) -> bool:
    """Tell whether a tree with frozen leaves has a form.

    If it has, frozen leaves that are stored already need not be copied.
    """
    return form_of(layout, held_values(layout, leaves), is_database=False) is not None


def form_of(layout: Layout, held: list[Any], *, is_database: bool) -> Form | None:
    """Look up the form in which Orbax wrote such a tree; None if it has not yet."""
    placements = placements_of(held)
    for known, placed, form in tuple(FORMS):
        if (known, placed, form.is_database) == (layout, placements, is_database):
            return form
    return None


def placements_of(held: list[Any]) -> list[Any]:
    return [getattr(value, "sharding", type(value)) for value in thawed(held)]


FORMS: deque[tuple[Layout, list[Any], Form]] = deque(maxlen=8)
