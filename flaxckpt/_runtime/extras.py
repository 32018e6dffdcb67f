"""The extras of flaxckpt: other libraries that parts of it need."""


def how_to_install(extra: str) -> str:
    """Return the sentence with which errors say how to install an extra."""
    return f"In a clone of flaxckpt: pip install '.[{extra}]'"
