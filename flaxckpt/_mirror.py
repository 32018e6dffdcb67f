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

import atexit
import dataclasses
import fcntl
import functools
import json
import os
import shutil
import socket
import tempfile
import uuid
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from etils import epath

from flaxckpt import _lease
from flaxckpt._commit import Area
from flaxckpt._locks import new_lock
from flaxckpt._objects import Objects
from flaxckpt._open import is_inside
from flaxckpt._patience import looks
from flaxckpt._record import (
    HIDDEN_PREFIX,
    LEAVES_FILE,
    RECORD_FILE,
    Infos,
    LeftOut,
    list_below,
)
from flaxckpt._template import split_url
from flaxckpt.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointLockedError,
    CheckpointNotFoundError,
    TemplateError,
)

_CURRENT = f"{HIDDEN_PREFIX}current"
_BASE = f"flaxckpt-mirror-{socket.gethostname()}-"  # others' locks are not seen here
_ORBAX_FILE = "_CHECKPOINT_METADATA"
# Held while a pointer is written and the directory follows, and while it is read anew.
_MOVING = new_lock()
_KNOWN: defaultdict[Path, set[str]] = defaultdict(set)  # names with a record here


@dataclasses.dataclass(frozen=True)
class Pointer:
    """Which files a checkpoint's are.

    Attributes:
        at: The directory that they are in, below the series' root; "" where that is not
            known, because the pointer is damaged.
        record: The checkpoint's record; what there is in its place, if so.
    """

    at: str
    record: str

    def encoded(self) -> bytes:
        """Return it as JSON, other than any before."""
        return json.dumps({**vars(self), "id": uuid.uuid4().hex}).encode()

    @classmethod
    def parse(cls, content: bytes) -> "Pointer":
        """Return what `encoded` has returned as bytes."""
        try:
            fields = json.loads(content)
            at, record = str(fields["at"]), str(fields["record"])
            if is_inside(at):  # or what is not its own would be deleted with it
                return cls(at, record)
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        return cls("", content.decode(errors="replace"))


def mirrored(filepath: str) -> str:
    """Return the path on this machine that mirrors one in an object store.

    Args:
        filepath: A template of one.

    Raises:
        TemplateError: If it names no bucket, or nothing in it.
    """
    scheme, bucket, path = split_url(filepath)
    if "{" in bucket or {"", ".", ".."} & {bucket, *path.split("/")}:
        raise TemplateError(
            filepath,
            f'must be "{scheme}://bucket/path", with a bucket\'s name, and without '
            "empty parts, '.' and '..'.",
        )
    return f"{_base(os.getpid())}/{scheme}/{bucket}/{path}"


