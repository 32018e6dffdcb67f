"""Finishes a checkpoint whose tree is written: the table of leaves, and the record."""

import functools
import importlib.metadata
import json
from collections import deque
from pathlib import Path

from flaxckpt._direct.form import Fingerprints
from flaxckpt._direct.zarr import MANIFEST, STATE
from flaxckpt._disk.files import Draft
from flaxckpt._disk.info import CheckpointInfo
from flaxckpt._disk.record import FORMAT, LEAVES_FILE, RECORD_FILE, encode_record
from flaxckpt._orbax.files import ZARR_MARK
from flaxckpt._trees.layout import Layout
from flaxckpt._trees.skeleton import Skeleton

_REMEMBERED = 8


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of the packages that write a checkpoint."""
    return {name: _version(name) for name in ("flaxckpt", "jax", "orbax-checkpoint")}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # as in a bare source tree
        return "unknown"


versions()  # takes 10 ms, which the first save should not take


class Tables:
    """Writes tables of leaves as JSON; remembers all but digests and checksums."""

    def __init__(self) -> None:
        """Remember nothing yet."""
        self._known: deque[tuple[Layout, Skeleton, str]] = deque(maxlen=_REMEMBERED)

    def table(
        self, layout: Layout, weights: Skeleton, fingerprints: Fingerprints
    ) -> bytes:
        """Return the table of leaves of a checkpoint."""
        digests, sums = fingerprints
        new = {"digests": digests, "sums": sums} if sums else {"digests": digests}
        text = self._text(layout, weights)
        return f"{text[:-1]}, {json.dumps(new)[1:]}".encode()

    def _text(self, layout: Layout, weights: Skeleton) -> str:
        for known, skeleton, text in tuple(self._known):
            if known == layout and skeleton == weights:
                return text
        fields = {"format": FORMAT, **layout.to_json()}
        fields["weights"] = "all" if weights == layout.skeleton else weights
        text = json.dumps(fields)
        self._known.appendleft((layout, weights, text))
        return text


def finish(draft: Draft, written: Path, info: CheckpointInfo, table: bytes) -> None:
    """Write the table of leaves and the record, and finish the draft."""
    if not (written / STATE / MANIFEST).exists():  # no database
        draft.write(ZARR_MARK, [])
    draft.write(LEAVES_FILE, [table])
    draft.write(RECORD_FILE, [encode_record(info, versions(), table)])
    draft.finish()
