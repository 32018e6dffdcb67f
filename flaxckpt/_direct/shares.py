"""Writes a checkpoint that several processes write: each writes the values it has."""

from collections.abc import Sequence
from typing import Any, TypeAlias

from flaxckpt._direct.chunks import own_chunks
from flaxckpt._direct.form import Fingerprints, Form
from flaxckpt._direct.threads import writing_pool
from flaxckpt._direct.write import write_file
from flaxckpt._direct.zarr import STATE, ZarrArray
from flaxckpt._disk.files import Draft
from flaxckpt._trees.digest import Digest, as_digest, combined, digest_of_sum
from flaxckpt._trees.owned_shards import pieces

# A leaf's digest as a number, and the position and checksum of each file of the leaf.
Share: TypeAlias = tuple[int, list[tuple[int, str]]]


def begin_shares(form: Form, draft: Draft, values: Sequence[Any]) -> None:
    """Write all but the arrays' values, which several processes write.

    Args:
        form: How Orbax has written such a tree.
        draft: The draft to write to.
        values: The leaves that Orbax stores.
    """
    for path, content in form.contents_for(values):
        draft.write(path, [content])
    for stored in form.arrays:
        if isinstance(stored, ZarrArray):
            draft.write(f"{STATE}/{stored.description_key}", [stored.description])


def write_own(
    form: Form, draft: Draft, values: Sequence[Any], *, leads: bool
) -> list[Share]:
    """Write this process's share of a checkpoint that several processes write.

    Each process writes the first replicas of shards on its devices. The leading
    process also writes the leaves that are whole in every process.

    Args:
        form: How Orbax has written such a tree.
        draft: The draft to write to.
        values: The leaves that Orbax stores.
        leads: Whether this is the leading process.

    Returns:
        For each leaf, the digest of what was written, as a number, and for each
        file its position among the leaf's files and its checksum.
    """

    def write(stored: ZarrArray | str, value: Any) -> Share:
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
        return list(pool.map(write, form.arrays, values))


def joined(form: Form, shares: Sequence[Sequence[Share]]) -> Fingerprints:
    """Join the shares that the processes have written.

    Args:
        form: How Orbax has written such a tree.
        shares: For each process, what `write_own` returned.

    Returns:
        The leaves' digests, and the checksums of each leaf's files.

    Raises:
        ValueError: If no process, or more than one, has written a file.
    """
    digests, sums = list[str](), list[Sequence[str]]()
    for stored, parts in zip(form.arrays, zip(*shares, strict=True), strict=True):
        written = [file for _, own_files in parts for file in own_files]
        files = dict(map(tuple, written))
        number = 0 if isinstance(stored, str) else sum(1 for _ in stored.keys())
        if not len(files) == len(written) == number:
            raise ValueError(
                f"of {stored}, {number} files, {len(written)} were written"
            )
        sums.append([files[position] for position in range(number)])
        is_one_chunk = isinstance(stored, ZarrArray) and stored.is_one_chunk
        summed = digest_of_sum(sum(total for total, _ in parts))
        digests.append(as_digest(files[0]) if is_one_chunk else summed)
    return digests, sums
