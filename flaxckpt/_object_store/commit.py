"""Series of checkpoints in an object store, and the directory that mirrors one.

Each process that writes or lists checkpoints in a store has a directory of its own on
the disk, in which the record of each is where the checkpoint would be, and what is
being written. So all else goes by directories.

In the store, below the series' root (see `_template`):

- `NAME/TAG-UNIQUE/…`: the files of one checkpoint, never written over;
- `.flaxckpt-current/NAME`: which of those is the checkpoint of that name, and its
  record. It is written last, and replaced whole, so a checkpoint is there with all its
  files or not at all, and the one before it is until then;
- `.flaxckpt-TAG-doubtful/UNIQUE`: names files that are being written, or about to be
  deleted: those of no checkpoint, garbage if nobody writes the series;
- `.flaxckpt-TAG.lock`: who writes it; see `_lease`.
"""

import functools
import os
import shutil
import uuid
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from etils import epath

from flaxckpt._disk.commit import Area, OccupiedError
from flaxckpt._disk.record import HIDDEN_PREFIX, RECORD_FILE, series_in
from flaxckpt._object_store.lease import Lease, acquire_lease, drop_lease, release_lease
from flaxckpt._object_store.objects import Objects
from flaxckpt._object_store.pointer import Pointer, key_of, read_pointers, write_record
from flaxckpt._object_store.scratch import scratch, url_of
from flaxckpt._runtime.locks import new_lock
from flaxckpt.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointLockedError,
)

# Held while a pointer is written and the directory follows, and while it is read anew.
_MOVING = new_lock()
_KNOWN: defaultdict[Path, set[str]] = defaultdict(set)  # names with a record here


