"""`save_snapshot`: what a `Snapshot` holds, in the order in which it is saved."""

from typing import Any

import numpy as np

from flaxckpt._decision.moment import Moment
from flaxckpt._program.best_trees import Kept, Snapshot
from flaxckpt._settings import Settings
from flaxckpt.errors import SettingError, TemplateError


def to_save(
    snapshot: Snapshot, member: int | None, settings: Settings
) -> list[tuple[Kept, dict[str, Any]]]:
    """Return what a snapshot holds, the earliest first, with the logs to save.

    Args:
        snapshot: The snapshot.
        member: Index of the ensemble's member; None for no ensemble.
        settings: The settings of the object that saves.

    Raises:
        SettingError: As `ModelCheckpoint.save_snapshot`.
        TemplateError: If one checkpoint would replace another.
    """

    def time(kept: Kept) -> tuple[float, float]:
        at = kept.step if kept.epoch is None else kept.epoch
        return at or 0, np.inf if kept.batch is None else kept.batch

    if not isinstance(snapshot, Snapshot):
        advice = "pass the flaxckpt.Snapshot first."
        raise SettingError("snapshot", f"<{type(snapshot).__name__}>", advice)
    extra = {} if member is None else {"member": int(member)}
    if extra:
        _check_for_members(settings)
    entries = [
        (kept, {**kept.logs, **extra})
        for kept in sorted(snapshot.entries(member), key=time)
    ]
    template = settings.template
    paths = [
        template.render(Moment(kept.epoch, kept.batch, kept.step), logs)
        for kept, logs in entries
    ]
    if len(set(paths)) < len(paths):
        raise TemplateError(
            template.label,
            f"the snapshot holds {len(paths)} trees, and one would replace another. "
            "Put {epoch} (or {step}) into the filepath, or another field that tells "
            "the trees apart.",
        )
    return entries


def _check_for_members(settings: Settings) -> None:
    """Check that an ensemble's members do not replace or delete each other's."""
    if "member" not in settings.template.fields:
        raise TemplateError(
            settings.template.label,
            "the members of an ensemble would replace each other. Put {member} into "
            "the filepath.",
        )
    if settings.policy is not None:
        number = settings.max_to_keep
        raise SettingError(
            "preserve" if number is None else "max_to_keep",
            "<a policy>" if number is None else number,
            "all members of an ensemble share one series, and this setting limits the "
            "series. To keep N trees of each member, pass keep=N to Snapshot.like.",
        )
