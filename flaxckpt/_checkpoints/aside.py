"""Where a save goes if what it would replace is better: aside. The better one stays.

A path of a series has places aside, for a save that is not better than the checkpoint
at the path. The better checkpoint is at one of these places at every moment. It is
moved only for a save by hand, which gets the path it was given: such a save is written
aside, and then the two change places. Nothing is deleted before the save is there.
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
    """Where a save goes, and what becomes of what is there.

    Attributes:
        path: Its place.
        kept: Where the checkpoint at `path` is moved; None if it is not moved.
        rest: The checkpoints that are superfluous once the save is there.
        reason: Why the checkpoint at the path that was asked for may have to stay, if
            that is not for a better value in this series.
    """

    path: Path
    kept: Path | None = None
    rest: Sequence[Path] = ()
    reason: str = ""


def places_aside(path: Path, tag: str) -> tuple[Path, ...]:
    """Return where a save to `path` may go aside, the preferred place first.

    Args:
        path: The path.
        tag: Of the series; the later places have it in their names, for where the first
            is somebody else's, or still has a checkpoint while another one moves aside.
    """
    ends = suffixes(tag)
    room = NAME_BYTES - max(map(len, ends))  # the names differ by their ends alone
    return tuple([path.with_name(_shortened(path.name, room) + end) for end in ends])


def without_suffix(name: str, tag: str) -> str:
    """Return the same text for a name and for the names of its places aside."""
    return _shortened(bare(name, tag), NAME_BYTES - max(map(len, suffixes(tag))))


def bare(name: str, tag: str) -> str:
    """Return a name without what a place aside adds to it."""
    for end in reversed(suffixes(tag)):
        name = name.removesuffix(end)
    return name


def _shortened(name: str, most: int) -> str:
    """Return a name of so many bytes at most; a digest stands for what is left out."""
    whole = os.fsencode(name)
    if len(whole) <= most:
        return name
    digest = hashlib.sha256(whole).hexdigest()[:16]
    head = whole[: most - len(digest) - 1].decode(errors="ignore")
    return f"{head}~{digest}"


def suffixes(tag: str) -> tuple[str, ...]:
    """Return what `places_aside` adds to a name."""
    return SUFFIX, f"{SUFFIX}-{tag}", f"{SUFFIX}-{tag}-2"


def placed(
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
        there: The monitored values of the checkpoints that are at the path and aside.
        value: That of the save, as it is compared; None if it has none.
        mode: `"min"` or `"max"`.
        by_hand: Whether the save gets the path, and a better one makes way.
        swaps: Whether it is put aside first then, and the two change places; else the
            better one is moved to where nothing is.
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
    place, rest = aside[0] if aside else free, aside[1:]
    return Placed(path, place, rest) if by_hand else Placed(place, rest=rest)
