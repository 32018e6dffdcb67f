"""Leaves that do not change: stored once, and linked from each checkpoint.

The files of such a leaf have a name in each checkpoint (a hard link). So each
checkpoint is whole by itself, also for Orbax, and any may be deleted. A leaf is linked
only if its digest equals the stored leaf's digest. Otherwise the leaf is written again.
"""

import contextlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from flaxckpt._direct.chunks import digest_as_stored
from flaxckpt._direct.form import Fingerprints, Form
from flaxckpt._direct.read import read
from flaxckpt._direct.sources import Files
from flaxckpt._direct.zarr import STATE, ZarrArray
from flaxckpt._disk.files import Draft, Stamp, stamp_of
from flaxckpt._disk.record import read_leaves
from flaxckpt._trees.chosen import Chosen, Filter
from flaxckpt._trees.layout import Layout
from flaxckpt._trees.leaf import ARRAYS
from flaxckpt.errors import CheckpointError


@dataclass(eq=False)
class FrozenLeaf:
    """A frozen leaf on its way to the disk.

    Attributes:
        value: Its value; None until it is copied.
        origin: The JAX array of which the value is a copy; None for other leaves.
        digest: Its digest; empty until it is known.
        sums: Checksums of its files, once they are written or linked.
    """

    value: Any
    origin: "weakref.ref[jax.Array] | None"
    digest: str = ""
    sums: Sequence[str] = ()


@dataclass(frozen=True)
class Home:
    """Where a frozen leaf is stored.

    Attributes:
        digest: Its digest.
        files: The files of its values, in order.
        stamps: Device, inode, mtime and size of each file, to know it again.
        sums: The files' checksums, if they are known.
    """

    digest: str
    files: Sequence[Path]
    stamps: Sequence[Stamp]
    sums: Sequence[str] = ()


class Frozen:
    """The frozen leaves of one series of checkpoints, and where they are stored.

    Attributes:
        chosen: Tells which leaves of a tree are frozen.
        linked_bytes: How many bytes were linked so far, instead of being written.
    """

    def __init__(self, chosen: Filter | type) -> None:
        """Take the filter that chooses the frozen leaves; nothing is stored yet.

        Args:
            chosen: As for `Chosen`.
        """
        self.chosen = Chosen("frozen", chosen)
        self._known: dict[int, tuple[weakref.ref[jax.Array], str]] = {}
        self._homes: dict[Any, Home] = {}
        self._drafted: list[tuple[Any, FrozenLeaf, list[str], list[Stamp], bool]] = []
        self.linked_bytes = 0

    # ---- on the loop's thread --------------------------------------------------------

    def leaf(self, value: Any, *, is_known: bool) -> FrozenLeaf:
        """Make a `FrozenLeaf`, with the digest if this very array was stored before.

        Args:
            value: The leaf.
            is_known: Whether such a digest may be used.
        """
        if not isinstance(value, jax.Array):  # its owner may change it in place
            return FrozenLeaf(None, None)
        known = self._known.get(id(value)) if is_known else None
        if known is not None and known[0]() is value:
            return FrozenLeaf(value, known[0], known[1])
        return FrozenLeaf(None, weakref.ref(value))

    # ---- in the background -----------------------------------------------------------

    @property
    def is_new(self) -> bool:
        """Whether no stored leaf is known yet."""
        return not self._homes

    @property
    def has_links(self) -> bool:
        """Whether the draft has a linked leaf."""
        return any(is_linked for *_, is_linked in self._drafted)

    def begin(self) -> None:
        """Begin a draft, and forget an earlier draft that was not put in its place."""
        self._drafted.clear()

    def adopt(self, key: Any, home: Home) -> None:
        """Note where an earlier process has stored a leaf."""
        self._homes[key] = home

    def link(self, draft: Draft, key: Any, leaf: FrozenLeaf, names: list[str]) -> bool:
        """Link a leaf's files into a draft if it is stored; tell whether it was linked.

        Args:
            draft: The draft to link into.
            key: Identifies the leaf and the way in which it is stored.
            leaf: The leaf; its digest is known.
            names: The files' paths in the draft.
        """
        home = self._homes.get(key)
        if home is None or home.digest != leaf.digest:
            return False
        leaf.sums = home.sums
        return all(map(draft.link, names, home.files, home.stamps))

    def note(
        self,
        draft: Draft,
        key: Any,
        leaf: FrozenLeaf,
        names: list[str],
        *,
        is_linked: bool,
    ) -> None:
        """Note that the leaf's files are in the draft now, under these names."""
        stamps = [draft.stamp(name) for name in names]
        self._drafted.append((key, leaf, names, stamps, is_linked))

    def settle(self, path: Path) -> None:
        """Note that the draft, and so each of its leaves, is stored at `path` now."""
        drafted, self._drafted = self._drafted, []
        for key, leaf, names, stamps, is_linked in drafted:
            files = [path / name for name in names]
            self._homes[key] = Home(leaf.digest, files, stamps, leaf.sums)
            self.linked_bytes += sum(s[-1] for s in stamps) if is_linked else 0
            array = leaf.origin and leaf.origin()
            if array is not None:
                self._remember(array, leaf.digest)

    def _remember(self, array: jax.Array, digest: str) -> None:
        known, at = self._known, id(array)

        def forget(gone: Any) -> None:
            if at in known and known[at][0] is gone:
                del known[at]

        known[at] = weakref.ref(array, forget), digest


