"""Checkpoints in a form that Orbax has shown: its files as it wrote them, new values.

Orbax takes a millisecond to write each leaf, mostly in the interpreter, and copies
large arrays. If Orbax has written a tree of the same structure, shapes and shardings
before, only the values differ. `Form.write` then writes Orbax's small files again as
they were, and the values straight from memory, in the format that Orbax chose: Zarr 3,
each chunk a shard of one part
(https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed). It knows two
arrangements: a directory for each array, and one OCDBT database, which is better for
many small arrays.

`recognized` first compares what Orbax wrote with what `Form` would have written: of
each chunk the size and both ends. If they differ, because of another version of Orbax
or an unknown option, there is no form, and Orbax goes on writing.
"""

import functools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import tensorstore

from flaxckpt._direct.chunks import chunks_of, digest_as_stored, own_chunks
from flaxckpt._direct.frozen_files import Frozen, FrozenLeaf, Home
from flaxckpt._direct.read import TIMES, read
from flaxckpt._direct.sources import HEAD, Database, Files, Values
from flaxckpt._direct.threads import give_way, writing_pool
from flaxckpt._direct.write import BATCH_BYTES, database_at, write_array, write_file
from flaxckpt._direct.zarr import (
    DESCRIPTION,
    READ,
    STATE,
    STRINGS,
    Bytes,
    OtherwiseError,
    Stored,
    below,
    dtype_of,
    parsed,
    raw_bytes,
    trailer_of,
)
from flaxckpt._disk.alias import plainly
from flaxckpt._disk.files import Draft, stamp_of
from flaxckpt._trees.digest import (
    Digest,
    checksum,
    checksum_in,
    combined,
    digest,
    digest_of,
)
from flaxckpt._trees.layout import Layout
from flaxckpt._trees.leaf import Leaf
from flaxckpt._trees.owned_shards import pieces

# A leaf's digest as a number, and the position and checksum of each file of the leaf.
Share: TypeAlias = tuple[int, list[tuple[int, str]]]


