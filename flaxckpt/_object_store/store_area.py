"""Write series of checkpoints in an object store, by way of a local mirror.

Each process that writes or lists checkpoints in a store has its own directory on the
disk, the mirror. It holds each checkpoint's record where the checkpoint would be, and
the files that are being written. So the rest of the package works on directories.

In the store, below the series' root (see `_decision.template`):

- `NAME/TAG-UNIQUE/*`: the files of one checkpoint, never written over;
- `.flaxckpt-current/NAME`: the pointer: the directory of NAME's files, and NAME's
  record. It is written last and replaced whole, so readers find the old checkpoint
  until then and the new one from then on, each with all its files;
- `.flaxckpt-TAG-doubtful/UNIQUE`: a note that names a directory whose files are being
  written or about to be deleted. If no pointer names the directory, its files are
  garbage once no process writes the series;
- `.flaxckpt-TAG.lock`: the lock; see `lease`;
- `.flaxckpt-TAG.finished`: the mark of a run that has ended.
"""

import shutil
import uuid
from collections import defaultdict
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from etils import epath

from flaxckpt._disk.area import Area, OccupiedError
from flaxckpt._disk.disk_area import DiskArea
from flaxckpt._disk.record import HIDDEN_PREFIX, RECORD_FILE, series_in
from flaxckpt._disk.series_names import mark_of
from flaxckpt._object_store.lease import StoreLock
from flaxckpt._object_store.objects import Objects
from flaxckpt._object_store.pointer import Pointer, key_of, read_pointers, write_record
from flaxckpt._object_store.scratch import scratch, url_of
from flaxckpt._runtime.locks import new_lock
from flaxckpt.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointLockedError,
)

# Held while a pointer and the mirror change, and while the mirror is refreshed.
_MOVING = new_lock()
_KNOWN: defaultdict[Path, set[str]] = defaultdict(set)  # names with a record here


