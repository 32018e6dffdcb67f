"""Names of flaxckpt's own files: a checkpoint of such a name would not be listed."""

RECORD_FILE = "flaxckpt.json"
LEAVES_FILE = "flaxckpt_leaves.json"
# The names of our own entries beside the checkpoints begin so. No listing looks into
# them, except into a checkpoint that is hidden because two directories cannot be
# exchanged, and that no other checkpoint has replaced yet (see _disk/disk_area).
HIDDEN_PREFIX = ".flaxckpt-"
ADVICE = (
    "a name of flaxckpt's own files. Choose one that does not begin with "
    f"{HIDDEN_PREFIX!r}, and is not {RECORD_FILE!r} or {LEAVES_FILE!r}."
)


def is_reserved(name: str) -> bool:
    """Tell whether a name in a path is one of ours, in upper or lower case."""
    name = name.casefold()
    return name.startswith(HIDDEN_PREFIX) or name in (RECORD_FILE, LEAVES_FILE)