@dataclass(frozen=True)
class Form:
    """What is the same in all checkpoints of one structure, with the same shardings.

    Attributes:
        is_database: Whether the arrays are in an OCDBT database.
        files: Contents of Orbax's own files, by their paths in the checkpoint.
        arrays: How each leaf's values are stored. A text leaf has its name instead,
            since one file holds all texts.
    """

    is_database: bool
    files: Mapping[str, bytes]
    arrays: Sequence[Stored | str]

    def write(
        self,
        draft: Draft,
        directory: Path,
        values: Sequence[Any],
        frozen: Frozen | None = None,
    ) -> tuple[list[str], list[Sequence[str]]]:
        """Write a checkpoint of this form.

        Args:
            draft: The draft to write to.
            directory: The draft's directory.
            values: The leaves that Orbax stores. Frozen leaves come as `FrozenLeaf`; a
                database takes no frozen leaves.
            frozen: Where frozen leaves are stored; None if no leaf is frozen.

        Returns:
            The leaves' digests, and the checksums of each leaf's files. A database has
            no such checksums, and the caller must sync its files.
        """
        self._write_around(draft, values, f"{STATE}/")
        if self.is_database:
            return self._write_database(directory / STATE, values), []
        return self._write_files(draft, values, frozen)

    def begin(self, draft: Draft, values: Sequence[Any]) -> None:
        """Write all but the arrays' values, which several processes write.

        Args:
            draft: The draft to write to.
            values: The leaves that Orbax stores.
        """
        self._write_around(draft, values)
        for stored in self.arrays:
            if isinstance(stored, Stored):
                draft.write(f"{STATE}/{stored.description_key}", [stored.description])

    def write_share(
        self, draft: Draft, values: Sequence[Any], *, leads: bool
    ) -> list[Share]:
        """Write this process's share of a checkpoint that several processes write.

        Each process writes the first replicas of shards on its devices. The leading
        process also writes the leaves that are whole in every process.

        Args:
            draft: The draft to write to.
            values: The leaves that Orbax stores.
            leads: Whether this is the leading process.

        Returns:
            For each leaf, the digest of what was written, as a number, and for each
            file its position among the leaf's files and its checksum.
        """

        def write(stored: Stored | str, value: Any) -> Share:
            if isinstance(stored, str):
                return (combined(pieces(value)) if leads else 0), []
            digested = None if stored.is_one_chunk else Digest()
            sums = [
                (position, write_file(draft, key, start, chunk, digested))
                for position, (key, start, chunk) in enumerate(
                    own_chunks(stored, value, leads=leads)
                )
                if chunk is not None
            ]
            return (digested.total if digested else 0), sums

        with writing_pool() as pool:
            return list(pool.map(write, self.arrays, values))

    def joined(
        self, shares: Sequence[Sequence[Share]]
    ) -> tuple[list[str], list[Sequence[str]]]:
        """Join the shares that the processes have written.

        Args:
            shares: For each process, what `write_share` returned.

        Returns:
            The leaves' digests, and the checksums of each leaf's files.

        Raises:
            ValueError: If no process, or more than one, has written a file.
        """
        digests, sums = list[str](), list[Sequence[str]]()
        for stored, parts in zip(self.arrays, zip(*shares, strict=True), strict=True):
            digested = Digest()
            for total, _ in parts:
                digested.add(total)
            written = [file for _, found in parts for file in found]
            files = dict(map(tuple, written))
            number = 0 if isinstance(stored, str) else sum(1 for _ in stored.keys())
            if not len(files) == len(written) == number:
                raise ValueError(
                    f"of {stored}, {number} files, {len(written)} were written"
                )
            sums.append([files[position] for position in range(number)])
            is_one_chunk = isinstance(stored, Stored) and stored.is_one_chunk
            digests.append(digest_of(files[0]) if is_one_chunk else digested.text)
        return digests, sums

    def link(
        self,
        draft: Draft,
        values: Sequence[Any],
        digests: Sequence[str],
        sums: Sequence[Sequence[str]],
        frozen: Frozen,
    ) -> None:
        """Replace frozen leaves' files by links, if the same values are stored already.

        Args:
            draft: The draft that Orbax has written.
            values: The leaves that Orbax stores, frozen leaves as `FrozenLeaf`.
            digests: The leaves' digests.
            sums: The checksums of each leaf's files.
            frozen: Where frozen leaves are stored.
        """
        found = zip(digests, sums, strict=True)
        for stored, value, marks in zip(self.arrays, values, found, strict=True):
            if isinstance(value, FrozenLeaf) and isinstance(stored, Stored):
                value.digest = marks[0]
                names = [f"{STATE}/{key}" for key, _ in stored.with_keys("/").keys()]
                is_linked = frozen.link(draft, stored, value, names)
                value.sums = marks[1]
                frozen.note(draft, stored, value, names, is_linked=is_linked)

    def adopt(self, path: Path, leaves: Sequence[Leaf], frozen: Frozen) -> None:
        """Tell `frozen` which files of an earlier checkpoint can be linked.

        Reads the values, since the files may have changed.

        Args:
            path: The earlier checkpoint.
            leaves: Its leaves.
            frozen: Gets the digest, files and stamps of each leaf.
        """
        store = Files(path / STATE)
        known = {leaf.stored_name: leaf for leaf in leaves}
        for stored in self.arrays:
            leaf = None if isinstance(stored, str) else known.get(stored.name)
            if leaf is None or isinstance(stored, str) or leaf.kind not in READ:
                continue
            found = read(store, leaf)
            if found is None or found[0].with_keys(".") != stored:
                continue
            files = [path / STATE / key for key, _ in found[0].keys()]
            try:
                stamps = [stamp_of(file) for file in files]
            except OSError:
                continue
            # An earlier version may have recorded another kind of digest.
            digest = digest_as_stored(stored, found[1])
            frozen.adopt(stored, Home(digest, files, stamps, found[2]))

    def marks(self, values: Sequence[Any]) -> tuple[list[str], list[Sequence[str]]]:
        """Compute what `write` would return, and write nothing."""
        pairs = list(zip(self.arrays, values, strict=True))
        digests = [digest_as_stored(stored, value) for stored, value in pairs]
        if self.is_database:
            return digests, []
        sums: list[Sequence[str]] = []
        for (stored, value), mark in zip(pairs, digests, strict=True):
            whole, chunks = checksum_in(mark), list[str]()
            if whole is None and isinstance(stored, Stored):
                chunks = [checksum(chunk) for _, _, chunk in chunks_of(stored, value)]
            sums.append(chunks if whole is None else [whole])
        return digests, sums

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """The files that `write` makes without a database: paths in the checkpoint."""
        names = set(self.files)
        for stored in self.arrays:
            if not isinstance(stored, str):
                names.add(f"{STATE}/{stored.description_key}")
                names.update(f"{STATE}/{key}" for key, _ in stored.keys())
        return frozenset(names)

    def _write_around(
        self, draft: Draft, values: Sequence[Any], below: str = ""
    ) -> None:
        for path, content in self.files.items():
            if path.startswith(below):
                draft.write(path, [self._current(path, content, values)])

    def _current(self, path: str, content: bytes, values: Sequence[Any]) -> bytes:
        if path == STRINGS:
            pairs = zip(self.arrays, values, strict=True)
            texts = {name: text for name, text in pairs if isinstance(name, str)}
            return json.dumps(texts).encode()
        if path == TIMES:
            fields = json.loads(content)
            now = time.time_ns()
            for key in ("init_timestamp_nsecs", "commit_timestamp_nsecs"):
                fields[key] = now
            return json.dumps(fields).encode()
        return content

    def _write_database(self, directory: Path, values: Sequence[Any]) -> list[str]:
        with plainly(directory) as plain:
            database = tensorstore.KvStore.open(database_at(plain)).result()
            return self._write_into(database, values)

    def _write_into(self, database: Any, values: Sequence[Any]) -> list[str]:
        found: list[str] = []
        transaction, size = tensorstore.Transaction(), 0
        into = database.with_transaction(transaction)
        turn = time.perf_counter()
        for stored, value in zip(self.arrays, values, strict=True):
            turn = give_way(turn)
            found.append(digest_as_stored(stored, value))
            if isinstance(stored, str):
                continue
            into.write(stored.description_key, stored.description)
            for key, _, chunk in chunks_of(stored, value):
                into.write(key, chunk.tobytes() + trailer_of(chunk.nbytes))
                size += chunk.nbytes
            if size > BATCH_BYTES:
                transaction.commit_sync()
                transaction, size = tensorstore.Transaction(), 0
                into = database.with_transaction(transaction)
        transaction.commit_sync()
        return found

    def _write_files(
        self, draft: Draft, values: Sequence[Any], frozen: Frozen | None
    ) -> tuple[list[str], list[Sequence[str]]]:
        def write(stored: Stored | str, value: Any) -> tuple[str, Sequence[str]]:
            if isinstance(stored, str):
                return digest(value), ()
            if isinstance(value, FrozenLeaf):
                assert frozen is not None
                names = [f"{STATE}/{key}" for key, _ in stored.keys()]
                value.digest = value.digest or digest_as_stored(stored, value.value)
                is_linked = frozen.link(draft, stored, value, names)
                if not is_linked:
                    _, value.sums = write_array(draft, stored, value.value)
                frozen.note(draft, stored, value, names, is_linked=is_linked)
                marks = value.digest, value.sums
            else:
                marks = write_array(draft, stored, value)
            draft.write(f"{STATE}/{stored.description_key}", [stored.description])
            return marks

        with writing_pool() as pool:
            found = list(pool.map(write, self.arrays, values))
        return [digest for digest, _ in found], [sums for _, sums in found]