def link_frozen(
    form: Form,
    draft: Draft,
    values: Sequence[Any],
    fingerprints: Fingerprints,
    frozen: Frozen,
) -> None:
    """Replace frozen leaves' files by links, if the same values are stored already.

    Args:
        form: How Orbax has written the draft.
        draft: The draft that Orbax has written.
        values: The leaves that Orbax stores, frozen leaves as `FrozenLeaf`.
        fingerprints: The leaves' fingerprints.
        frozen: Where frozen leaves are stored.
    """
    for stored, value, digest, sums in zip(
        form.arrays, values, *fingerprints, strict=True
    ):
        if isinstance(value, FrozenLeaf) and isinstance(stored, ZarrArray):
            value.digest = digest
            names = [f"{STATE}/{key}" for key, _ in stored.with_keys("/").keys()]
            is_linked = frozen.link(draft, stored, value, names)
            value.sums = sums
            frozen.note(draft, stored, value, names, is_linked=is_linked)


def adopt_frozen(form: Form, earlier: Path, frozen: Frozen) -> None:
    """Tell `frozen` which files of an earlier checkpoint can be linked.

    Does so only if `frozen` knows no stored leaf. Reads the values, since the files may
    have changed. A leaf that cannot be read is written again.

    Args:
        form: How Orbax writes the tree that is to be saved.
        earlier: The earlier checkpoint.
        frozen: Gets the digest, files and stamps of each leaf.
    """
    if not frozen.is_new:
        return
    with contextlib.suppress(
        CheckpointError, OSError, ValueError, KeyError, TypeError
    ):  # then the leaves are written again
        _adopt(form, earlier, frozen)


def _adopt(form: Form, earlier: Path, frozen: Frozen) -> None:
    leaves = Layout.from_json(read_leaves(earlier)).leaves
    store = Files(earlier / STATE)
    known = {leaf.stored_name: leaf for leaf in leaves}
    for stored in form.arrays:
        leaf = None if isinstance(stored, str) else known.get(stored.name)
        if leaf is None or isinstance(stored, str) or leaf.kind not in ARRAYS:
            continue
        content = read(store, leaf)
        if content is None or content[0].with_keys(".") != stored:
            continue
        found, values, sums = content
        files = [earlier / STATE / key for key, _ in found.keys()]
        try:
            stamps = [stamp_of(file) for file in files]
        except OSError:
            continue
        # An earlier version may have recorded another kind of digest.
        digest = digest_as_stored(stored, values)
        frozen.adopt(stored, Home(digest, files, stamps, sums))
