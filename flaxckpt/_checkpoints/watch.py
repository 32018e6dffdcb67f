"""Follow a run: yield each of its checkpoints once it is on disk, until its end."""

import contextlib
import functools
import math
import os
import time
import warnings
from collections.abc import Iterator

from flaxckpt._checkpoints.found import found_at, has_mark, is_finished, root_of
from flaxckpt._checkpoints.listing import checked_path, listed
from flaxckpt._decision.scalars import is_real
from flaxckpt._disk.files import sync_path
from flaxckpt._disk.info import CheckpointInfo
from flaxckpt._disk.listing import Infos, Known, LeftOut
from flaxckpt._disk.record import is_same
from flaxckpt._object_store.opening import open_store
from flaxckpt._object_store.url import is_url
from flaxckpt._runtime.frames import outside
from flaxckpt._runtime.patience import BusyError
from flaxckpt.errors import CheckpointCorruptError, CheckpointPathError, SettingError


def watch(
    directory: str | os.PathLike[str],
    *,
    poll_secs: float = 1.0,
    timeout_secs: float | None = None,
) -> Iterator[CheckpointInfo]:
    """Yield the checkpoints in a directory, and each new one once it is on disk.

    Another process may be saving them. Each is yielded once, whole, the oldest first,
    also if it replaces one at its path, and wherever it moves later. A checkpoint that
    is deleted or replaced before this looks again is passed by. What was yielded may be
    deleted at any time: `flaxckpt.load(info)` then raises `CheckpointNotFoundError`.

    The iterator ends once all runs with checkpoints in the directory have called
    `ModelCheckpoint.finish`, or after `timeout_secs`.

    Args:
        directory: The directory, or a `gs://` or `s3://` URL; it may still be missing.
            Checkpoints in the directories below it count, as in `list_checkpoints`.
        poll_secs: How long to wait between two looks, in seconds. In a store, each look
            lists all objects below the URL.
        timeout_secs: For how long to wait for a checkpoint, in seconds; 0 for what is
            there, and None for ever.

    Returns:
        The iterator. It looks at the directory when it is asked for the next one.

    Raises:
        SettingError: If an argument cannot work.
        CheckpointPathError: If `directory` is a file, or cannot be read.
        CheckpointError: If the object store cannot be reached.

    Warns:
        UserWarning: Once for each checkpoint whose record is damaged, and each
            directory that cannot be read.

    Example:
        >>> import flaxckpt, numpy as np
        >>> with flaxckpt.ModelCheckpoint("watched/{epoch}") as ckpt:
        ...     for epoch in range(2):
        ...         path = ckpt.save({"w": np.ones(2)}, epoch)
        ...     ckpt.finish()
        >>> [info.epoch for info in watch("watched")]
        [0, 1]
    """
    if not (is_real(poll_secs) and 0 < poll_secs < math.inf):
        raise SettingError("poll_secs", poll_secs, "pass a number of seconds above 0.")
    if timeout_secs is None:
        timeout_secs = math.inf
    elif not (is_real(timeout_secs) and 0 <= timeout_secs < math.inf):
        advice = "pass a number of seconds of at least 0, or None."
        raise SettingError("timeout_secs", timeout_secs, advice)
    watched = _Watch(checked_path(directory))
    return _watched(watched, float(poll_secs), float(timeout_secs))


def _watched(
    watched: "_Watch", poll_secs: float, timeout_secs: float
) -> Iterator[CheckpointInfo]:
    until, has_ended = time.monotonic() + timeout_secs, False
    while True:
        is_new = False
        for info in watched.new():
            yield info
            is_new, until = True, time.monotonic() + timeout_secs
        # A run saves before it marks its end. So the last look follows the marks.
        if has_ended and not is_new:
            return
        has_ended = watched.has_ended()
        if not has_ended:
            left = until - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(poll_secs, left))


class _Watch:
    """What was seen in a directory so far."""

    def __init__(self, directory: str) -> None:
        """Look at nothing yet."""
        self._directory = directory
        self._known: Known = {}
        self._stores = functools.cache(open_store)
        self._infos: Infos = ()
        self._seen: set[tuple[object, ...]] = set()
        self._told: set[str] = set()

    def new(self) -> Iterator[CheckpointInfo]:
        """Yield the checkpoints that were never yielded and are still there."""
        with contextlib.suppress(BusyError):  # the next look will find some
            self._infos, left_out = listed(self._directory, self._known, self._stores)
            self._warn(left_out)
        for info in self._infos:
            # The time is of one checkpoint, which may take another name.
            mark = root_of(info), info.series, info.time
            if mark not in self._seen and self._is_durable(info):
                self._seen.add(mark)
                yield info

    def has_ended(self) -> bool:
        """Tell whether all runs with checkpoints here have ended, and there is one."""
        if not self._infos:
            return has_mark(self._directory, self._stores)
        return all(
            is_finished(*each, self._stores)
            for each in {(root_of(info), info.series) for info in self._infos}
        )

    def _is_durable(self, info: CheckpointInfo) -> bool:
        """Make a listed checkpoint's name durable; tell whether it is still there."""
        if not is_url(info):
            with contextlib.suppress(OSError):  # on a file system that is only read
                sync_path(info.path.parent)
        try:
            found = found_at(os.fspath(info), self._stores)
        except (CheckpointCorruptError, CheckpointPathError):
            return False  # the next look warns of it
        return found is not None and is_same(info, found[1])

    def _warn(self, left_out: list[LeftOut]) -> None:
        for error in left_out:
            if str(error) not in self._told:
                self._told.add(str(error))
                warnings.warn(f"Left out: {error}", stacklevel=outside())