def recognized(
    directory: Path, layout: Layout, values: Sequence[Any], *, leads: bool = True
) -> Form | None:
    """Learn the form of a checkpoint that Orbax has just written.

    Args:
        directory: The checkpoint.
        layout: Its layout.
        values: The leaves that Orbax stores.
        leads: Whether to expect here the leaves that are whole in every process.

    Returns:
        The form; None if Orbax wrote in a way that `Form` does not know.
    """
    leaves = [leaf for leaf in layout.leaves if leaf.in_orbax]
    is_database = (directory / STATE / "manifest.ocdbt").exists()
    files: dict[str, bytes] = {}
    names: set[str] = set()
    store = Database(directory / STATE) if is_database else Files(directory / STATE)
    arrays: list[Stored | str] = []
    try:
        for leaf, value in zip(leaves, values, strict=True):
            name = leaf.stored_name
            if leaf.is_text:
                arrays.append(name)
                continue
            stored = stored_array(name, leaf, value, store)
            for key, _, chunk in own_chunks(stored, value, leads=leads):
                if chunk is not None:
                    _compare(store.ends(key), raw_bytes(chunk))
            arrays.append(stored if is_database else stored.with_keys("."))
            names.add(name)
        for path in sorted(directory.rglob("*")):
            name = path.relative_to(directory).as_posix()
            if path.is_file() and not _holds_values(name, is_database, names):
                files[name] = path.read_bytes()
        form = Form(is_database, files, arrays)
        if leads and any(leaf.is_text for leaf in leaves):
            text = form._current(STRINGS, files[STRINGS], values)
            if json.loads(text) != json.loads(files[STRINGS]):
                return None
    except (OtherwiseError, KeyError, ValueError, TypeError, AttributeError):
        return None
    return form


def stored_array(name: str, leaf: Leaf, value: Any, store: "Values") -> Stored:
    """Read how Orbax has stored an array; raise if `Form` does not know the way."""
    # Orbax may have been given another dtype than the leaf's own.
    dtype = leaf.dtype if leaf.kind in READ else dtype_of(value)
    if not name:  # the leaf is the whole tree; its files are among Orbax's own
        raise OtherwiseError
    stored = parsed(name, store.read(below(name, DESCRIPTION)), dtype)
    if stored.separator != "/":
        raise OtherwiseError
    return stored


def _compare(found: tuple[int, bytes, bytes], chunk: Bytes) -> None:
    size, head, tail = found
    trailer = trailer_of(chunk.nbytes)
    if (size, head, tail) != (
        chunk.nbytes + len(trailer),
        (chunk[:HEAD].tobytes() + trailer)[:HEAD],
        trailer,
    ):
        raise OtherwiseError


def _holds_values(path: str, is_database: bool, names: set[str]) -> bool:
    first, _, rest = path.partition("/")
    if first != STATE:
        return False
    if is_database:
        return rest.endswith("manifest.ocdbt") or rest.startswith(("d/", "ocdbt."))
    return any(rest[:at] in names for at, each in enumerate(rest) if each == "/")