class Mirror(Area):
    """Where one series is written that is in an object store.

    What is put in its place here is a checkpoint's record alone, once all of it is in
    the store.
    """

    is_mirror = True

    def __init__(
        self, root: Path, series: Sequence[str], depth: int, *, sync: bool
    ) -> None:
        """Describe the area; see `Area`."""
        self._objects = Objects(url_of(root))
        super().__init__(root, series, depth, sync=False)
        del sync  # what counts is what the store has
        self._doubtful = f"{self._staging}doubtful"
        self._lease: Lease | None = None
        self._is_current = False
        self._place: tuple[Path, str] | None = None
        self._unused: list[str] = []  # directories to delete
        self._certain: list[str] = []  # directories that are doubtful no more
        self._deleting = new_lock()

    def refresh(self, *paths: Path) -> None:
        """Bring what is here to what is in the store, if others may have changed it.

        Args:
            *paths: Of what; if not given, of all.

        Raises:
            CheckpointLockedError: If this process was forked from the one that has made
                this: what reaches the store has threads.
        """
        if self.is_inherited:
            raise self.inherited()
        with _MOVING:
            if paths or (self._is_current and self._owner == os.getpid()):
                names = [path.relative_to(self._root).as_posix() for path in paths]
                found = read_pointers(self._objects, [key_of(name) for name in names])
                gone = set(names) - found.keys()
            else:
                found = read_pointers(self._objects, None)
                gone = _KNOWN[self._root] - found.keys()
                self._is_current = True
            # First what is new: another thread may be listing what is here.
            for name, pointer in found.items():
                write_record(self._root / name, pointer)
            for name in gone & _KNOWN[self._root]:
                shutil.rmtree(self._root / name, ignore_errors=True)
            _KNOWN[self._root] -= gone
            _KNOWN[self._root] |= found.keys()

    def shown(self, path: Path) -> Path:
        """Return a path as its users know it."""
        below = path.relative_to(self._root).parts
        return epath.Path("/".join([self._objects.url, *below]))  # pyright: ignore

    def put(self, written: Path, target: Path, *, only_over: str | None = None) -> None:
        """Move a finished directory to the store; see `Area.put`."""
        name, first = self._name(target), self._place_for(written, target)
        # Its first place was another series', but shares of it may be there.
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
            with _MOVING:
                before = self._point(name, pointer, only_over)
                super().put(stub, target)
                _KNOWN[self._root].add(name)
        except OccupiedError:
            raise  # the caller puts it elsewhere, or ends with it
        except BaseException:
            self._place = None
            self._is_current = False  # what the store has is not known
            raise
        self._place = None
        shutil.rmtree(stub, ignore_errors=True)
        self._certain.append(at)
        self._unused += [*before, first] if is_second else before

    def move(self, path: Path, target: Path) -> None:
        """Keep a checkpoint under another name; see `Area.move`.

        There are no renames in a store. The files are copied, and what is at `path`
        stays until something is put there.
        """
        self._shared.changes += 1
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
                super().remove(path)
        except BaseException:
            self._is_current = False
            raise
        self._unused += before

    def sweep(self, *, spare: bool = True) -> None:
        """Delete what was replaced or removed; see `Area.sweep`."""
        super().sweep(spare=spare)
        with self._deleting:
            while self._certain:
                if self._certain[0] not in self._unused:  # whose notes go with them
                    self._objects.delete(self._note_of(self._certain[0]))
                del self._certain[0]
            while self._unused:
                self._delete_files(self._unused[0])
                del self._unused[0]

    def meeting_place(self, written: Path, target: Path) -> str:
        """Say where other processes put their shares; see `Area.meeting_place`."""
        place = self._place_for(written, target)
        self._check_lease()
        self._doubt(place)
        return place

    @contextmanager
    def share(self, place: str) -> Generator[Path]:
        """Make a directory for this process's share; see `Area.share`."""
        with scratch() as directory:
            yield directory
            self._objects.upload(directory, place)

    # ---- the lock --------------------------------------------------------------------

    def _acquire(self) -> bool:
        key, holder = self._lock.name, self._holder
        self._lease, is_new = acquire_lease(self._objects, key, holder)
        return is_new

    def _is_held(self) -> bool:
        """Tell nothing: the lease is looked at whenever the store is changed."""
        return True

    def _spare_others(self, path: Path) -> None:
        """Check nothing: a store has no directories that would go with others."""

    def _note_cleared(self) -> None:
        assert self._lease is not None
        self._lease.is_cleared = True

    def _release(self) -> None:
        self._lease = None
        release_lease(self._objects, self._lock.name, self._holder)

    def _drop(self) -> Callable[[], None]:
        url = f"{self._objects.url}/{self._lock.name}"
        return functools.partial(drop_lease, url, self._holder)

    def _check_lease(self) -> None:
        if self._lease is None:  # by a save before
            raise CheckpointLockedError(self._objects.url, "", 0)
        try:
            self._lease.check()
        except CheckpointLockedError:
            self._owner = 0  # so the next save takes it anew, or is told whose it is
            self._is_current = False
            self._release()
            raise

    def _clear_up(self) -> None:
        super()._clear_up()
        self._is_current = False
        self.refresh()
        keys = self._objects.keys_below(self._doubtful)
        for key, content in self._objects.read_all(keys).items():
            self._settle(key, content.decode())

    def _settle(self, key: str, at: str) -> None:
        """Find out whether files are a checkpoint's, and delete what is none's."""
        pointer = key_of(at.rpartition("/")[0])
        found = self._objects.read(pointer)
        if found.content is None:
            self._delete_files(at)
            return
        current = Pointer.parse(found.content)
        if current.at == at:
            self._objects.delete(key)
        elif current.at:  # of a damaged one, nobody knows
            # Written anew, it can't be changed by one who was taken for dead, any more.
            content = current.encoded()
            if self._objects.write_over(pointer, content, found.generation):
                self._delete_files(at)

    # ---- in the store ----------------------------------------------------------------

    def _point(
        self, name: str, pointer: Pointer | None, only_over: str | None = None
    ) -> list[str]:
        """Change a pointer, or delete it; return the directory of before, if any.

        That is doubtful from then on.

        Raises:
            CheckpointLockedError: If another process has taken the lock.
            OccupiedError: If what is there is of none of the series `only_over`.
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
        written = self._objects.write_over(key, content, found.generation)
        if written is None:
            now = self._objects.read(key)
            if now.content != content:
                if only_over is not None:
                    raise OccupiedError(name)
                raise CheckpointError(
                    f"{self._objects.url}/{name} was changed by another process "
                    "meanwhile, and is as that one left it."
                )
            written = now.generation  # it is there, and the answer has got lost
        try:
            self._check_lease()  # or another process has deleted what was doubtful
        except CheckpointLockedError:
            self._objects.write_over(key, found.content, written)
            raise
        return [before] if before else []

    def _name(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()

    def _place_for(self, written: Path, target: Path) -> str:
        """Return where in the store a directory that is being written will be."""
        if self._place is None or self._place[0] != written:
            self._place = written, self._fresh_place(target)
        return self._place[1]

    def _fresh_place(self, target: Path) -> str:
        tag = self._staging.removeprefix(HIDDEN_PREFIX)
        return f"{self._name(target)}/{tag}{uuid.uuid4().hex[:12]}"

    def _doubt(self, at: str) -> None:
        self._objects.write(self._note_of(at), at.encode())

    def _note_of(self, at: str) -> str:
        return f"{self._doubtful}/{at.rpartition('/')[2]}"

    def _delete_files(self, at: str) -> None:
        self._objects.delete_below(at)
        self._objects.delete(self._note_of(at))
