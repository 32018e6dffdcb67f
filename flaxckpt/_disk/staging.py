"""Hidden directories beside a series' checkpoints, to write in and to delete."""

import contextlib
import os
import shutil
import uuid
import weakref
from collections.abc import Container, Generator
from contextlib import contextmanager
from pathlib import Path

from flaxckpt._disk.claim import Claim
from flaxckpt._disk.files import keep_only
from flaxckpt._runtime.locks import new_lock


class Staging:
    """The directories of one object.

    Attributes:
        trash: The directories that `sweep` deletes.
    """

    def __init__(self, root: Path, prefix: str, claim: Claim) -> None:
        """Make nothing yet.

        Args:
            root: The directory that gets them.
            prefix: What their names begin with.
            claim: The right to change the series.
        """
        self._root, self._prefix = root, prefix
        self.trash: list[Path] = []
        self._spared: list[Path] = []
        self._reuses = False
        self._sweeping = new_lock()
        # Finalizers run from the newest to the oldest: this one before the claim's own,
        # which gives back the lock.
        weakref.finalize(claim, discard, self.trash, os.getpid())

    def clear_up(self) -> None:
        """Delete what a crash left behind."""
        with self._sweeping:  # the last save's files may still be swept
            for entry in list(os.scandir(self._root)):
                if entry.name.startswith(self._prefix):
                    # This fails on links and files.
                    shutil.rmtree(entry.path, ignore_errors=True)
                    with contextlib.suppress(OSError):
                        os.unlink(entry.path)
            self.trash.clear()

    @contextmanager
    def directory(self, *, reuse: Container[str] | None = None) -> Generator[Path]:
        """See `Area.staging`."""
        self._reuses = reuse is not None
        # The save may need the space; another thread may be sweeping already.
        if reuse is None and self._sweeping.acquire(blocking=False):
            try:
                self.sweep(spare=True)
            finally:
                self._sweeping.release()
        path = self.made() if reuse is None else self._cleared(reuse)
        try:
            yield path
        except BaseException:
            if path not in self._spared:
                shutil.rmtree(path, ignore_errors=True)
                if reuse is None:  # another process may have written there meanwhile
                    self.trash.append(path)
            raise
        self.trash += self._spared  # a later save is on disk
        self._spared.clear()
        self.trash.append(path)

    def made(self) -> Path:
        """Make a new directory."""
        path = self._root / f"{self._prefix}{uuid.uuid4().hex[:12]}"
        path.mkdir()
        return path

    def _cleared(self, names: Container[str]) -> Path:
        """Return an old directory that can be written over, or make a new one."""
        while self.trash:
            path = self.trash.pop()
            if not path.is_dir():
                continue
            try:
                keep_only(path / "new", names)
            except OSError:  # somebody has made a part of it immutable
                shutil.rmtree(path, ignore_errors=True)
            else:
                return path
        return self.made()

    def spare(self, directory: Path) -> None:
        """Keep a directory that somebody may still need, until a later save."""
        self._spared.append(directory)

    def sweep(self, *, spare: bool = True) -> None:
        """See `Area.sweep`."""
        kept, left = int(spare and self._reuses), list[Path]()
        with self._sweeping:
            while len(self.trash) > kept:
                shutil.rmtree(self.trash[0], ignore_errors=True)
                if self.trash[0].exists():  # the next sweep tries again
                    left.append(self.trash[0])
                del self.trash[0]
            self.trash += left


def discard(trash: list[Path], owner: int) -> None:
    """Delete directories that nobody has deleted; in their own process alone."""
    if owner == os.getpid():
        for path in trash:
            shutil.rmtree(path, ignore_errors=True)
