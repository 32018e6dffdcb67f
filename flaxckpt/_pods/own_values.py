"""Values that each process has for itself, put into one array of all processes."""

from collections.abc import Sequence
from dataclasses import replace

from flaxckpt._checkpoints.series_writer import Page
from flaxckpt._processes.mesh import stacked
from flaxckpt._processes.messages import process_count
from flaxckpt._trees.layout import Layout
from flaxckpt._trees.per_process import encoded, padded

_WIDTH = 64  # a small change of a text's length makes no new layout


def rows_of(pages: Sequence[Page]) -> list[list[bytes]]:
    """Return, for each page, the row of each of its leaves of this process alone."""
    return [
        [encoded(page.layout.leaves[at], page.leaves[at]) for at in page.own]
        for page in pages
    ]


def lengths_of(rows: list[list[bytes]]) -> list[list[int]]:
    """Return how long the rows are."""
    return [[len(row) for row in own] for own in rows]


def widths_for(lengths: Sequence[list[list[int]]]) -> list[list[int]]:
    """Return how wide each row has to be for all processes.

    Args:
        lengths: What `lengths_of` returned in each process.
    """
    return [
        [-(-max(each) // _WIDTH) * _WIDTH for each in zip(*own, strict=True)]
        for own in zip(*lengths, strict=True)
    ]


def with_rows(page: Page, rows: list[bytes], widths: list[int]) -> Page:
    """Return a page with arrays of all processes' rows in place of its own values."""
    leaves, stored, number = (
        list(page.leaves),
        list(page.layout.leaves),
        process_count(),
    )
    for at, row, width in zip(page.own, rows, widths, strict=True):
        leaves[at] = stacked(padded(row, width))
        leaf = stored[at]
        if leaf.kind == "int":  # large or small
            leaf = replace(leaf, dtype="", shape=())
        elif leaf.is_bytes and leaf.shape:
            # Texts of about the same length have one layout, and so one form.
            leaf = replace(leaf, shape=(width,))
        stored[at] = replace(leaf, rows=(number, width))
    return replace(
        page, layout=Layout(page.layout.skeleton, tuple(stored)), leaves=leaves
    )
