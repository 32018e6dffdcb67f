"""Parse the owner that a lock names."""

from flaxckpt._disk.fields import (
    INT32,
    MalformedError,
    int_in,
    mapping_in,
    parse_json,
    text_in,
)

_HOST = 256


def parse_owner(data: bytes) -> tuple[str, int]:
    """Parse the content of a lock.

    Returns:
        The owner's host name and process id; ("", 0) if the content is not valid.
    """
    try:
        fields = mapping_in(parse_json(data), "the lock")
        host, pid = text_in(fields, "host"), int_in(fields, "pid", 1, INT32)
    except MalformedError:
        return "", 0
    return (host, pid) if host.isprintable() and len(host) < _HOST else ("", 0)