@functools.cache
def _base(process: int) -> Path:
    """Make this process's directory of mirrors, which goes when the process ends.

    If it was killed, the next one deletes it: what is not locked is nobody's.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{_BASE}*"):
        descriptor = _locked(left)
        if descriptor is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(descriptor)
    base = Path(tempfile.mkdtemp(prefix=_BASE))
    while _locked(base) is None or not base.is_dir():  # another one was faster
        base = Path(tempfile.mkdtemp(prefix=_BASE))
    atexit.register(_delete, base, process)
    return base


def _locked(directory: Path) -> int | None:
    """Lock a directory for as long as this process lives; None if it is locked."""
    try:
        flags = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC  # whoever made it
        descriptor = os.open(directory, os.O_RDONLY | flags)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _delete(base: Path, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(base, ignore_errors=True)


def url_of(path: Path) -> str:
    """Return the URL that a path mirrors."""
    scheme, *parts = path.relative_to(_base(os.getpid())).parts
    return f"{scheme}://{'/'.join(parts)}"


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
        self._lease: _lease.Lease | None = None
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
                found = _read_pointers(self._objects, [_key_of(name) for name in names])
                gone = set(names) - found.keys()
            else:
                found = _read_pointers(self._objects, None)
                gone = _KNOWN[self._root] - found.keys()
                self._is_current = True
            # First what is new: another thread may be listing what is here.
            for name, pointer in found.items():
                _write_record(self._root / name, pointer)
            for name in gone & _KNOWN[self._root]:
                shutil.rmtree(self._root / name, ignore_errors=True)
            _KNOWN[self._root] -= gone
            _KNOWN[self._root] |= found.keys()

    def shown(self, path: Path) -> Path:
        """Return a path as its users know it."""
        below = path.relative_to(self._root).parts
        return epath.Path("/".join([self._objects.url, *below]))  # pyright: ignore

    def put(self, written: Path, target: Path) -> None:
        """Move a finished directory to the store; see `Area.put`."""
        name, at = self._name(target), self._place_for(written, target)
        self._place = None
        self._check_lease()
        try:
            self._doubt(at)
            self._objects.upload(written, at)
            pointer = Pointer(at, (written / RECORD_FILE).read_text())
            stub = written.with_name("record")
            _write_record(stub, pointer)
            with _MOVING:
                before = self._point(name, pointer)
                super().put(stub, target)
                _KNOWN[self._root].add(name)
        except BaseException:
            self._is_current = False  # what the store has is not known
            raise
        shutil.rmtree(stub, ignore_errors=True)
        self._certain.append(at)
        self._unused += before

    def move(self, path: Path, target: Path) -> None:
        """Keep a checkpoint under another name; see `Area.move`.

        There are no renames in a store. The files are copied, by way of this machine,
        and what is at `path` stays until something is put there.
        """
        found = self._objects.read(_key_of(self._name(path)))
        if found.content is None:  # deleted meanwhile: there is nothing to keep
            return
        pointer = Pointer.parse(found.content)
        name, at = self._name(target), self._fresh_place(target)
        self._check_lease()
        try:
            self._doubt(at)
            with scratch() as copies:
                self._objects.download(pointer.at, copies)
                self._objects.upload(copies, at)
            moved = Pointer(at, pointer.record)
            with _MOVING:
                self._unused += self._point(name, moved)
                _write_record(target, moved)
                _KNOWN[self._root].add(name)
        except BaseException:
            self._is_current = False
            raise
        self._shared.changes += 1
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
        self._lease, is_new = _lease.acquire(self._objects, key, holder)
        return is_new

    def _note_cleared(self) -> None:
        assert self._lease is not None
        self._lease.is_cleared = True

    def _release(self) -> None:
        self._lease = None
        _lease.release(self._objects, self._lock.name, self._holder)

    def _drop(self) -> Callable[[], None]:
        url = f"{self._objects.url}/{self._lock.name}"
        return functools.partial(_lease.drop, url, self._holder)

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
        pointer = _key_of(at.rpartition("/")[0])
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

    def _point(self, name: str, pointer: Pointer | None) -> list[str]:
        """Change a pointer, or delete it; return the directory of before, if any.

        That is doubtful from then on.

        Raises:
            CheckpointLockedError: If another process has taken the lock.
        """
        key = _key_of(name)
        found = self._objects.read(key)
        before = "" if found.content is None else Pointer.parse(found.content).at
        if before:
            self._doubt(before)
        content = None if pointer is None else pointer.encoded()
        self._check_lease()
        written = self._objects.write_over(key, content, found.generation)
        if written is None:
            now = self._objects.read(key)
            if now.content != content:
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


def _key_of(name: str) -> str:
    return f"{_CURRENT}/{name}"


def _read_pointers(objects: Objects, keys: Sequence[str] | None) -> dict[str, Pointer]:
    """Read pointers, by the names of what they point to; all if `keys` is None."""
    if keys is None:
        found = _read_listed(objects, lambda: objects.keys_below(_CURRENT))
    else:
        found = objects.read_all(keys)
    return {
        key.removeprefix(f"{_CURRENT}/"): Pointer.parse(content)
        for key, content in found.items()
    }


def _read_listed(
    objects: Objects, listed: Callable[[], Sequence[str]]
) -> dict[str, bytes]:
    """Read the objects that a listing names, in which nothing is missing.

    If a writer has deleted one before it is read, it may have written another one since
    the listing.

    Raises:
        CheckpointError: If that goes on.
    """
    for _ in looks():
        keys = listed()
        found = objects.read_all(keys)
        if len(found) == len(keys):
            return found
    raise CheckpointError(
        f"The checkpoints in {objects.url} were deleted faster than they could be "
        "read. List them again, or keep more of them (max_to_keep)."
    )


def _write_record(directory: Path, pointer: Pointer) -> None:
    """Write a checkpoint's record, unless it is there."""
    path, content = directory / RECORD_FILE, pointer.record.encode()
    if path.exists() and path.read_bytes() == content:
        return
    directory.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{RECORD_FILE}.{uuid.uuid4().hex}")
    new.write_bytes(content)
    new.replace(path)


