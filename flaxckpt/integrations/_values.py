"""What the loggers log of a checkpoint."""

import numbers

from flaxckpt._disk.info import CheckpointInfo


def values_of(info: CheckpointInfo, prefix: str) -> dict[str, float]:
    """Return the numbers in a checkpoint's logs, and whether it is the best, by name.

    Args:
        info: The checkpoint.
        prefix: What the names begin with.
    """
    values = {
        f"{prefix}/{name}": float(value)
        for name, value in info.logs.items()
        if isinstance(value, numbers.Real)
    }
    if info.is_best is not None:
        values[f"{prefix}/is_best"] = float(info.is_best)
    return values
