"""List the checkpoints below a URL."""

import dataclasses
from pathlib import Path

from etils import epath

from flaxckpt._disk.info import CheckpointInfo
from flaxckpt._disk.listing import Infos, LeftOut, list_below
from flaxckpt._disk.record import read_record
from flaxckpt._object_store.opening import Stores
from flaxckpt._object_store.pointer import CURRENT, Pointer, read_listed, write_record
from flaxckpt._object_store.scratch import scratch
from flaxckpt._object_store.source import pointer_to
from flaxckpt._object_store.url import split_url
from flaxckpt.errors import CheckpointCorruptError


def listed(url: str, stores: Stores) -> tuple[Infos, list[LeftOut]]:
    """List the checkpoints below a URL, as `list_below` does at any depth.

    This lists all objects below the URL, and reads the pointers.

    Raises:
        CheckpointError: If the store cannot be reached, or as `list_below` does.
    """
    objects = stores(url)

    def pointers() -> list[str]:
        return [key for key in objects.keys_below("") if CURRENT in key.split("/")]

    with scratch() as here:
        for key, content in read_listed(objects, pointers).items():
            parts = [part for part in key.split("/") if part != CURRENT]
            write_record(here.joinpath(*parts), Pointer.parse(content))
        infos, damaged = list_below(str(here), None)

    def shown(path: Path | str) -> Path:
        below = Path(path).relative_to(here).as_posix()
        return epath.Path(f"{objects.url}/{below}")  # pyright: ignore

    infos = tuple(dataclasses.replace(info, path=shown(info.path)) for info in infos)
    return infos, [
        type(error)(str(shown(error.path)), error.problem) for error in damaged
    ]


def found_at(url: str, stores: Stores) -> tuple[str, CheckpointInfo] | None:
    """Return the URL of the root of a checkpoint's series, and the checkpoint's record.

    None if there is no checkpoint of flaxckpt.

    Raises:
        CheckpointCorruptError: If its record is damaged.
        CheckpointError: If the store cannot be reached.
    """
    scheme, bucket, path = split_url(url)
    objects = stores(f"{scheme}://{bucket}")
    pointed = pointer_to(objects, path)
    if pointed is None:
        return None
    root, pointer = pointed
    with scratch() as here:
        write_record(here, pointer)
        try:
            info = read_record(here)
        except CheckpointCorruptError as error:
            raise CheckpointCorruptError(url, error.problem) from error
    assert info is not None
    where = epath.Path(f"{objects.url}/{path}")  # pyright: ignore
    shown = dataclasses.replace(info, path=where)
    return f"{objects.url}/{root}".rstrip("/"), shown
