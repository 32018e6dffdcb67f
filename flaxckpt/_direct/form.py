"""The files of a checkpoint as Orbax has written them, less the values.

Orbax takes a millisecond to write each leaf, mostly in the interpreter, and copies
large arrays. If Orbax has written a tree of the same structure, shapes and shardings
before, only the values differ. `write_values` then writes Orbax's small files again as
they were, and the values straight from memory, in the format that Orbax chose: Zarr 3,
each chunk a shard of one part
(https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed). There are two
arrangements: a directory for each array, and one OCDBT database, which is better for
many small arrays.
"""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from flaxckpt._direct.zarr import STATE, STRINGS, ZarrArray

# The leaves' digests, and the checksums of each leaf's files. A database has no such
# checksums.
Fingerprints: TypeAlias = tuple[list[str], list[Sequence[str]]]


@dataclass(frozen=True)
class Form:
    """What is the same in all checkpoints of one structure, with the same shardings.

    In several processes, each process has a form of its own share.

    Attributes:
        is_database: Whether the arrays are in an OCDBT database.
        contents: Contents of Orbax's own files, by their paths in the checkpoint.
        arrays: How each leaf's values are stored. A text leaf has its name instead,
            since one file holds all texts.
        spreads: For a share, whether replicas are divided between processes; None for a
            whole tree.
    """

    is_database: bool
    contents: Mapping[str, bytes]
    arrays: Sequence[ZarrArray | str]
    spreads: bool | None = None

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """The paths in the checkpoint of all files, where there is no database."""
        names = set(self.contents)
        for stored in self.arrays:
            if not isinstance(stored, str):
                names.add(f"{STATE}/{stored.description_key}")
                names.update(f"{STATE}/{key}" for key, _ in stored.keys())
        return frozenset(names)

    def contents_for(
        self, values: Sequence[Any], below: str = ""
    ) -> Iterator[tuple[str, bytes]]:
        """Yield path and content of Orbax's own files in a checkpoint of new values.

        Args:
            values: The leaves that Orbax stores.
            below: What the paths begin with.
        """
        for path, content in self.contents.items():
            if path.startswith(below):
                yield path, self.current(path, content, values)

    def current(self, path: str, content: bytes, values: Sequence[Any]) -> bytes:
        """Return what one of these files holds in a checkpoint of new values."""
        if path == STRINGS:
            pairs = zip(self.arrays, values, strict=True)
            texts = {name: text for name, text in pairs if isinstance(name, str)}
            return json.dumps(texts).encode()
        return content


def database_of(process: int) -> str:
    """Return the name, in the tree's directory, of a process's database."""
    return f"ocdbt.process_{process}"
