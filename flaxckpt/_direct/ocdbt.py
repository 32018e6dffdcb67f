"""An OCDBT database written straight from memory: values, a node, and a manifest.

https://google.github.io/tensorstore/kvstore/ocdbt/index.html#storage-format

TensorStore copies each value, and holds it in memory until a commit. For large values
this takes about as long as the writing. It may also make several data files. Here the
values go into one data file block by block, and behind them the only node of the
B+tree, with all keys and with the small values. The manifest refers to the node. Fields
of many entries are stored by column: first one field of all entries, then the next.
"""

import contextlib
import itertools
import os
import struct
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from flaxckpt._direct.crc32c import crc32c
from flaxckpt._direct.zarr import MANIFEST
from flaxckpt._disk.files import Draft

INLINE_BYTES = 1024  # `max_inline_value_bytes`: larger values are in the data file
NODE_BYTES = 8 * 2**20  # `max_decoded_node_bytes`, as TensorStore has it by default
_ARITY_LOG2 = 4  # `version_tree_arity_log2`, by default
_KEY_BYTES = 2**16 - 1
_KEYS = 2**20  # in a node
_OF_MANIFEST, _OF_NODE = 0x0CDB3A2A, 0x0CDB20DE
# What TensorStore counts for an entry of a node, beside its key and a value within it.
_ENTRY_BYTES, _REFERENCE_BYTES = 16, 16
_NAME = "d/{:032x}"

Put: TypeAlias = Callable[[str, Iterable[Any]], None]
Entry: TypeAlias = tuple[int, int | bytes]
"""A value's size, and the value or where in the data file it begins."""


class NotOneNodeError(ValueError):
    """TensorStore would not store these values in exactly one node."""


@contextlib.contextmanager
def writing(draft: Draft, directory: str, sizes: Mapping[str, int]) -> Generator[Put]:
    """Write a database. It is there once the context has ended without an error.

    Args:
        draft: The draft to write to. The caller must sync the files.
        directory: The database's directory in the draft; it has no database yet.
        sizes: The size in bytes of each value, by its key.

    Yields:
        A function that writes a value. It takes the key, and the parts of the value.
        Each value must be written once; the data file has them in this order.

    Raises:
        NotOneNodeError: Before anything is written.
        ValueError: If a value is missing, or has another size.
    """
    _check_one_node(sizes)
    name, at = _NAME.format(int.from_bytes(os.urandom(16))), 0
    entries = dict[bytes, Entry]()
    # Its name is always new, so no later save writes over it.
    with draft.writing(f"{directory}/{name}", is_kept_in_cache=False) as write:

        def put(key: str, parts: Iterable[Any]) -> None:
            nonlocal at
            size = sizes[key]
            if size <= INLINE_BYTES:
                value = b"".join(parts)
                entries[key.encode()], found = (size, value), len(value)
            else:
                entries[key.encode()], found = (size, at), 0
                for part in parts:
                    write(part)
                    found += len(part)
                at += found
            if found != size:
                raise ValueError(f"the value of {key!r} has {found} bytes, not {size}")

        yield put
        if len(entries) != len(sizes):
            raise ValueError(f"{len(sizes) - len(entries)} values are missing")
        node = node_of(entries, name)
        write(node)
    manifest = manifest_of(name, at, len(node), len(entries))
    draft.write(f"{directory}/{MANIFEST}", [manifest])


def _check_one_node(sizes: Mapping[str, int]) -> None:
    """Raise if TensorStore would not have these values in one node."""
    keys = sorted(key.encode() for key in sizes)
    shared = _shared(keys[0], keys[-1]) if keys else 0
    reference = _REFERENCE_BYTES + len(_NAME.format(0))
    size = sum(_ENTRY_BYTES - shared + len(key) for key in keys) + shared
    size += sum(each if each <= INLINE_BYTES else reference for each in sizes.values())
    is_one = 0 < len(keys) <= _KEYS and size <= NODE_BYTES
    if not is_one or max(map(len, keys)) > _KEY_BYTES:
        raise NotOneNodeError(f"{len(keys)} keys, {size} bytes")


def node_of(entries: Mapping[bytes, Entry], name: str) -> bytes:
    """Encode a leaf node.

    Args:
        entries: The entries by key; there must be one.
        name: The data file of the values, in the database.
    """
    keys = sorted(entries)
    shared = list(itertools.starmap(_shared, itertools.pairwise(keys)))
    found = [entries[key] for key in keys]
    starts = [value for _, value in found if isinstance(value, int)]
    height = b"\0"
    columns = (
        _numbers(shared),
        _numbers(len(key) - n for key, n in zip(keys, [0, *shared], strict=True)),
        b"".join(key[n:] for key, n in zip(keys, [0, *shared], strict=True)),
        _numbers(size for size, _ in found),
        bytes(isinstance(value, int) for _, value in found),
        _numbers(0 for _ in starts),  # which of the files
        _numbers(starts),
        b"".join(value for _, value in found if isinstance(value, bytes)),
    )
    files = _files([name] if starts else [])
    return _framed(_OF_NODE, [height, files, _numbers([len(keys)]), *columns])


def manifest_of(name: str, at: int, size: int, number: int) -> bytes:
    """Encode a manifest of one version, whose only node is behind its values.

    Args:
        name: The data file, in the database.
        at: Where in that file the node begins, which is the size of the values in it.
        size: The size of the node.
        number: How many keys the node has.
    """
    kind, height, compression = b"\0", b"\0", b"\0"
    config = [os.urandom(16), kind, _numbers([INLINE_BYTES, NODE_BYTES])]
    config += [bytes([_ARITY_LOG2]), compression]
    versions, generation = _numbers([1]), _numbers([1])
    place = _numbers([0, at, size])  # which of the files, and where in it
    statistics = _numbers([number, size, at])
    version = [versions, generation, height, place, statistics]
    moment = struct.pack("<Q", max(time.time_ns(), 0))
    older = _numbers([0])
    return _framed(_OF_MANIFEST, [*config, _files([name]), *version, moment, older])


def _files(names: Sequence[str]) -> bytes:
    """Encode a table of at most one data file: path length, base path length, path."""
    parts = [_numbers([len(name), 0]) + name.encode() for name in names]
    return b"".join((_numbers([len(names)]), *parts))


def _framed(kind: int, parts: Iterable[bytes]) -> bytes:
    """Put a header before the parts, uncompressed, and a checksum behind all."""
    version, compression = b"\0", b"\0"
    body = b"".join((version, compression, *parts))
    head = struct.pack(">I", kind) + struct.pack("<Q", 4 + 8 + len(body) + 4)
    return head + body + struct.pack("<I", crc32c(head + body))


def _shared(one: bytes, other: bytes) -> int:
    """Count the bytes with which two keys begin alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _numbers(values: Iterable[int]) -> bytes:
    """Encode numbers in base 128, the lowest digit first (unsigned LEB128)."""
    found = bytearray()
    for value in values:
        while value >= 128:
            found.append(value & 127 | 128)
            value >>= 7
        found.append(value)
    return bytes(found)
