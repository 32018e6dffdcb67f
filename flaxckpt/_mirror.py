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
import tempfile
import threading
import uuid
from collections import defaultdict
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from etils import epath

from flaxckpt import _lease
from flaxckpt._commit import Area
from flaxckpt._objects import Objects
from flaxckpt._record import (
    HIDDEN_PREFIX,
    LEAVES_FILE,
    RECORD_FILE,
    Infos,
    list_below,
)
from flaxckpt.errors import (
    CheckpointCorruptError,
    CheckpointNotFoundError,
    TemplateError,
)

_CURRENT = f"{HIDDEN_PREFIX}current"
_BASE = "flaxckpt-mirror-"
_ORBAX_FILE = "_CHECKPOINT_METADATA"
# Held while a pointer is written and the directory follows, and while it is read anew.
_MOVING = threading.RLock()
_KNOWN: defaultdict[Path, set[str]] = defaultdict(set)  # names with a record here


@dataclasses.dataclass(frozen=True)
class Pointer:
    """Which files a checkpoint's are.

    Attributes:
        at: The directory that they are in, below the series' root.
        record: Its record.
    """

    at: str
    record: str

    def encoded(self) -> bytes:
        """Return it as JSON."""
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def parse(cls, content: bytes) -> "Pointer":
        """Return what `encoded` has returned as bytes."""
        fields = json.loads(content)
        return cls(fields["at"], fields["record"])


def mirrored(filepath: str) -> str:
    """Return the path on this machine that mirrors one in an object store.

    Args:
        filepath: A template of one.

    Raises:
        TemplateError: If it names no bucket, or nothing in it.
    """
    scheme, _, rest = filepath.partition("://")
    bucket, _, path = rest.partition("/")
    if not bucket or "{" in bucket or not path.strip("/"):
        raise TemplateError(
            filepath, f'must be "{scheme}://bucket/path", with a bucket\'s name.'
        )
    return f"{_base(os.getpid())}/{scheme}/{rest}"


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
        descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
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
        super().__init__(root, series, depth, sync=False)
        del sync  # what counts is what the store has
        self._objects = Objects(url_of(root))
        self._doubtful_keys = f"{self._staging}doubtful"
        self._remote_trash: list[str] = []
        self._place: tuple[Path, str] | None = None
        self._is_current = False

    def refresh(self) -> None:
        """Bring what is here to what is in the store, if others may have changed it."""
        if self._is_current and self._owner == os.getpid():
            return
        with _MOVING:
            found = _pointers(self._objects, "")
            for name in _KNOWN[self._root] - found.keys():
                shutil.rmtree(self._root / name, ignore_errors=True)
            _KNOWN[self._root] = set(found)
            for name, pointer in found.items():
                _write_record(self._root / name, pointer)
        self._is_current = True

    def shown(self, path: Path) -> Path:
        """Return a path as its users know it."""
        return epath.Path(url_of(path))  # pyright: ignore

    def put(self, written: Path, target: Path) -> None:
        """Move a finished directory to the store; see `Area.put`."""
        name = target.relative_to(self._root).as_posix()
        at, self._place = self.place_for(written, target), None
        self._check_lease()
        try:
            self._doubt(at)
            self._objects.upload(written, at)
            record = (written / RECORD_FILE).read_text()
            with _MOVING:
                before = self._objects.read(f"{_CURRENT}/{name}").content
                if before is not None:
                    self._doubt(Pointer.parse(before).at)
                pointer = Pointer(at, record)
                self._check_lease()
                self._objects.write(f"{_CURRENT}/{name}", pointer.encoded())
                self._check_lease()  # or another one has deleted what was doubtful
                stub = written.with_name("record")
                _write_record(stub, pointer)
                super().put(stub, target)
                _KNOWN[self._root].add(name)
        except BaseException:
            self._is_current = False  # what the store has is not known
            raise
        shutil.rmtree(stub, ignore_errors=True)
        self._objects.delete(self._doubt_of(at))
        if before is not None:
            self._remote_trash.append(Pointer.parse(before).at)

    def meeting_place(self, written: Path, target: Path) -> str:
        """Say where other processes put their shares; see `Area.meeting_place`."""
        place = self.place_for(written, target)
        self._check_lease()
        self._doubt(place)
        return place

    @contextmanager
    def share(self, place: str) -> Generator[Path]:
        """Make a directory for this process's share; see `Area.share`."""
        with tempfile.TemporaryDirectory(dir=_base(os.getpid())) as directory:
            yield Path(directory)
            self._objects.upload(Path(directory), place)

    def place_for(self, written: Path, target: Path) -> str:
        """Return where in the store a directory that is being written will be.

        Args:
            written: The directory.
            target: Its place.
        """
        if self._place is None or self._place[0] != written:
            name = target.relative_to(self._root).as_posix()
            tag = self._staging.removeprefix(HIDDEN_PREFIX)
            self._place = written, f"{name}/{tag}{uuid.uuid4().hex[:12]}"
        return self._place[1]

    def remove(self, path: Path) -> None:
        """Delete a checkpoint; see `Area.remove`."""
        name = path.relative_to(self._root).as_posix()
        self._check_lease()
        try:
            with _MOVING:
                before = self._objects.read(f"{_CURRENT}/{name}").content
                if before is not None:
                    self._doubt(Pointer.parse(before).at)
                    self._objects.delete(f"{_CURRENT}/{name}")
                    self._remote_trash.append(Pointer.parse(before).at)
                _KNOWN[self._root].discard(name)
                super().remove(path)
        except BaseException:
            self._is_current = False
            raise

    def sweep(self, *, spare: bool = True) -> None:
        """Delete what was replaced or removed; see `Area.sweep`."""
        super().sweep(spare=spare)
        while self._remote_trash:
            self._delete_files(self._remote_trash[0])
            del self._remote_trash[0]

    def _acquire(self) -> bool:
        return _lease.acquire(self._objects, self._lock.name)

    def _release(self) -> None:
        _lease.release(self._objects, self._lock.name)

    def _check_lease(self) -> None:
        _lease.check(self._objects, self._lock.name)

    def _clear_up(self) -> None:
        super()._clear_up()
        self._is_current = False
        self.refresh()
        doubtful = self._objects.read_all(self._objects.keys_below(self._doubtful_keys))
        current = {pointer.at for pointer in _pointers(self._objects, "").values()}
        for key, content in doubtful.items():
            at = content.decode()
            if at in current:
                self._objects.delete(key)
            else:
                self._delete_files(at)

    def _doubt(self, at: str) -> None:
        self._objects.write(self._doubt_of(at), at.encode())

    def _doubt_of(self, at: str) -> str:
        return f"{self._doubtful_keys}/{at.rpartition('/')[2]}"

    def _delete_files(self, at: str) -> None:
        self._objects.delete_below(at)
        self._objects.delete(self._doubt_of(at))


