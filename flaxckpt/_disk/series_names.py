"""Names that follow from the name of a series: of its slot, and in names of files."""

import hashlib
import os

from flaxckpt._decision.reserved import HIDDEN_PREFIX

MARK_SUFFIX = ".finished"
# The slot is a series of its own: this follows the name of the checkpoints' series.
SLOT_SUFFIX = " (last)"


def names_of(series: str) -> tuple[str, str]:
    """Return the names of a series and of its slot's series, given either."""
    name = series.removesuffix(SLOT_SUFFIX)
    return name, name + SLOT_SUFFIX


def tag_of(series: str) -> str:
    """Return the tag that stands for a series' name in file names."""
    return hashlib.sha256(os.fsencode(series)).hexdigest()[:8]


def mark_of(series: str) -> str:
    """Return the name of the mark of a series whose run has ended."""
    return f"{HIDDEN_PREFIX}{tag_of(series)}{MARK_SUFFIX}"
