"""Names of flaxckpt's own files, which no checkpoint may have: none would be listed."""

RECORD_FILE = "flaxckpt.json"
LEAVES_FILE = "flaxckpt_leaves.json"
# What is ours beside the checkpoints; no listing looks into it, but for what was set
# aside where two directories cannot be exchanged, and not replaced (see _disk/commit).
HIDDEN_PREFIX = ".flaxckpt-"
ADVICE = (
    "a name of flaxckpt's own files. Choose one that does not begin with "
    f"{HIDDEN_PREFIX!r}, and is not {RECORD_FILE!r} or {LEAVES_FILE!r}."
)


def is_reserved(name: str) -> bool:
    """Tell whether a name in a path is one of ours, also where case does not count."""
    name = name.casefold()
    return name.startswith(HIDDEN_PREFIX) or name in (RECORD_FILE, LEAVES_FILE)