def _pointers(objects: Objects, directory: str) -> dict[str, Pointer]:
    """Read all pointers of a series' root, by the names of what they point to."""
    prefix = f"{directory}/{_CURRENT}" if directory else _CURRENT
    found = objects.read_all(objects.keys_below(prefix))
    return {
        key.removeprefix(f"{prefix}/"): Pointer.parse(content)
        for key, content in found.items()
    }


def _write_record(directory: Path, pointer: Pointer) -> None:
    """Write a checkpoint's record, unless it is there."""
    path, content = directory / RECORD_FILE, pointer.record.encode()
    if path.exists() and path.read_bytes() == content:
        return
    directory.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{RECORD_FILE}.{uuid.uuid4().hex}")
    new.write_bytes(content)
    new.replace(path)


# ---- without a series ----------------------------------------------------------------


def listed(url: str) -> tuple[Infos, list[CheckpointCorruptError]]:
    """List the checkpoints below a URL, as `list_below` does at any depth.

    Lists all objects there.
    """
    objects = Objects(url)
    keys = [key for key in objects.keys_below("") if _CURRENT in key.split("/")]
    with tempfile.TemporaryDirectory(prefix="flaxckpt-") as directory:
        here = Path(directory)
        for key, content in objects.read_all(keys).items():
            parts = [part for part in key.split("/") if part != _CURRENT]
            _write_record(here.joinpath(*parts), Pointer.parse(content))
        infos, damaged = list_below(directory, None)

    def shown(path: Path | str) -> Path:
        below = Path(path).relative_to(here).as_posix()
        return epath.Path(f"{objects.url}/{below}")  # pyright: ignore

    infos = tuple(dataclasses.replace(info, path=shown(info.path)) for info in infos)
    return infos, [
        CheckpointCorruptError(str(shown(error.path)), error.problem)
        for error in damaged
    ]


class Source:
    """A checkpoint in a store, of which as much is on the disk as was needed.

    Attributes:
        url: Its URL.
        directory: Where that is on the disk.
    """

    def __init__(self, url: str, scratch: str) -> None:
        """Look the checkpoint up, and get what tells what is in it.

        Args:
            url: Of a checkpoint: of flaxckpt's, or of plain Orbax's.
            scratch: A directory in which nothing is.

        Raises:
            CheckpointNotFoundError: If there is none.
            CheckpointError: If the store cannot be reached.
        """
        self.url = url.rstrip("/")
        scheme, _, rest = self.url.partition("://")
        bucket, _, self._path = rest.partition("/")
        self._bucket = Objects(f"{scheme}://{bucket}")
        self._at = _found(self._bucket, self._path)
        self.directory = Path(scratch, Path(self._path).name)
        self.directory.mkdir()
        self._is_complete = False
        for name in (RECORD_FILE, LEAVES_FILE):
            content = self.read(name)
            if content is not None:
                (self.directory / name).write_bytes(content)
        if not (self.directory / LEAVES_FILE).exists():  # plain Orbax's
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
    with tempfile.TemporaryDirectory(prefix="flaxckpt-") as scratch:
        source = Source(url, scratch)
        _SOURCES[source.directory] = source
        try:
            yield source
        finally:
            del _SOURCES[source.directory]


def source_of(path: Path) -> Source | None:
    """Return what is being read of at a path; None for what is on the disk anyway."""
    return _SOURCES.get(path)


_SOURCES: dict[Path, Source] = {}


def _found(bucket: Objects, path: str) -> str:
    """Return the directory that the files of the checkpoint at a path are in."""
    parts = path.split("/")
    pointers = [
        "/".join([*parts[:depth], _CURRENT, *parts[depth:]])
        for depth in reversed(range(len(parts)))
    ]
    for key, content in bucket.read_all(pointers).items():
        root = key[: key.index(_CURRENT)]
        return root + Pointer.parse(content).at
    if bucket.read(f"{path}/{_ORBAX_FILE}").content is not None:
        return path
    beside = "/".join([*parts[:-1], _CURRENT])
    names = [key.rpartition("/")[2] for key in bucket.keys_below(beside)]
    raise CheckpointNotFoundError(f"{bucket.url}/{path}", tuple(names))
