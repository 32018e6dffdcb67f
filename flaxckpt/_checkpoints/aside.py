"""Where a save goes if what it would replace is better: aside. The better one stays.

A path of a series is two places: the path itself, and one aside for a save that is not
better than the checkpoint at the path. The better checkpoint is at one of the two at
every moment. It is moved only for a save by hand, which gets the path it was given.
"""

from collections.abc import Mapping
from pathlib import Path

SUFFIX = ".aside"


def places_aside(path: Path, tag: str) -> tuple[Path, Path]:
    """Return where a save to `path` may go aside.

    Args:
        path: The path.
        tag: Of the series; the second place has it in its name, for where the first is
            somebody else's.
    """
    name = path.name + SUFFIX
    return path.with_name(name), path.with_name(f"{name}-{tag}")


def target(
    path: Path,
    aside: Path,
    there: Mapping[Path, float | None],
    value: float | None,
    mode: str,
) -> tuple[Path, list[Path]]:
    """Choose between a path and the place aside, so that the best of both stays.

    Args:
        path: The path.
        aside: The place aside.
        there: The monitored values of the checkpoints that are at these two.
        value: That of the save, as it is compared; None if it has none.
        mode: `"min"` or `"max"`.

    Returns:
        Where the save goes, and what of the two is superfluous once it is there.
    """
    sign = 1 if mode == "min" else -1
    known = {place: sign * value for place, value in there.items() if value is not None}
    best = min(known, key=known.__getitem__, default=None)
    if best is None or (value is not None and sign * value <= known[best]):
        return path, [aside] if aside in there else []
    return (aside if best == path else path), []