@contextmanager
def scratch() -> Generator[Path]:
    """Have a directory for a while, which goes with this process at the latest."""
    with tempfile.TemporaryDirectory(dir=_base(os.getpid())) as directory:
        yield Path(directory)


# ---- without a series ----------------------------------------------------------------


def listed(url: str) -> tuple[Infos, list[LeftOut]]:
    """List the checkpoints below a URL, as `list_below` does at any depth.

    Lists all objects there.
    """
    objects = Objects(url)

    def pointers() -> list[str]:
        return [key for key in objects.keys_below("") if _CURRENT in key.split("/")]

    with scratch() as here:
        for key, content in _read_listed(objects, pointers).items():
            parts = [part for part in key.split("/") if part != _CURRENT]
            _write_record(here.joinpath(*parts), Pointer.parse(content))
        infos, damaged = list_below(str(here), None)

    def shown(path: Path | str) -> Path:
        below = Path(path).relative_to(here).as_posix()
        return epath.Path(f"{objects.url}/{below}")  # pyright: ignore

    infos = tuple(dataclasses.replace(info, path=shown(info.path)) for info in infos)
    return infos, [
        type(error)(str(shown(error.path)), error.problem) for error in damaged
    ]


class Source:
    """A checkpoint in a store, of which as much is on the disk as was needed.

    Attributes:
        url: Its URL.
        directory: Where that is on the disk.
    """

    def __init__(self, url: str, scratch: Path) -> None:
        """Look the checkpoint up.

        Args:
            url: Of a checkpoint: of flaxckpt's, or of plain Orbax's.
            scratch: A directory in which nothing is.

        Raises:
            CheckpointNotFoundError: If there is none.
            CheckpointError: If the store cannot be reached.
        """
        self.url = url.rstrip("/")
        scheme, bucket, self._path = split_url(url)
        self._bucket = Objects(f"{scheme}://{bucket}")
        self._at = _found(self._bucket, self._path)
        self.directory = scratch / Path(self._path).name
        self.directory.mkdir()
        self._is_complete = False

    def begin(self) -> None:
        """Get what tells what is in it.

        Raises:
            CheckpointCorruptError: If that is missing.
        """
        is_plain = self._at == self._path
        for name in (RECORD_FILE, LEAVES_FILE):
            content = self.read(name)
            if content is not None:
                (self.directory / name).write_bytes(content)
            elif not is_plain:
                raise CheckpointCorruptError(self.url, f"{name} is missing")
        if is_plain:
            self.complete()

    def read(self, key: str) -> bytes | None:
        """Read one of its files; None if it is not there."""
        return self._bucket.read(f"{self._at}/{key}").content

    def complete(self) -> None:
        """Have all of it on the disk."""
        if not self._is_complete:
            self._bucket.download(self._at, self.directory)
        self._is_complete = True

    def is_replaced(self) -> bool:
        """Tell whether another checkpoint is at the URL by now, or none."""
        try:
            return _found(self._bucket, self._path) != self._at
        except CheckpointNotFoundError:
            return True


@contextmanager
def fetched(url: str) -> Generator[Source]:
    """Have a checkpoint at hand for as long as it is read; see `Source`."""
    with scratch() as directory:
        source = Source(url, directory)
        try:
            _SOURCES[source.directory] = source
            yield source
        finally:
            _SOURCES.pop(source.directory, None)


def source_of(path: Path) -> Source | None:
    """Return what is being read of at a path; None for what is on the disk anyway."""
    return _SOURCES.get(path)


_SOURCES: dict[Path, Source] = {}


def _found(bucket: Objects, path: str) -> str:
    """Return the directory that the files of the checkpoint at a path are in.

    That of plain Orbax's is the path itself.
    """
    parts = path.split("/")
    pointers = [
        "/".join([*parts[:depth], _CURRENT, *parts[depth:]])
        for depth in reversed(range(len(parts)))
    ]
    for key, content in bucket.read_all(pointers).items():
        at = Pointer.parse(content).at
        if not at:
            raise CheckpointCorruptError(
                f"{bucket.url}/{path}", "what points to its files does not parse"
            )
        return key[: key.index(_CURRENT)] + at
    if bucket.read(f"{path}/{_ORBAX_FILE}").content is not None:
        return path
    beside = "/".join([*parts[:-1], _CURRENT])
    names = [key.rpartition("/")[2] for key in bucket.keys_below(beside)]
    raise CheckpointNotFoundError(f"{bucket.url}/{path}", tuple(names))