class StoreArea(Area):
    """Where one series in an object store is written; see `Area`.

    `commit` uploads a checkpoint, and then puts its record alone in the mirror.
    """

    is_mirror, sync = True, False  # only what the store has must survive

    def __init__(self, root: Path, series: Sequence[str], depth: int) -> None:
        """Describe the area; see `DiskArea`."""
        self._root, self._objects = root, Objects(url_of(root))
        self._lock = StoreLock(self._objects)
        mirrors = self._lock, self._objects.url
        self._mirror = DiskArea(root, series, depth, sync=False, mirrors=mirrors)
        self.claim, self.staging = self._mirror.claim, self._mirror.staging
        self._doubtful = f"{self._mirror.prefix}doubtful"
        self._mark = mark_of(series[0])
        self._is_current = False
        self._place: tuple[Path, str] | None = None
        self._unused: list[str] = []  # directories to delete
        self._certain: list[str] = []  # directories whose notes to delete
        self._deleting = new_lock()

    def open(self) -> None:
        """See `Area.open`."""
        self._mirror.open(self._clear_up)

    def refresh(self, *paths: Path) -> None:
        """See `Area.refresh`: update the mirror from the store."""
        if self.claim.is_inherited:
            raise self.claim.inherited_error()
        with _MOVING:
            if paths or (self._is_current and self.claim.is_taken):
                names = [path.relative_to(self._root).as_posix() for path in paths]
                found = read_pointers(self._objects, [key_of(name) for name in names])
                gone = set(names) - found.keys()
            else:
                found = read_pointers(self._objects, None)
                gone = _KNOWN[self._root] - found.keys()
                self._is_current = True
            # New records come first: another thread may be listing the mirror.
            for name, pointer in found.items():
                write_record(self._root / name, pointer)
            for name in gone & _KNOWN[self._root]:
                shutil.rmtree(self._root / name, ignore_errors=True)
            _KNOWN[self._root] -= gone
            _KNOWN[self._root] |= found.keys()

    def shown(self, path: Path) -> Path:
        """Return a path as users see it in messages: as a URL."""
        below = path.relative_to(self._root).parts
        return epath.Path("/".join([self._objects.url, *below]))  # pyright: ignore

    def commit(
        self, written: Path, target: Path, *, only_over: str | None = None
    ) -> None:
        """Upload a finished directory, and point to it; see `Area.commit`."""
        name, first = self._name(target), self._place_for(written, target)
        # If another series had the first name, the files are at `first` already.
        is_second = first.rpartition("/")[0] != name
        at = self._fresh_place(target) if is_second else first
        self._check_lease()
        try:
            self._doubt(at)
            if is_second:
                self._objects.copy(first, at)
            else:
                self._objects.upload(written, at)
            pointer = Pointer(at, (written / RECORD_FILE).read_text())
            stub = written.with_name("record")
            write_record(stub, pointer)
            self._objects.delete(self._mark)
            with _MOVING:
                before = self._point(name, pointer, only_over)
                self._mirror.commit(stub, target)
                _KNOWN[self._root].add(name)
        except OccupiedError:
            raise  # the caller puts it elsewhere, or fails
        except BaseException:
            self._place = None
            self._is_current = False  # the state of the store is unknown
            raise
        self._place = None
        shutil.rmtree(stub, ignore_errors=True)
        self._certain.append(at)
        self._unused += [*before, first] if is_second else before

    def finish(self) -> None:
        """See `Area.finish`."""
        self._check_lease()
        self._objects.write(self._mark, b"")

    @property
    def is_finished(self) -> bool:
        """See `Area.is_finished`."""
        if self.claim.is_inherited:
            raise self.claim.inherited_error()
        return self._objects.read(self._mark).content is not None

    def swap(self, new: Path, path: Path) -> None:
        """Refuse: a store has no renames."""
        raise NotImplementedError

    def move(self, path: Path, target: Path) -> None:
        """Copy a checkpoint to another name; see `Area.move`.

        Raises:
            FileExistsError: If a checkpoint is at `target`.
        """
        self.claim.count_change()
        name, at = self._name(target), self._fresh_place(target)
        self._check_lease()
        try:
            found = self._objects.read(key_of(self._name(path)))
            if found.content is None:
                raise FileNotFoundError(path)
            pointer = Pointer.parse(found.content)
            if not pointer.at:
                problem = "the object that says where its files are cannot be read"
                raise CheckpointCorruptError(str(self.shown(path)), problem)
            if self._objects.read(key_of(name)).content is not None:
                raise FileExistsError(target)
            self._doubt(at)
            self._objects.copy(pointer.at, at)
            moved = Pointer(at, pointer.record)
            with _MOVING:
                self._point(name, moved)
                write_record(target, moved)
                _KNOWN[self._root].add(name)
        except BaseException:
            self._is_current = False
            raise
        self._certain.append(at)

    def remove(self, path: Path) -> None:
        """Delete a checkpoint; see `Area.remove`."""
        name = self._name(path)
        try:
            with _MOVING:
                before = self._point(name, None)
                _KNOWN[self._root].discard(name)
                self._mirror.remove(path)
        except BaseException:
            self._is_current = False
            raise
        self._unused += before

    def sweep(self, *, spare: bool = True) -> None:
        """Delete replaced and removed checkpoints; see `Area.sweep`."""
        self._mirror.sweep(spare=spare)
        with self._deleting:
            while self._certain:
                # The note of an unused directory goes after the files.
                if self._certain[0] not in self._unused:
                    self._objects.delete(self._note_of(self._certain[0]))
                del self._certain[0]
            while self._unused:
                self._delete_files(self._unused[0])
                del self._unused[0]

    def spare(self, directory: Path) -> None:
        """See `Area.spare`."""
        self._mirror.spare(directory)

    def meeting_place(self, written: Path, target: Path) -> str:
        """Return where the processes upload their shares; see `Area.meeting_place`."""
        place = self._place_for(written, target)
        self._check_lease()
        self._doubt(place)
        return place

    @contextmanager
    def share(self, place: str) -> Generator[Path]:
        """Yield a directory for this process's share, and upload that; see `Area`."""
        with scratch() as directory:
            yield directory
            self._objects.upload(directory, place)

    # ---- the lock --------------------------------------------------------------------

    def _check_lease(self) -> None:
        lease = self._lock.lease
        if lease is None:  # an earlier save has lost it
            raise CheckpointLockedError(self._objects.url, "", 0)
        try:
            lease.check()
        except CheckpointLockedError:
            self._is_current = False
            self.claim.give_back()  # the next save takes it anew, or names its owner
            raise

    def _clear_up(self) -> None:
        self._is_current = False
        self.refresh()
        keys = self._objects.keys_below(self._doubtful)
        for key, content in self._objects.read_all(keys).items():
            self._settle(key, content.decode())

    def _settle(self, key: str, at: str) -> None:
        """Delete a doubtful directory, or its note if a pointer names the directory."""
        pointer = key_of(at.rpartition("/")[0])
        found = self._objects.read(pointer)
        if found.content is None:
            self._delete_files(at)
            return
        current = Pointer.parse(found.content)
        if current.at == at:
            self._objects.delete(key)
        elif current.at:  # a damaged pointer does not tell
            # After this write, a late write by the lock's previous owner fails.
            content = current.encoded()
            if self._objects.write_if_unchanged(pointer, content, found.generation):
                self._delete_files(at)

    # ---- in the store ----------------------------------------------------------------

    def _point(
        self, name: str, pointer: Pointer | None, only_over: str | None = None
    ) -> list[str]:
        """Change or delete a pointer; return the directory that it named, if any.

        That directory gets a note as doubtful first.

        Raises:
            CheckpointLockedError: If another process has taken the lock.
            OccupiedError: If the checkpoint there is not of the series `only_over`.
            CheckpointError: If another process has changed the pointer meanwhile.
        """
        key = key_of(name)
        found = self._objects.read(key)
        there = None if found.content is None else Pointer.parse(found.content)
        if only_over is not None and there and series_in(there.record) != only_over:
            raise OccupiedError(name)
        before = there.at if there else ""
        if before:
            self._doubt(before)
        content = None if pointer is None else pointer.encoded()
        self._check_lease()
        written = self._objects.write_if_unchanged(key, content, found.generation)
        if written is None:
            now = self._objects.read(key)
            if now.content != content:
                if only_over is not None:
                    raise OccupiedError(name)
                raise CheckpointError(
                    f"{self._objects.url}/{name} was changed by another process "
                    "meanwhile, and is as that one left it."
                )
            written = now.generation  # the write succeeded, and its answer was lost
        try:
            self._check_lease()  # a new owner may have deleted the files
        except CheckpointLockedError:
            self._objects.write_if_unchanged(key, found.content, written)
            raise
        return [before] if before else []

    def _name(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()

    def _place_for(self, written: Path, target: Path) -> str:
        """Return the place in the store for a directory that is being written."""
        if self._place is None or self._place[0] != written:
            self._place = written, self._fresh_place(target)
        return self._place[1]

    def _fresh_place(self, target: Path) -> str:
        tag = self._mirror.prefix.removeprefix(HIDDEN_PREFIX)
        return f"{self._name(target)}/{tag}{uuid.uuid4().hex[:12]}"

    def _doubt(self, at: str) -> None:
        self._objects.write(self._note_of(at), at.encode())

    def _note_of(self, at: str) -> str:
        return f"{self._doubtful}/{at.rpartition('/')[2]}"

    def _delete_files(self, at: str) -> None:
        self._objects.delete_below(at)
        self._objects.delete(self._note_of(at))
