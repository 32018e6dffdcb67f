"""List the checkpoints below a URL."""

import dataclasses
from pathlib import Path

from etils import epath

from flaxckpt._disk.listing import Infos, LeftOut, list_below
from flaxckpt._object_store.objects import Objects
from flaxckpt._object_store.pointer import CURRENT, Pointer, read_listed, write_record
from flaxckpt._object_store.scratch import scratch


def listed(url: str) -> tuple[Infos, list[LeftOut]]:
    """List the checkpoints below a URL, as `list_below` does at any depth.

    This lists all objects below the URL, and reads the pointers.

    Raises:
        CheckpointError: If the store cannot be reached, or as `list_below` does.
    """
    objects = Objects(url)

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
