"""Places aside: where a save goes if its path holds a better checkpoint.

Each path of a series has places aside. At every moment, the better checkpoint is at the
path or at one of these places. It moves only for a save by hand, which gets the path
that the caller gave: that save is written aside, and then the two exchange their names.
Nothing is deleted before the save is in its place.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flaxckpt._checkpoints.target import NAME_BYTES

SUFFIX = ".aside"


@dataclass(frozen=True)
class Placed:
    """Where a save goes, and what becomes of the checkpoints there.

    Attributes:
        path: The save's place.
        kept: Where the checkpoint at `path` is moved; None if it is not moved.
        rest: The checkpoints that are superfluous once the save is in its place.
        reason: Why the checkpoint at the requested path may have to stay, other than
            for a better value in this series; empty for no such reason.
    """

    path: Path
    kept: Path | None = None
    rest: Sequence[Path] = ()
    reason: str = ""


def places_aside(path: Path, tag: str) -> tuple[Path, ...]:
    """Return where a save to `path` may go aside, the preferred place first.

    Args:
        path: The path.
        tag: The series' tag. The later places have it in their names. They serve if
            another series has the first place, or if a checkpoint is still there while
            another one moves aside.
    """
    ends = suffixes(tag)
    room = NAME_BYTES - max(map(len, ends))  # the names differ by their ends alone
    return tuple([path.with_name(_shortened(path.name, room) + end) for end in ends])


def without_suffix(name: str, tag: str) -> str:
    """Return the same text for a name and for the names of its places aside."""
    return _shortened(bare(name, tag), NAME_BYTES - max(map(len, suffixes(tag))))


def bare(name: str, tag: str) -> str:
    """Return a name without the suffix of a place aside."""
    for end in reversed(suffixes(tag)):
        name = name.removesuffix(end)
    return name


def _shortened(name: str, most: int) -> str:
    """Shorten a name to at most `most` bytes; a digest replaces the cut end."""
    whole = os.fsencode(name)
    if len(whole) <= most:
        return name
    digest = hashlib.sha256(whole).hexdigest()[:16]
    head = whole[: most - len(digest) - 1].decode(errors="ignore")
    return f"{head}~{digest}"


def suffixes(tag: str) -> tuple[str, ...]:
    """Return what `places_aside` adds to a name."""
    return SUFFIX, f"{SUFFIX}-{tag}", f"{SUFFIX}-{tag}-2"


def choose_place(
    path: Path,
    free: Path,
    there: Mapping[Path, float | None],
    value: float | None,
    mode: str,
    *,
    by_hand: bool = False,
    swaps: bool = True,
) -> Placed:
    """Choose between a path and the places aside, so that the best of all stays.

    Args:
        path: The path.
        free: A place aside with nothing in it.
        there: The monitored values of the checkpoints at the path and aside, those
            aside from the oldest to the newest; None for a checkpoint without a value.
        value: The save's monitored value, as it is compared; None if it has none.
        mode: `"min"` or `"max"`.
        by_hand: Whether the save gets the path, and a better checkpoint moves aside.
        swaps: Whether such a save is put aside first, and then the two exchange their
            names. Otherwise the better checkpoint is moved to `free` first.
    """
    sign = 1 if mode == "min" else -1
    aside = [place for place in there if place != path]
    known = {place: sign * value for place, value in there.items() if value is not None}
    best = min(known, key=known.__getitem__, default=None)
    if best is None or (value is not None and sign * value <= known[best]):
        return Placed(path, rest=aside)
    if best != path:
        return Placed(path, rest=[place for place in aside if place != best])
    if by_hand and not swaps:
        return Placed(path, kept=free, rest=aside)
    if not by_hand:
        return Placed(aside[0] if aside else free, rest=aside[1:])
    # The newest one aside may be the newest of all. It stays until this one is at the
    # path: a kill may come between the renames.
    place = free if len(aside) < 2 else aside[0]
    return Placed(path, place, [each for each in aside if each != place])
